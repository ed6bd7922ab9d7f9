"""A table of as many films as one likes, and how much memory a process and all that it started hold."""

import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

BLOCK = 131_072
STRANGER = 0.2
"""Share of values that come from another film."""

GENERATION = 200
"""Copies of all films after which new people and studios take over: six times as many of them on 20 million rows."""

PEOPLE = ("directors", "writers", "cast", "studios")


def blocks(films: pa.Table, rows: int, seed: int = 0) -> Iterator[pa.Table]:
    """`rows` made-up films: each is one of `films`, some of its values are another's, and its numbers are shifted."""
    rng = np.random.default_rng(seed)
    for start in range(0, rows, BLOCK):
        at = np.arange(start, min(start + BLOCK, rows))
        films_of, generation = at % len(films), at // len(films) // GENERATION
        made: dict[str, Any] = {"id": pa.array([f"film {i}" for i in at])}
        for name in films.column_names[1:]:
            strange = rng.random(len(at)) < STRANGER
            source = np.where(strange, rng.integers(len(films), size=len(at)), films_of)
            column = films.column(name).combine_chunks().take(pa.array(source))
            if pa.types.is_integer(column.type):
                column = pc.add(column, pa.array(rng.integers(-2, 3, size=len(at)), column.type))
            made[name] = _of_generation(column, generation) if name in PEOPLE else column
        yield pa.table(made)


def _of_generation(lists: pa.Array, generation: Any) -> pa.Array:
    """Names of a later generation have its number behind them."""
    owner = pc.list_parent_indices(lists).to_numpy()
    number = pa.array(np.array(["", *(f" {g}" for g in range(2, 2 + int(generation.max(initial=0))))])[generation])
    names = pc.binary_join_element_wise(pc.list_flatten(lists), number.take(pa.array(owner)), "")
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, names, mask=lists.is_null())


def write_films(films: pa.Table, rows: int, path: Path) -> None:
    """As Parquet, block by block."""
    with pq.ParquetWriter(path, next(blocks(films, 1)).schema) as writer:
        for block in blocks(films, rows):
            writer.write_table(block)


def watched(command: Sequence[str], log: Path, every: float = 2.0) -> dict[str, Any]:
    """Runs a command, its output in `log`; seconds, and the most GiB that it and all processes below it held at once:
    `pss`, shared pages by parts, and `own`, the same without mapped files, which the system takes back when it must."""
    began, most = time.monotonic(), {"pss": 0.0, "own": 0.0}
    with log.open("a") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            held = memory(process.pid)
            most = {name: max(most[name], held[name]) for name in most}
            file.write(f"{time.monotonic() - began:.0f} s: {held['pss']:.2f} GiB, own {held['own']:.2f}\n")
            file.flush()
            time.sleep(every)
    return {"status": process.returncode, "seconds": time.monotonic() - began, **most}


def memory(root: int) -> Mapping[str, float]:
    """GiB of a process and all below it."""
    held = {"pss": 0.0, "own": 0.0}
    for pid in _below(root):
        try:
            told = dict(re.findall(r"^(\w+): +(\d+) kB$", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # ended meanwhile
        if told:
            held["pss"] += int(told["Pss"]) / 2**20
            held["own"] += (int(told["Pss"]) - int(told["Pss_File"])) / 2**20
    return held


def _below(root: int) -> list[int]:
    parents = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found
