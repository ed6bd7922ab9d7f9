"""What the figures of an evaluation say, in sentences: what is good, what is worse than a baseline, and what to do."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from training.baselines import BASELINES

NAMES = {
    "one_hot": "one-/multi-hot",
    "hashing": "hashing",
    "svd": "TruncatedSVD",
    "pca": "PCA",
    "pca_unit_variance": "PCA, unit variance",
}
FIGURES = {"recall": "recall@{k}", "ndcg": "NDCG@{k}", "pm_auc": "popularity-matched AUC"}

CLOSE = 0.01
"""A difference that is not worth a word."""


@dataclass(frozen=True, slots=True)
class Finding:
    good: bool
    text: str
    advice: str = ""


def findings(evaluation: Mapping[str, Any]) -> list[Finding]:
    """Of an evaluation as in evaluation.json; what is worse than it should be first."""
    found = [
        *_neighbors(evaluation["retrieval"]),
        *_cold_start(evaluation["cold_start"]),
        *_columns(evaluation["columns"]),
        *_unseen(evaluation["out_of_vocabulary"]),
        *_space(evaluation["space"], evaluation["retrieval"]),
        *_parent(evaluation["parent"]),
        *_training(evaluation.get("training", {}).get("history", [])),
    ]
    return sorted(found, key=lambda finding: finding.good)


def best_rival(figures: Mapping[str, float]) -> tuple[str, float]:
    """The best baseline's name and figure."""
    return max(((name, figures[name]) for name in BASELINES), key=lambda named: named[1])


def better(metric: str, one: float, other: float) -> bool:
    """Whether `one` is the better score of a column."""
    return one < other if metric == "mean error in steps" else one > other


def _neighbors(retrieval: Mapping[str, Any]) -> Iterator[Finding]:
    mean = retrieval["mean"]
    if not mean:
        return
    rival, theirs = best_rival(mean)
    figures = f"precision@{retrieval['k']} {mean['precision']:.3f}, the best baseline ({NAMES[rival]}) {theirs:.3f}"
    if mean["precision"] >= theirs:
        yield Finding(True, f"Neighbors share hidden columns more often than those of any baseline: {figures}.")
    else:
        yield Finding(
            False,
            f"Neighbors share hidden columns less often than those of a baseline: {figures}.",
            "Train longer (epochs), raise contrast.weight, or widen the vector (encoder.dim).",
        )
    lost = {
        name: column for name, column in retrieval["columns"].items()
        if best_rival(column)[1] > column["precision"] + CLOSE
    }  # fmt: skip
    if lost:
        told = (f"{n} ({c['precision']:.3f} against {best_rival(c)[1]:.3f})" for n, c in lost.items())
        yield Finding(
            False,
            f"With these columns hidden, some baseline finds better neighbors: {_listed(told)}.",
            "Raise the weight of the columns that they depend on (weight in the schema).",
        )


def _cold_start(cold: Mapping[str, Any] | None) -> Iterator[Finding]:
    if cold is None:
        return
    for key, name in FIGURES.items():
        ours = cold["model"][key]
        rival, theirs = max(((r, cold[r][key]) for r in BASELINES), key=lambda named: named[1])
        told = f"{name.format(k=cold['k'])} {ours:.3f}, the best baseline ({NAMES[rival]}) {theirs:.3f}"
        if ours >= theirs:
            yield Finding(True, f"New items are recommended better than by any baseline: {told}.")
        else:
            yield Finding(
                False,
                f"New items are recommended worse than by a baseline: {told}.",
                "Train with the likes (co_engage); leave out columns that only repeat each other.",
            )


def _columns(columns: Mapping[str, Any]) -> Iterator[Finding]:
    scored = {name: c for name, c in columns.items() if c["score"] is not None}
    useless = [
        name for name, c in scored.items()
        if better(c["metric"], c["majority"], c["score"]) and c["loss"] > 1 - CLOSE
    ]  # fmt: skip
    if useless:
        yield Finding(
            False,
            f"The embedding says no more of these columns than the most frequent answer: {_listed(useless)}.",
            "Raise their weight in the schema, train longer, or leave them out. (With reconstruct.weight 0 nothing is "
            "read back, and this says nothing.)",
        )
    behind = [
        name for name, c in scored.items()
        if c["pca"] is not None and better(c["metric"], c["pca"], c["score"]) and abs(c["pca"] - c["score"]) > CLOSE
    ]  # fmt: skip
    if behind:
        yield Finding(
            False,
            f"PCA of the same size reads these columns back better: {_listed(behind)}.",
            "PCA keeps a few numbers and frequent labels exactly and little of the rest; here all share a vector of "
            "length 1. If single values matter to you more than neighbors, raise corruption.whole.",
        )
    if scored and not useless and not behind:
        yield Finding(True, "Every column is read back better than by the most frequent answer and by PCA.")


def _unseen(unseen: Mapping[str, Any]) -> Iterator[Finding]:
    here, others = unseen["precision"], unseen["precision_of_others"]
    if here is None or others is None:
        return
    told = f"{here:.3f}, that of the others {others:.3f}"
    if here < 0.8 * others:
        yield Finding(
            False,
            f"Items with labels that training never saw have worse neighbors: precision {told}.",
            "Raise corruption.unseen, or lower min_count of the columns where labels are new.",
        )
    else:
        yield Finding(True, f"Items with labels that training never saw hold up: precision {told}.")


def _space(space: Mapping[str, float], retrieval: Mapping[str, Any]) -> Iterator[Finding]:
    dim = max(map(int, retrieval.get("prefixes", {"0": None})))
    if dim and space["effective_rank"] < dim / 4:
        yield Finding(
            False,
            f"Only {space['effective_rank']:.1f} of {dim} dimensions are in use.",
            "A smaller encoder.dim would serve as well; or the space has collapsed: lower the learning rate, raise "
            "contrast.weight.",
        )
    if abs(space["mean_cosine"]) > 0.1:
        yield Finding(
            False,
            f"Two items taken at random look alike: their mean cosine is {space['mean_cosine']:.2f}.",
            "Leave encoder.centre on.",
        )


def _parent(parent: Mapping[str, Any] | None) -> Iterator[Finding]:
    if parent is not None and parent["overlap"] < 0.3:
        yield Finding(
            False,
            f"Only {parent['overlap']:.0%} of the {parent['k']} nearest are those of version {parent['version']}: "
            "lists of similar items change much with it.",
            "Expected where columns or settings changed. Whoever keeps vectors of the old version must fetch new ones.",
        )


def _training(history: list[dict[str, Any]]) -> Iterator[Finding]:
    if len(history) > 1:
        before, last = (m["validation"]["total"] for m in history[-2:])
        if last < 0.99 * before:
            yield Finding(
                False,
                f"The loss on validation rows still fell by {1 - last / before:.1%} in the last epoch.",
                "Train longer (epochs).",
            )


def _listed(names: Any, most: int = 6) -> str:
    told = list(names)
    return ", ".join(told[:most]) + (f" and {len(told) - most} more" if len(told) > most else "")
