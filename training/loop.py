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

import ray.train
import ray.train.torch
import torch
from torch import Tensor, nn

from itemvec.encoder import Decoder, ItemEncoder
from training.config import TrainConfig
from training.data import TRAIN, VALIDATION, Prepared, Tensors, corrupt
from training.objectives import Task

PROGRESS = "progress.jsonl"
SECONDS_BETWEEN_STEPS_TOLD = 1.0
VALIDATION_ROWS = 2048
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
        due = trainer.agree(trainer.finished or time.monotonic() - saved > trainer.config.checkpoint_seconds)
        if not due:
            ray.train.report(metrics)
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
        layout, weights = data.layout, {f.name: f.weight for f in data.transform.schema.features}
        encoder, decoder = ItemEncoder(config.encoder, layout), Decoder(config.encoder, layout)
        self.task = Task(encoder, decoder, layout, data.marginals, weights, config).to(device)
        self.task.reconstruct.start_from_marginals()
        self.sparse = device.type == "cpu"  # gloo adds up sparse gradients over workers, NCCL does not
        self.task.sparse_gradients(self.sparse)
        self.model = self._distributed() if workers > 1 else self.task
        self.train_items, self.validation_items = data.items(TRAIN), self._validation_items()
        self.batch = max(2, min(config.batch_size, len(self.train_items)) // workers)
        """Items a step on this worker; equal on all of them."""
        self.steps = max(1, len(self.train_items) // (self.batch * workers))
        self.table = _placed(data, device)
        self.optimizers = self._optimizers()
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
            loss = validation["total"]
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
                trained, 1),
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
            parts = self._step(self.train_items[order[first : first + self.batch]], step, noise)
            for name, loss in parts.items():
                sums[name] = sums.get(name, 0) + loss
            if time.monotonic() - told > SECONDS_BETWEEN_STEPS_TOLD:
                told = time.monotonic()
                tell({"epoch": self.epoch, "epochs": self.config.epochs, "step": step + 1, "steps": self.steps})
        return self._mean_over_workers({name: loss / self.steps for name, loss in sums.items()})

    def _step(self, items: Tensor, step: int, noise: torch.Generator) -> dict[str, Tensor]:
        config, layout = self.config, self.data.layout
        items = items.to(self.table.dense.device)
        damaged = corrupt(self.table, items.repeat(self.task.views), self.train_items, config.corruption, layout, noise)
        clean = self.table.clean(items)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            total, parts = self.model(self._moved(damaged), self._moved(clean))
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        total.backward()
        if self.sparse and self.workers > 1:
            self._add_up_table_gradients()
        nn.utils.clip_grad_norm_(self.task.layer_parameters(), config.optimizer.clip)
        rate = self._rate(self.epoch * self.steps + step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["full_rate"] * rate
            optimizer.step()
        return {"total": total.detach(), **{name: loss.detach() for name, loss in parts.items()}}

    def _rate(self, step: int) -> float:
        """The share of the full learning rate: a linear rise, then a cosine down to 0."""
        total = self.config.epochs * self.steps
        warmup = self.config.optimizer.warmup * total
        return min(1.0, (step + 1) / (warmup + 1)) * 0.5 * (1 + math.cos(math.pi * step / total))

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
            items = part.to(self.table.dense.device)
            how, layout = self.config.corruption, self.data.layout
            damaged = corrupt(self.table, items.repeat(self.task.views), self.train_items, how, layout, generator)
            total, losses = self.task(self._moved(damaged), self._moved(self.table.clean(items)))
            for name, loss in {"total": total, **losses}.items():
                sums[name] = sums.get(name, 0.0) + float(loss) * len(items) / len(self.validation_items)
        torch.set_rng_state(state)
        return sums

    def state(self) -> dict[str, Any]:
        return {
            "weights": self._weights(), "best": self.best, "best_loss": self.best_loss, "best_epoch": self.best_epoch,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "epoch": self.epoch, "waited": self.waited, "history": json.dumps(self.history),
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        self.task.encoder.load_state_dict(state["weights"]["encoder"])
        self.task.decoder.load_state_dict(state["weights"]["decoder"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
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
        }

    def _distributed(self) -> nn.Module:
        if self.sparse:  # DDP knows of sparse gradients in nn.Embedding only, so those of the tables are left to us
            tables = {id(table) for table in self.task.table_parameters()}
            names = [name for name, parameter in self.task.named_parameters() if id(parameter) in tables]
            ignore = nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model  # noqa: SLF001
            ignore(self.task, names)  # type: ignore[no-untyped-call]
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

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        config = self.config.optimizer
        layers, tables = self.task.layer_parameters(), self.task.table_parameters()
        fused = self.device.type == "cuda"
        made: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(layers, lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused)
        ]
        if tables and self.sparse:
            made.append(torch.optim.SparseAdam(tables, lr=config.table_learning_rate))
        elif tables:
            made.append(torch.optim.Adam(tables, lr=config.table_learning_rate, fused=fused))
        for optimizer in made:
            for group in optimizer.param_groups:
                group["full_rate"] = group["lr"]
        return made

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
