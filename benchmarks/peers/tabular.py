"""pytorch-tabular's denoising autoencoder, trained as its documentation does: TRAIN.parquet HELD.parquet EPOCHS
WIDTHS NOISE.

Prints a line of JSON after each epoch: seconds of training so far, and over the held-out rows, undamaged, the mean over
the columns of labels of the cross-entropy of what is read back.
"""

import json
import sys
import time
from typing import Any

import pandas as pd
import torch
from pytorch_lightning import Callback
from pytorch_tabular import TabularModel
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
from pytorch_tabular.models import CategoryEmbeddingModelConfig
from pytorch_tabular.ssl_models import DenoisingAutoEncoderConfig


class Measure(Callback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.seconds, self._began = 0.0, 0.0

    def on_train_epoch_start(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, model: Any) -> None:
        self.seconds += time.perf_counter() - self._began
        model.eval()
        sums, rows = torch.zeros(()), 0
        with torch.no_grad():
            for batch in trainer.val_dataloaders:
                x = model.embedding_layer(batch)
                logits = model.reconstruction(model.decoder(model.featurizer(x, perturb=False).features))["categorical"]
                truth = x["_categorical_orig"]
                each = [
                    torch.nn.functional.cross_entropy(column, truth[:, i], reduction="sum")
                    for i, column in enumerate(logits)
                ]
                sums, rows = sums + torch.stack(each).mean(), rows + len(truth)
        model.train()
        print(json.dumps({"seconds": self.seconds, "loss": float(sums) / rows}), flush=True)


def main(train: str, held: str, epochs: int, widths: str, noise: float) -> None:
    torch.set_num_threads(1)
    frames = [pd.read_parquet(path) for path in (train, held)]
    labels = [name for name in frames[0].columns if frames[0][name].dtype == object]
    numbers = [name for name in frames[0].columns if name not in labels]
    encoder, _, dim = widths.rpartition("-")
    model = TabularModel(
        data_config=DataConfig(target=None, continuous_cols=numbers, categorical_cols=labels, num_workers=0),
        model_config=DenoisingAutoEncoderConfig(
            encoder_config=CategoryEmbeddingModelConfig(task="backbone", layers=f"{encoder}-{dim}"),
            decoder_config=CategoryEmbeddingModelConfig(task="backbone", layers=encoder),
            default_noise_probability=noise, max_onehot_cardinality=1_000_000,
        ),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(
            batch_size=256, max_epochs=epochs, accelerator="cpu", progress_bar="none", checkpoints=None,
            early_stopping=None, load_best=False, seed=0,
        ),
        verbose=False,
    )  # fmt: skip
    model.pretrain(train=frames[0], validation=frames[1], callbacks=[Measure()])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], float(sys.argv[5]))
