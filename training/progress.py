"""What a person sees of a run: its steps, the epochs with their losses and the time that is left. Plain lines without a
terminal, so that a log file reads well too."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

COLUMN = "reconstruct."


def of_columns(losses: Mapping[str, float]) -> dict[str, float]:
    """Of the losses of an epoch, those of columns that are read back, by the columns' names.

    >>> of_columns({"total": 0.9, "reconstruct": 0.8, "reconstruct.genres": 0.7})
    {'genres': 0.7}
    """
    return {name.removeprefix(COLUMN): loss for name, loss in losses.items() if name.startswith(COLUMN)}


class Display:
    """Pass `told` to `cluster.fit`; `say` begins a new phase, whose seconds land in `timings`."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self.timings: dict[str, float] = {}
        self._phase, self._since = "", time.monotonic()
        self._began = self._since
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self._task = self._bar.add_task("", total=None, visible=False)
        self._epoch_seconds: list[float] = []
        self._weights: dict[str, float] = {}

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_phase()
        self._bar.stop()

    def say(self, phase: str, text: str) -> None:
        self.end_phase()
        self._phase = phase
        self._bar.update(self._task, visible=False)
        self.line(f"[bold]{text}[/]")

    def line(self, text: str) -> None:
        self.console.print(f"[dim]{time.monotonic() - self._began:6.1f} s[/]  {text}")

    def bar(self, text: str, done: float, total: float) -> None:
        self._bar.update(self._task, description=text, completed=done, total=total, visible=True)

    def told(self, metrics: dict[str, Any]) -> None:
        """A step or an epoch, as the loop tells it."""
        epochs = metrics["epochs"]
        if "step" in metrics:
            done = metrics["epoch"] + metrics["step"] / metrics["steps"]
            self.bar(f"epoch {metrics['epoch'] + 1} of {epochs}", done, epochs)
            return
        if metrics["epoch"] == 1:
            self._begin_loop(metrics["seconds"])
        self.bar(f"epoch {metrics['epoch']} of {epochs}", metrics["epoch"], epochs)
        self._epoch_seconds.append(metrics["seconds"])
        left = (epochs - metrics["epoch"]) * sum(self._epoch_seconds) / len(self._epoch_seconds)
        validation = metrics["validation"]
        best = " *" if metrics["best"] else ""
        self.line(
            f"epoch {metrics['epoch']:>2} of {epochs}  loss {metrics['train']['total']:.4f}"
            f"  validation {validation['total']:.4f}{best}"
            f"  {metrics['items_per_second']:,.0f} items/s  {left:.0f} s left"
        )
        columns = "  ".join(f"{name} {loss:.3f}" for name, loss in of_columns(validation).items())
        if columns:
            self.line(f"  [dim]validation loss per column (1 = best constant): {columns}[/]")
        if metrics["weights"] != self._weights:  # said once where they do not move
            self._weights = metrics["weights"]
            weights = "  ".join(f"{name} {weight:.3g}" for name, weight in self._weights.items())
            self.line(f"  [dim]weights of the objectives: {weights}[/]")

    def _begin_loop(self, seconds: float) -> None:
        """The workers began about so long ago; what went before was their start."""
        start = max(time.monotonic() - self._since - seconds, 0.0)
        self.timings["workers"] = self.timings.get("workers", 0.0) + round(start, 2)
        self._phase, self._since = "loop", self._since + start

    def end_phase(self) -> None:
        now = time.monotonic()
        if self._phase:
            self.timings[self._phase] = round(self.timings.get(self._phase, 0.0) + now - self._since, 2)
        self._phase, self._since = "", now
