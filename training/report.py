"""The evaluation as one HTML page that needs nothing else: no script, no network, light and dark."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from training.baselines import BASELINES
from training.exhibits import COLORS, Exhibits
from training.findings import FIGURES, NAMES, better, findings
from training.plots import loss_curves

PALETTE = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#76b7b2", "#d4a72c", "#9c755f")
RAMP = ("#4b3a8f", "#3d5a9b", "#2f7a99", "#219a8c", "#3bb573", "#7ccb4b", "#c0d431", "#f0c419")
"""From low to high. Both are of middle lightness, so that they show on white and on black."""


@dataclass(frozen=True, slots=True)
class Cell:
    text: str
    share: float = 0.0
    """Length of the bar behind it, 0 to 1."""
    mark: str = ""
    """`ours`, `lost` (ours, and a baseline is better), `best`."""


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    cells: list[Cell]
    detail: str = ""


def render(ref: str, evaluation: Mapping[str, Any], exhibits: Exhibits | None) -> str:
    """The page on model `ref` (`movies@3`); without `exhibits` it shows no single items."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = files("training").joinpath("report.html.j2").read_text(encoding="utf-8")
    history = evaluation.get("training", {}).get("history")
    page: str = environment.from_string(template).render(
        ref=ref,
        evaluation=evaluation,
        findings=findings(evaluation),
        names=NAMES,
        neighbors=_neighbors(evaluation["retrieval"]),
        prefixes=_prefixes(evaluation["retrieval"]),
        cold=_cold(evaluation["cold_start"]),
        figures=[name.format(k=(evaluation["cold_start"] or {"k": 0})["k"]) for name in FIGURES.values()],
        columns=_columns(evaluation["columns"]),
        targets=_targets(evaluation.get("predict", {})),
        unseen=sorted(evaluation["out_of_vocabulary"]["columns"].items(), key=lambda named: -named[1]),
        exhibits=exhibits,
        points=_points(exhibits) if exhibits else [],
        palettes=[RAMP if c.ordered else PALETTE for c in exhibits.colorings] if exhibits else [],
        colors=COLORS,
        losses=loss_curves(history) if history else None,
    )
    return page.lstrip()


def _neighbors(retrieval: Mapping[str, Any]) -> list[Row]:
    """Ours, each baseline, chance."""
    columns = dict(retrieval["columns"])
    if len(columns) > 1:
        columns = {"mean of the columns": retrieval["mean"], **columns}
    rows = []
    for name, figures in columns.items():
        keys = ("precision", *BASELINES, "base_rate")
        rows.append(Row(name, _compared([figures[key] for key in keys])))
    return rows


def _prefixes(retrieval: Mapping[str, Any]) -> list[Row]:
    sizes = retrieval.get("prefixes", {})
    return [
        Row(size, [*_compared([figures["precision"], figures["pca"]]), Cell(_told(figures.get("loss")))])
        for size, figures in sizes.items()
    ]


def _cold(cold: Mapping[str, Any] | None) -> list[Row]:
    """A row for the model, each baseline and chance; a column for each figure."""
    if cold is None:
        return []
    who = ("model", *BASELINES, "chance")
    by_figure = [_compared([cold[name][key] for name in who]) for key in FIGURES]
    told = {"model": "this model", "chance": "chance", **NAMES}
    return [Row(told[name], [figure[i] for figure in by_figure]) for i, name in enumerate(who)]


def _columns(columns: Mapping[str, Any]) -> list[Row]:
    """Score, PCA, majority, inferred, loss; for sets a second row of R-precision."""
    rows = []
    for name, column in columns.items():
        for metric, figures in ((column["metric"], column), ("R-precision", column.get("r_precision"))):
            if figures is None:
                continue
            ours, rivals = figures["score"], [figures.get("pca"), figures["majority"]]
            lost = ours is not None and any(
                r is not None and better(metric, r, ours) and abs(r - ours) > 5e-4 for r in rivals
            )
            error = metric == "mean error in steps"
            widest = max([1.0, *(f for f in (ours, *rivals) if f is not None)]) if error else 1.0
            cells = [Cell(_told(ours), _share(ours, widest), "lost" if lost else "ours")]
            cells += [Cell(_told(f), _share(f, widest)) for f in (*rivals, figures["inferred"])]
            cells.append(Cell(_told(column["loss"]) if figures is column else ""))
            rows.append(Row(name if figures is column else "", cells, f"{metric}{' (low is good)' if error else ''}"))
    return rows


def _targets(targets: Mapping[str, Any]) -> list[Row]:
    rows = []
    for name, target in targets.items():
        score, majority = target["score"], target["majority"]
        lost = score is not None and majority > score
        cells = [
            Cell(_told(score), _share(score, 1.0), "lost" if lost else "ours"),
            Cell(_told(majority), _share(majority, 1.0)),
        ]
        rows.append(Row(name, cells, f"{target['metric']}, {target['rows']:,} items"))
    return rows


def _compared(figures: Sequence[float]) -> list[Cell]:
    """Ours first, then baselines, of which the last may be chance; higher is better. Bars are shares of the best."""
    most = max([*figures, 1e-9])
    best = max(figures[1:])
    cells = [Cell(_told(figures[0]), _share(figures[0], most), "lost" if best > figures[0] + 5e-4 else "ours")]
    return cells + [Cell(_told(f), _share(f, most), "best" if f == best > figures[0] else "") for f in figures[1:]]


def _points(exhibits: Exhibits) -> list[tuple[int, int, str, str]]:
    """x, y, classes (one per coloring: its letter and the color's number), name; of a picture 1000 wide, 700 high."""
    points = []
    for i, (x, y) in enumerate(exhibits.points.tolist()):
        colors = ((chr(ord("a") + c), coloring.color[i]) for c, coloring in enumerate(exhibits.colorings))
        classes = " ".join(f"{letter}{color}" for letter, color in colors if color is not None)
        points.append((round(10 + 980 * x), round(10 + 680 * y), classes, exhibits.names[i]))
    return points


def _share(figure: float | None, most: float) -> float:
    return round(min(max((figure or 0.0) / most, 0.0), 1.0), 3)


def _told(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.3f}"
