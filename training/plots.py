"""The curves of a run, as SVG that a page can hold: no background, and text in whatever color the page writes in; and
what a search for settings found, as a picture of its own."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from training.progress import of_columns
from training.tuned import Trial

INK = "#012345"
"""Drawn wherever the page's own color of text is meant."""

DARK, PALE = "#2f7a99", "#9bc4d4"


def loss_curves(history: Sequence[dict[str, Any]]) -> str:
    """The losses over the epochs: their sum above, each column's against its best constant below."""
    epochs = [m["epoch"] for m in history]
    columns = list(of_columns(history[0]["validation"]))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8, 3.2 + (3.8 if columns else 0)), layout="constrained")
        axes = figure.subplots(2 if columns else 1, 1, squeeze=False)[:, 0]
        for fold, style in (("train", "--"), ("validation", "-")):
            axes[0].plot(epochs, [m[fold]["total"] for m in history], style, marker=".", label=fold)
        best = min(history, key=lambda m: m["validation"]["total"])
        axes[0].axvline(best["epoch"], color="gray", linewidth=0.8, linestyle=":", label="kept")
        axes[0].set(title="Sum of the objectives", ylabel="loss")
        if columns:
            for i, name in enumerate(columns):
                style = ("-", "--", "-.", ":")[i // 10 % 4]  # the colors come round after ten columns
                losses = [of_columns(m["validation"])[name] for m in history]
                axes[1].plot(epochs, losses, style, marker=".", label=_shortened(name))
            axes[1].axhline(1.0, color="gray", linewidth=0.8)
            axes[1].set(title="Columns on validation rows (1 = best constant answer)", ylabel="loss")
        axes[-1].set(xlabel="epoch")
        for one in axes:
            _finish(one)
        return _svg(figure)


def scores_by_setting(matters: Mapping[str, float], trials: Sequence[Trial], metric: str) -> str:
    """A dot per trial in a field per setting, those first that explain most; hollow where a trial fell behind."""
    names, wide = list(matters), 3
    rows = -(-len(names) // wide)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4 * wide, 2.8 * rows), layout="constrained")
        for place, name in enumerate(names):
            axes = figure.add_subplot(rows, wide, place + 1)
            there = [trial for trial in trials if name in trial.settings]
            numbers = all(isinstance(t.settings[name], int | float) for t in there)
            values: list[Any] = [t.settings[name] if numbers else str(t.settings[name]) for t in there]
            colors = ["none" if t.outcome == "stopped" else PALE for t in there]
            axes.scatter(values, [t.score or 0.0 for t in there], facecolors=colors, edgecolors=DARK)
            if numbers and values and min(values) > 0 and max(values) > 9 * min(values):
                axes.set_xscale("log")
                axes.xaxis.set_major_formatter("{x:g}")
                axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set(title=f"{name}: {matters[name]:.0%}", ylabel=metric if place % wide == 0 else "")
        figure.suptitle("Share of the scores' variance that a setting explains alone; hollow: stopped early")
        return _svg(figure, "white").replace("currentColor", "black")


_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: smaller, sharp, and it can be searched
    "svg.hashsalt": "itemvec",  # the same picture has the same bytes
    "text.parse_math": False,  # a column may have a $ in its name
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
}


def _finish(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(
        fontsize="small",
        ncols=1 + len(axes.lines) // 20,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        frameon=False,
    )


def _shortened(name: str, longest: int = 28) -> str:
    text = name if len(name) <= longest else f"{name[: longest - 1]}…"
    return f" {text}" if text.startswith("_") else text  # matplotlib leaves names that begin so out of a legend


def _svg(figure: Figure, background: str | None = None) -> str:
    file = io.StringIO()
    look: Any = {"transparent": True} if background is None else {"facecolor": background}
    figure.savefig(file, format="svg", metadata={"Date": None}, **look)
    drawn = file.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
