"""What a description of a few columns finds: `python -m benchmarks.partial --out DIR` prints a table and leaves
results.json.

Films are asked for by some of their own columns, as an item and as a `partial` one (`service/similar.py`), among the
vectors of all films, exactly. `found`: the film itself is among the ten nearest. `shared`: the mean Jaccard index of
its labels and theirs, over the columns of sets that were asked. `columns`: how many the ten have, of 11; the nearest to
an item that lacks nearly all lack them, too.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from benchmarks.cache import EXAMPLES
from benchmarks.serving import show, train
from itemvec.registry import Registry
from itemvec.version import ModelVersion
from service.similar import without_empty

ASKED = (
    ["title"], ["genres"], ["directors"], ["cast"], ["title", "genres"], ["genres", "release_year"], ["genres", "cast"],
    ["title", "genres", "release_year", "directors", "cast", "countries"],
)  # fmt: skip
K = 10

Item = dict[str, Any]


def compare(
    version: ModelVersion, films: Sequence[Item], some: npt.NDArray[np.int64], columns: list[str]
) -> list[Item]:
    """One row for each way of asking for the films at the places `some`."""
    vectors = version.encode(films).vectors
    asked = version.encode([{name: films[i][name] for name in columns if films[i].get(name)} for i in some]).vectors
    ways = {"item": asked, "partial": without_empty(asked, version.encode([{}]).vectors[0])}
    return [{"asked by": ", ".join(columns), "as": way} | judged(films, some, columns, queries @ vectors.T)
            for way, queries in ways.items()]  # fmt: skip


def judged(
    films: Sequence[Item], some: npt.NDArray[np.int64], columns: Sequence[str], scores: npt.NDArray[np.float32]
) -> dict[str, float | str]:
    """(len(some), len(films)) scores."""
    near = np.argpartition(-scores, K, axis=1)[:, :K]
    sets = [name for name in columns if any(isinstance(film.get(name), list) for film in films)]
    shared = [
        len(mine & theirs) / len(mine | theirs)
        for i, row in zip(some, near, strict=True)
        for name in sets
        if (mine := {*(films[i].get(name) or ())})
        for theirs in ({*(films[j].get(name) or ())} for j in row)
    ]
    filled = np.array([sum(value not in (None, []) for value in film.values()) for film in films])
    return {
        "found": float((near == some[:, None]).any(1).mean()),
        "shared": float(np.mean(shared)) if shared else "",
        "columns": float(filled[near].mean()),
    }


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the results.")
@click.option("--registry", type=click.Path(path_type=Path, file_okay=False), help="Of a film model trained before.")
@click.option("--films", default=2000, show_default=True, type=click.IntRange(1), help="How many are asked for.")
def main(out: Path, registry: Path | None, films: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if registry is None:
        registry = out / "registry"
        if not registry.exists():
            train(registry, EXAMPLES / "movies.schema.yaml", epochs=None)
    version = Registry(registry).load("movies@champion")
    table = pq.read_table(EXAMPLES / "movies.parquet", columns=[f.name for f in version.schema.features])
    items = json.loads(json.dumps(table.to_pylist(), default=str))
    some = np.random.default_rng(0).choice(len(items), min(films, len(items)), replace=False)
    rows = [row for columns in ASKED for row in compare(version, items, some, columns)]
    settings = {"model": f"{version.ref} {version.fingerprint}", "films": len(some), "of": len(items), "k": K}
    settings["epochs"] = version.manifest.lineage.config["epochs"]
    click.echo(json.dumps(settings))
    show("descriptions", rows)
    (out / "results.json").write_text(json.dumps(settings | {"descriptions": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
