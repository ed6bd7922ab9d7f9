"""Pictures of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from training.progress import NOT_COLUMNS


def loss_curves(history: Sequence[dict[str, Any]], path: Path) -> None:
    """The losses over the epochs: their sum at the left, each column's against its best constant at the right."""
    epochs = [m["epoch"] for m in history]
    columns = [name for name in history[0]["validation"] if name not in NOT_COLUMNS]
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    whole, parts = figure.subplots(1, 2)
    for fold, style in (("train", "--"), ("validation", "-")):
        whole.plot(epochs, [m[fold]["total"] for m in history], style, marker=".", label=fold)
    best = min(history, key=lambda m: m["validation"]["total"])
    whole.axvline(best["epoch"], color="gray", linewidth=0.8, linestyle=":", label="kept")
    whole.set(title="Sum of the objectives", xlabel="epoch", ylabel="loss")
    for i, name in enumerate(columns):
        style = ("-", "--", "-.", ":")[i // 10 % 4]  # the colors come round after ten columns
        parts.plot(epochs, [m["validation"][name] for m in history], style, marker=".", label=name)
    parts.axhline(1.0, color="gray", linewidth=0.8)
    parts.set(title="Columns on validation rows (1 = best constant answer)", xlabel="epoch", ylabel="loss")
    for axes in (whole, parts):
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.get_legend_handles_labels()[0]:
            outside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "frameon": False}
            axes.legend(fontsize="small", ncols=1 + len(axes.lines) // 20, **(outside if axes is parts else {}))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
