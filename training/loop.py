"""The training loop: what every Ray Train worker runs over the same memory-mapped table.

All that is random in an epoch follows from the seed, the epoch and the worker, so a run that is taken up again from a
checkpoint goes on as if nothing had happened. A checkpoint is private to its run; the model version is made from
`best`.
"""

import copy
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from itemvec.encoder import Decoder, ItemEncoder
from training.colditems import ColdItems
from training.config import TrainConfig
from training.data import Prepared, Tensors, corrupt
from training.folds import TRAIN, VALIDATION
from training.objectives import Given, Task
from training.optimize import Optimization
from training.start import start_from_components

PROGRESS = "progress.jsonl"
SECONDS_BETWEEN_STEPS_TOLD = 1.0
VALIDATION_ROWS = 2048

ENOUGH_USERS = 50
"""Users who like validation rows, below which what they like is left to chance too much to decide anything."""

CHECKPOINT = "state.pt"

Metrics = dict[str, Any]
Tell = Callable[[Metrics], None]


def work(settings: dict[str, Any]) -> None:
    """Ray Train's loop per worker. `settings` has the run's `folder` and its `config`."""
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    folder = Path(settings["folder"])
    trainer = Trainer(
        Prepared.open(folder),
        TrainConfig.model_validate(settings["config"]),
        ray.train.torch.get_device(),
        rank,
        workers,
    )
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as place:
            # weights_only: a checkpoint is data; the full unpickler would run code.
            trainer.restore(torch.load(Path(place) / CHECKPOINT, map_location=trainer.device, weights_only=True))
    tell = _teller(folder / PROGRESS) if rank == 0 else _say_nothing
    saved = time.monotonic()
    for metrics in trainer.epochs(tell):
        # Every worker must make the same choice, because a report waits for all of them: the first one's clock decides.
        # Other epochs are not reported: Ray hears five a second at most, and those of a small table are shorter.
        if not trainer.agree(trainer.finished or time.monotonic() - saved > trainer.config.checkpoint_seconds):
            continue
        saved = time.monotonic()
        with tempfile.TemporaryDirectory() as place:
            if rank == 0:
                torch.save(trainer.state(), Path(place) / CHECKPOINT)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(place) if rank == 0 else None)


class Trainer:
    """A task with its optimizers and what is known of its course so far. One per worker."""

    def __init__(
        self, data: Prepared, config: TrainConfig, device: torch.device, rank: int = 0, workers: int = 1
    ) -> None:
        self.data, self.config, self.device, self.rank, self.workers = data, config, device, rank, workers
        torch.manual_seed(config.seed)  # equal first weights on every worker
        encoder, decoder = ItemEncoder(config.encoder, data.layout), Decoder(config.encoder, data.layout)
        self.task = Task(encoder, decoder, data, config).to(device)
        self.task.reconstruct.start_from_marginals()
        if data.parent is not None and data.parent.encoder is not None and data.parent.decoder is not None:
            encoder.load_state_dict(data.parent.encoder)
            decoder.load_state_dict(data.parent.decoder)
        elif config.start == "components":
            start_from_components(encoder, data)
            self._copy_of_the_first(encoder)
        self.sparse = device.type == "cpu"  # gloo adds up sparse gradients over workers, NCCL does not
        self.task.sparse_gradients(self.sparse)
        self.model = self._distributed() if workers > 1 else self.task
        self.cold = self._cold_items()
        self.train_items, self.validation_items = data.items(TRAIN), self._validation_items()
        self.batch = max(2, min(config.batch_size, len(self.train_items)) // workers)
        """Items a step on this worker; equal on all of them."""
        through = max(1, len(self.train_items) // (self.batch * workers))
        self.steps = min(through, config.epoch_steps or through)
        self.table = _placed(data, device)
        self.optimization = Optimization(
            self.task.layer_parameters(), self.task.table_parameters(), config.optimizer, config.epochs, self.steps,
            self.sparse, bool(data.gains),
        )  # fmt: skip
        self.epoch, self.waited = 0, 0
        self.best_loss, self.best_epoch = math.inf, -1
        self.best: dict[str, dict[str, Tensor]] = {}
        self.history: list[Metrics] = []

    @property
    def finished(self) -> bool:
        return self.epoch >= self.config.epochs or self.waited >= self.config.patience

    def epochs(self, tell: Tell = lambda _: None) -> Iterator[Metrics]:
        """Trains until the end or until patience is over; one dict per epoch. `tell` also hears of steps."""
        if self.finished:  # a run that was killed between its last epoch and its release
            yield self.history[-1]
            return
        while not self.finished:
            began = time.monotonic()
            train = self._train_epoch(tell)
            trained = time.monotonic() - began
            validation = self.validate()
            self.epoch += 1
            loss = self._badness(validation)
            self.optimization.epoch_ended(loss)
            better = loss < self.best_loss
            if not math.isfinite(loss):
                raise RuntimeError(
                    f"the loss is {loss} in epoch {self.epoch}; a lower optimizer.learning_rate may help"
                )
            if better:
                self.best_loss, self.best_epoch, self.waited = loss, self.epoch, 0
                self.best = self._weights()
            else:
                self.waited += 1
            metrics = {
                "epoch": self.epoch, "epochs": self.config.epochs, "train": train, "validation": validation, "best":
                better, "seconds": round(trained, 3), "items_per_second": round(self.steps * self.batch * self.workers /
                trained, 1), "weights": self.task.balance.weights(),
            }  # fmt: skip
            self.history.append(metrics)
            tell(metrics)
            yield metrics

    def _train_epoch(self, tell: Tell) -> dict[str, float]:
        seed = self.config.seed * 1_000_003 + self.epoch
        order = torch.randperm(len(self.train_items), generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(seed * 1_009 + self.rank)  # dropout and sampled labels differ between workers
        noise = torch.Generator(self.table.dense.device).manual_seed(seed * 1_009 + self.rank)
        self.task.train()
        sums: dict[str, Tensor] = {}
        told = time.monotonic()
        for step in range(self.steps):
            first = (step * self.workers + self.rank) * self.batch
            parts = self._step(self.train_items[order[first : first + self.batch]], noise)
            for name, loss in parts.items():
                sums[name] = sums.get(name, 0) + loss
            if time.monotonic() - told > SECONDS_BETWEEN_STEPS_TOLD:
                told = time.monotonic()
                tell({"epoch": self.epoch, "epochs": self.config.epochs, "step": step + 1, "steps": self.steps})
        mean = self._mean_over_workers({name: loss / self.steps for name, loss in sums.items()})
        return {"total": self.task.balance.compared(mean), **mean}

    def _step(self, items: Tensor, noise: torch.Generator) -> dict[str, Tensor]:
        damaged, given = self._batch(items, noise, TRAIN)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            total, parts = self.model(damaged, given)
        self.optimization.zero_grad()
        total.backward()
        if self.sparse and self.workers > 1:
            self._add_up_table_gradients()
        self.optimization.step()
        return {name: loss.detach() for name, loss in parts.items()}

    def _batch(self, items: Tensor, noise: torch.Generator, fold: int) -> tuple[Tensors, Given]:
        """What the task is given of `items` (B,), and of pairs of items whose positives are of the fold."""
        items = items.to(self.table.dense.device)
        paired = self._paired(fold)
        copies = items.repeat(self.task.views)
        encoded = copies if paired is None else torch.cat([copies, paired])
        damaged = corrupt(self.table, encoded, self.train_items, self.config.corruption, self.data.layout, noise)
        targets = {target.name: target.values[items.cpu()].to(self.device) for target in self.data.targets}
        paired = None if paired is None else paired.to(self.device)
        return self._moved(damaged), Given(self._moved(self.table.clean(items)), targets, paired, self._before(items))

    def _before(self, items: Tensor) -> Tensor | None:
        """(B, dim) where the version that this run follows has the items; None where that counts nothing."""
        if self.data.parent is None or not self.config.compatible:
            return None
        before = self.data.parent.as_trained(items.cpu())
        return None if before is None else before.to(self.device)

    def _paired(self, fold: int) -> Tensor | None:
        """This worker's part of the anchors, their positives, and the items drawn alike."""
        config, interactions = self.config.co_engage, self.data.interactions
        if interactions is None or config.weight == 0:
            return None
        share = max(2, config.pairs // self.workers)
        anchors, positives = interactions.pairs(share, fold, torch.default_generator)
        if len(anchors) == 0:
            return None
        drawn = torch.randint(len(self.train_items), (len(anchors) * config.negatives // config.pairs,))
        return torch.cat([anchors, positives, self.train_items[drawn]]).to(self.table.dense.device)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The training losses on the validation rows, damaged in the same way each time. Every worker does it, and
        alike."""
        generator = torch.Generator(self.table.dense.device).manual_seed(self.config.seed)
        state = torch.get_rng_state()
        torch.manual_seed(self.config.seed)
        self.task.eval()
        sums: dict[str, float] = {}
        parts = torch.split(self.validation_items, max(2, self.config.batch_size))
        for part in parts:
            _, losses = self.task(*self._batch(part, generator, VALIDATION))
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + float(loss) * len(part) / len(self.validation_items)
        torch.set_rng_state(state)
        if (figures := self._recommended()) is not None:
            sums["cold_start"] = figures
        return {"total": self.task.balance.compared(sums), **sums}

    def _badness(self, validation: dict[str, float]) -> float:
        """What decides which epoch is kept. Where there are likes that is how well the validation rows are recommended
        to those who like training rows: losses still fall when single labels are already learned by heart."""
        return 1 - validation["cold_start"] if "cold_start" in validation else validation["total"]

    def _recommended(self) -> float | None:
        """The mean of recall, NDCG and popularity-matched AUC of the validation rows that users liked."""
        if self.cold is None:
            return None
        rows = torch.from_numpy(np.concatenate([self.cold.warm, self.cold.cold])).to(self.table.dense.device)
        parts = (self.task.encoder.uncentred(*self._moved(self.table.clean(part))) for part in torch.split(rows, 4096))
        vectors = torch.cat([part.float().cpu() for part in parts])
        if self.config.encoder.centre:  # the encoder's own mean is still that of damaged rows
            vectors = vectors - vectors[: len(self.cold.warm)].mean(0)
        unit = functional.normalize(vectors, dim=1).numpy()
        figures = self.cold.ranked(lambda one, other, sums: (sums @ unit[one]) @ unit[other].T)
        return sum(figures.values()) / len(figures)

    def state(self) -> dict[str, Any]:
        return {
            "task": copy.deepcopy(self.task.state_dict()), "optimization": self.optimization.state_dict(),
            "best": self.best, "best_loss": self.best_loss, "best_epoch": self.best_epoch,
            "epoch": self.epoch, "waited": self.waited, "history": json.dumps(self.history),
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        self.task.load_state_dict(state["task"])
        self.optimization.load_state_dict(state["optimization"])
        self.best, self.best_loss, self.best_epoch = state["best"], state["best_loss"], state["best_epoch"]
        self.epoch, self.waited, self.history = state["epoch"], state["waited"], json.loads(state["history"])

    def agree(self, choice: bool) -> bool:
        """The first worker's choice, on all of them."""
        if self.workers == 1:
            return choice
        flag = torch.tensor([int(choice)], device=self.device)
        torch.distributed.broadcast(flag, 0)
        return bool(flag.item())

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        return {
            "encoder": copy.deepcopy(self.task.encoder.state_dict()),
            "decoder": copy.deepcopy(self.task.decoder.state_dict()),
            "predict": copy.deepcopy(self.task.predict.state_dict()),
        }

    def _copy_of_the_first(self, encoder: ItemEncoder) -> None:
        """What was computed on another processor may differ in its last bit, and workers must start alike."""
        if self.workers > 1:
            for parameter in encoder.parameters():
                torch.distributed.broadcast(parameter.data, 0)

    def _distributed(self) -> nn.Module:
        saved = self.task.state_dict().keys()
        aside = [name for name, _ in self.task.named_buffers() if name not in saved]  # constants: alike on all workers
        if self.sparse:  # DDP knows of sparse gradients in nn.Embedding only, so those of the tables are left to us
            tables = {id(table) for table in self.task.table_parameters()}
            aside += [name for name, parameter in self.task.named_parameters() if id(parameter) in tables]
        ignore = nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model  # noqa: SLF001
        ignore(self.task, aside)  # type: ignore[no-untyped-call]
        return nn.parallel.DistributedDataParallel(
            self.task, device_ids=[self.device] if self.device.type == "cuda" else None, find_unused_parameters=True
        )

    def _add_up_table_gradients(self) -> None:
        for table in self.task.table_parameters():
            gradient = table.grad
            if gradient is None:  # every worker has the same columns, so all of them lack it
                continue
            gradient = gradient.coalesce()
            torch.distributed.all_reduce(gradient)
            table.grad = gradient / self.workers

    def _cold_items(self) -> ColdItems | None:
        if self.data.interactions is None or not self.config.co_engage.weight:
            return None
        cold = ColdItems.of(self.data.interactions.likes, self.data.fold, VALIDATION)
        return cold if cold is not None and len(cold.liked) >= ENOUGH_USERS else None

    def _validation_items(self) -> Tensor:
        items = self.data.items(VALIDATION)
        if len(items) < 2:  # a table so small that none fell into the fold is judged by its training rows
            items = self.data.items(TRAIN)
        return items[:: max(1, math.ceil(len(items) / VALIDATION_ROWS))]

    def _moved(self, batch: Tensors) -> Tensors:
        if batch[0].device == self.device:
            return batch
        dense, indices, weights, lengths = (part.pin_memory().to(self.device, non_blocking=True) for part in batch)
        return dense, indices, weights, lengths

    def _mean_over_workers(self, sums: dict[str, Tensor]) -> dict[str, float]:
        names = list(sums)
        values = torch.stack([sums[name].float() for name in names])
        if self.workers > 1:
            torch.distributed.all_reduce(values)
            values /= self.workers
        return dict(zip(names, values.tolist(), strict=True))


def _placed(data: Prepared, device: torch.device) -> Any:
    """The table where batches are gathered: on the GPU if it takes a quarter of what is free there, else
    memory-mapped."""
    if device.type == "cuda" and data.table.nbytes() < torch.cuda.mem_get_info(device)[0] / 4:
        return data.table.to(device)
    return data.table


def _teller(path: Path) -> Tell:
    """Appends each message as a line; the driver, which shares the folder, reads it as it grows."""

    def tell(metrics: Metrics) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    return tell


def _say_nothing(_: Metrics) -> None:
    pass
