"""Serving against its peers and its own limits: `python -m benchmarks.serving --out DIR` prints tables and leaves
results.json, serving.png and the servers' logs.

    encode   one item a request at 1, 16 and 64 connections: itemvec, and the same trained encoder behind FastAPI and
             uvicorn, BentoML, LitServe and Ray Serve's defaults; all are up at once and take turns, medians of rounds
    bulk     1,024 items a request, over two connections; and the share of what encoding alone does in one process
    similar  neighbors by id over HTTP against the bare HGET and FT.SEARCH; recall@10; memory
    load     bulk upserts over HTTP, and the store alone against Redis alone that takes the same writes
    growth   latency by items a request and by the size of the vocabulary, throughput and memory by replicas

Throughput is wrk's. Latencies are those of requests that are due at an even rate (`benchmarks/_load.py`), for all
servers the same: half of what the plain application takes at so many connections.

The peers' packages are in benchmarks/requirements.txt, for an environment with itemvec of their own (--peer-python).
A peer that does not start is named, and the others go on.
"""

import asyncio
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import redis
import torch

from benchmarks import _services as services
from benchmarks import store as store_alone
from benchmarks._load import Requests, Target, flood, needs_wrk, offer
from benchmarks.cache import EXAMPLES
from itemvec.encoder import Decoder, EncoderConfig, ItemEncoder
from itemvec.features import FeatureTransform
from itemvec.registry import Registry
from itemvec.schema import FeatureSchema
from itemvec.version import Lineage, ModelVersion
from service.arrow import STREAM
from service.index import Mode
from service.redis_server import EmbeddedRedis
from service.runtime import stop_signals
from service.store import Store

SECTIONS = ("encode", "bulk", "similar", "load", "growth")
CONNECTIONS = (1, 16, 64)
BULK = 1024
K = 10
PEERS = {"plain": "FastAPI + uvicorn", "bento": "BentoML", "lit": "LitServe", "ray_serve": "Ray Serve, defaults"}
DIRECT = "itemvec, direct_port"
EXTRA = ("bento", "lit")
"""Those whose packages are not ours."""

Row = dict[str, Any]


class Bench:
    """What all sections need: the films, a registry with a trained encoder, and how long to measure."""

    def __init__(self, out: Path, registry: Path, peer_python: str, quick: bool, rounds: int = 5) -> None:
        self.out, self.registry, self.peer_python, self.quick = out, registry, peer_python, quick
        self.rounds, self.seconds = (1, 2.0) if quick else (rounds, 4.0)
        self.version = Registry(registry).load("movies@champion")
        self.folder = registry / "movies" / "versions" / str(self.version.version)
        names = [feature.name for feature in self.version.schema.features]
        self.table = pq.read_table(EXAMPLES / "movies.parquet")
        self.columns = self.table.select(names)
        self.ids = [str(film) for film in self.table["id"].to_pylist()]
        self.items: list[Row] = json.loads(json.dumps(self.columns.to_pylist(), default=str))

    def bodies(self, size: int, **options: object) -> Requests:
        starts = range(0, len(self.items) - size + 1, size)
        return Requests([json.dumps({"input": self.items[i : i + size], **options}).encode() for i in starts])

    def arrow_bodies(self, size: int) -> Requests:
        return Requests([_stream(self.columns.slice(i, size)) for i in range(0, len(self.items) - size + 1, size)])

    def serve(
        self, name: str = "itemvec", environment: Mapping[str, str] | None = None, **options: object
    ) -> contextlib.AbstractContextManager[tuple[int, "subprocess.Popen[bytes]"]]:
        return services.itemvec(name, self.out / name, str(self.registry), environment, **options)


def train(registry: Path) -> None:
    """Short: the quality of the encoder is not what is measured here."""
    command = [sys.executable, "-m", "itemvec", "train", str(EXAMPLES / "movies.parquet"), "--epochs", "2", "--promote"]
    schema = str(EXAMPLES / "movies.schema.yaml")
    subprocess.run([*command, "--schema", schema, "--registry", str(registry)], check=True)


# --- one item and many, against the peers -----------------------------------------------------------------------------


@contextlib.contextmanager
def all_up(bench: Bench) -> Iterator[dict[str, Target]]:
    """Name -> where it encodes, of all that start."""
    with contextlib.ExitStack() as stack:
        direct = services.free_port()
        port, _ = stack.enter_context(bench.serve(environment={"ITEMVEC_DIRECT_PORT": str(direct)}))
        targets = {name: Target(at, "/v1/embeddings") for name, at in (("itemvec", port), (DIRECT, direct))}
        for name, title in PEERS.items():
            python = bench.peer_python if name in EXTRA else sys.executable
            try:
                port = stack.enter_context(services.peer(name, python, bench.folder, bench.out / name))
            except RuntimeError as error:
                click.echo(f"{title} is missing: {str(error).strip().splitlines()[-1]}", err=True)
            else:
                targets[title] = Target(port, "/embed")
        first = bench.bodies(1).take()
        for name, target in targets.items():
            answer = httpx.post(f"http://127.0.0.1:{target.port}{target.path}", content=first, headers=_headers(target))
            assert answer.status_code == 200, (name, answer.text)
        yield targets


def encode(bench: Bench, targets: Mapping[str, Target]) -> list[Row]:
    requests = bench.bodies(1)
    rows = []
    for connections in CONNECTIONS:
        for target in targets.values():
            flood(target, requests, connections, 1.0)
        rates = _rounds(bench, targets, lambda target, n=connections: flood(target, requests, n, bench.seconds))  # type: ignore[misc]
        offered = rates[PEERS["plain"]] / 2 if PEERS["plain"] in rates else rates["itemvec"] / 4
        p50, p99, late = {}, {}, {}
        for name, target in targets.items():
            waits = [offer(target, requests, connections, offered, bench.seconds) for _ in range(bench.rounds)]
            p50[name], p99[name] = (statistics.median(wait.at(p) * 1e3 for wait in waits) for p in (50, 99))
            late[name] = sum(wait.unanswered for wait in waits)
        for name in targets:
            row = {"server": name, "connections": connections, "requests/s": rates[name], "offered/s": offered}
            rows.append(row | {"p50 ms": p50[name], "p99 ms": p99[name], "unanswered": late[name]})
    return rows


def bulk(bench: Bench, targets: Mapping[str, Target]) -> list[Row]:
    def rate(target: Target, requests: Requests) -> float:
        return flood(target, requests, 2, bench.seconds) * BULK

    ours = targets["itemvec"]
    stream = Target(ours.port, ours.path, STREAM.decode())
    floats, base64, arrow = bench.bodies(BULK), bench.bodies(BULK, encoding_format="base64"), bench.arrow_bodies(BULK)
    ways: dict[str, Callable[[], float]] = {
        "itemvec, JSON floats": lambda: rate(ours, floats),
        "itemvec, base64": lambda: rate(ours, base64),
        "itemvec, Arrow": lambda: rate(stream, arrow),
        "in process, items": lambda: _alone(bench, lambda at: bench.version.encode(bench.items[at : at + BULK])),
        "in process, Arrow": lambda: _alone(
            bench, lambda at: bench.version.encode_arrow(bench.columns.slice(at, BULK))
        ),
    }
    peers = {name: target for name, target in targets.items() if name in PEERS.values()}
    ways |= {name: lambda target=t: rate(target, floats) for name, t in peers.items()}  # type: ignore[misc]
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(bench.rounds + 1):
        for name, way in ways.items():
            found = way()
            if number:  # the first is to warm up
                rates[name].append(found)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    rows = []
    for name, found in medians.items():
        limit = medians["in process, Arrow" if name.endswith("Arrow") else "in process, items"]
        rows.append({"way": name, "items/s": found, "share of the limit": found / limit})
    return rows


def _alone(bench: Bench, work: Callable[[int], object]) -> float:
    began, items = time.perf_counter(), 0
    while time.perf_counter() - began < bench.seconds / 2:
        work(items % (len(bench.items) - BULK))
        items += BULK
    return items / (time.perf_counter() - began)


# --- neighbors and writes ---------------------------------------------------------------------------------------------


def similar(bench: Bench) -> list[Row]:
    """Items are films, many times, each with a little noise."""
    sizes = (10_000, 100_000) if bench.quick else (10_000, 100_000, 1_000_000)
    films = bench.version.encode_arrow(bench.columns).vectors
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(folder) as server:
            mode: Mode = "flat" if size < 50_000 else "hnsw"
            began = time.perf_counter()
            matrix = asyncio.run(_fill(bench, server.url, films, size, mode))
            filled = time.perf_counter() - began
            with bench.serve(f"similar-{size}", redis_url=server.url) as (port, _):
                memory = _used_memory(server.url) / size
                row = _compare(bench, server.url, Target(port, "/v1/similar"), matrix, mode)
                rows.append({"items": size, "mode": mode, **row, "bytes an item": memory, "filled in s": filled})
    return rows


async def _fill(bench: Bench, url: str, films: store_alone.Vectors, size: int, mode: Mode) -> store_alone.Vectors:
    rng, version = np.random.default_rng(0), bench.version
    source = rng.integers(len(films), size=size)
    matrix = films[source] + 0.05 * rng.standard_normal((size, version.dim)).astype(np.float32)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    async with Store(url, index=mode, bulk_timeout=60.0) as store:
        await store.indexes.ensure(version.name, version.fingerprint, version.dim, size, mode)
        await store.mark_live(version.name, version.fingerprint, version.ref)
        for start in range(0, size, 4096):
            some = range(start, min(start + 4096, size))
            ids = [f"item {i}" for i in some]
            await store.put(version.name, ids, [b"{}"] * len(ids), {version.fingerprint: matrix[start : start + 4096]})
        await store.mark_ready(version.name, version.fingerprint)
    return matrix


def _used_memory(url: str) -> float:
    with redis.Redis.from_url(url) as client:
        return float(client.info("memory")["used_memory"])


def _compare(bench: Bench, url: str, target: Target, matrix: store_alone.Vectors, mode: Mode) -> Row:
    """One caller at a time, over HTTP and bare, in turns; microseconds."""
    asked = np.random.default_rng(1).integers(len(matrix), size=200 if bench.quick else 2000)
    fingerprint, effort = bench.version.fingerprint, " EF_RUNTIME 100" if mode == "hnsw" else ""
    times: dict[str, list[float]] = {"http": [], "bare": []}
    hits = 0
    with (
        redis.Redis.from_url(url, protocol=3) as client,
        httpx.Client(base_url=f"http://127.0.0.1:{target.port}") as http,
    ):
        index = next(name for name in client.execute_command("FT._LIST") if fingerprint.encode() in name)
        keys = {key.rpartition(b":")[2]: key for key in client.scan_iter("iv:vec:*", count=5000)}
        for i in asked:
            began = time.perf_counter()
            answer = http.post(target.path, json={"id": f"item {i}", "k": K})
            times["http"].append((time.perf_counter() - began) * 1e6)
            assert answer.status_code == 200, answer.text
            near = {int(neighbor["id"].split()[1]) for neighbor in answer.json()["neighbors"]}
            scores = matrix @ matrix[i]
            scores[i] = -np.inf
            hits += len(near & set(np.argpartition(-scores, K)[:K].tolist()))
            began = time.perf_counter()
            vector = client.execute_command("HGET", keys[f"item {i}".encode()], "v")
            client.execute_command(
                "FT.SEARCH", index, f"*=>[KNN {K + 1} @v $q{effort} AS d]", "RETURN", 1, "d",
                "LIMIT", 0, K + 1, "DIALECT", 2, "PARAMS", 2, "q", vector,
            )  # fmt: skip
            times["bare"].append((time.perf_counter() - began) * 1e6)
    told = {f"{who} p{p} us": float(np.percentile(found, p)) for who, found in times.items() for p in (50, 99)}
    return {"recall@10": hits / (K * len(asked)), **told}


def load(bench: Bench) -> list[Row]:
    """Items a second."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(folder) as server:
        modes: tuple[Mode, ...] = ("flat", "hnsw", "exact")
        for found in (asyncio.run(store_alone.load(server.url, mode)) for mode in modes):
            rows.append({"way": f"store, {found['mode']}", "items/s": found["store"], "Redis alone": found["redis"]})
            rows[-1]["share"] = found["share"]
    entries = [{**item, "id": item_id} for item, item_id in zip(bench.items, bench.ids, strict=True)]
    starts = range(0, len(entries) - BULK + 1, BULK)
    bodies = Requests([json.dumps({"items": entries[i : i + BULK]}).encode() for i in starts])
    with bench.serve("load") as (port, _):
        target = Target(port, "/v1/items")
        flood(target, bodies, 2, 1.0)
        rates = [flood(target, bodies, 2, bench.seconds) * BULK for _ in range(bench.rounds)]
    return [*rows, {"way": "HTTP, encoded and stored (flat)", "items/s": statistics.median(rates)}]


# --- growth -----------------------------------------------------------------------------------------------------------


def growth(bench: Bench) -> list[Row]:
    rows: list[Row] = []
    one = bench.bodies(1)
    for replicas in (1, 2):
        with bench.serve(f"replicas-{replicas}", replicas=replicas) as (port, process):
            target = Target(port, "/v1/embeddings")
            flood(target, one, 16, 2.0)
            rates = [flood(target, one, 16, bench.seconds) for _ in range(bench.rounds)]
            memory = statistics.mean(services.memory_of(process, "ray::ServeReplica") or [float("nan")])
            row = {"what": f"{replicas} replicas", "requests/s": statistics.median(rates), "MB a replica": memory}
            rows.append(row)
            for size in (1, 8, 64, 512, 4096) if replicas == 1 else ():
                bodies = bench.bodies(size, encoding_format="base64")
                count = max(5, min(200, int(4000 / size)))
                with httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
                    times = [_timed(lambda: http.post(target.path, content=bodies.take(), headers=_headers(target)))  # noqa: B023
                             for _ in range(count)]  # fmt: skip
                rows.append({"what": f"{size} items a request", "ms": statistics.median(times) * 1e3})
    for labels in (1_000, 30_000, 300_000):
        version, items = _wide(labels)
        times = [_timed(lambda: version.encode([items[i % len(items)]])) for i in range(2000)]  # noqa: B023
        rows.append({"what": f"{labels:,} labels, one item in process", "ms": statistics.median(times) * 1e3})
    return rows


def _wide(labels: int) -> tuple[ModelVersion, list[Row]]:
    """An untrained version with one set column of so many labels: weights do not change the time."""
    schema = FeatureSchema.from_yaml("{name: wide, id: id, features: {tags: {kind: multi, min_count: 1}}}")
    tags = [[f"label {(17 * i + j) % labels}" for j in range(8)] for i in range(labels)]
    transform = FeatureTransform.fit(pa.table({"id": [str(i) for i in range(labels)], "tags": tags}), schema)
    config = EncoderConfig()
    lineage = Lineage(table="made", table_sha256="0" * 64, table_rows=labels, train_rows=labels, config={})
    encoder, decoder = ItemEncoder(config, transform.layout), Decoder(config, transform.layout)
    version = ModelVersion.make("wide", 1, transform, encoder, decoder, {}, lineage)
    order = np.random.default_rng(0).permutation(labels)[:2000]
    return version, [{"tags": tags[i]} for i in order]


# --- helpers ----------------------------------------------------------------------------------------------------------


def _rounds(bench: Bench, targets: Mapping[str, Target], measure: Callable[[Target], float]) -> dict[str, float]:
    """Medians, of rounds in which the servers take turns."""
    found: dict[str, list[float]] = {name: [] for name in targets}
    for _ in range(bench.rounds):
        for name, target in targets.items():
            found[name].append(measure(target))
    return {name: statistics.median(rates) for name, rates in found.items()}


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _headers(target: Target) -> dict[str, str]:
    return {"content-type": target.content_type}


def _stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def show(title: str, rows: Sequence[Row]) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [columns, *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    click.echo(f"\n{title}")
    for row in cells:
        click.echo("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Throughput and p99 of one item a request."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - it is slow to import

    figure = Figure(figsize=(11, 4), layout="constrained")
    servers = list(dict.fromkeys(row["server"] for row in rows))
    for axes, column in zip(figure.subplots(1, 2), ("requests/s", "p99 ms"), strict=True):
        for i, server in enumerate(servers):
            mine = [row for row in rows if row["server"] == server]
            places = np.arange(len(mine)) + (i - (len(servers) - 1) / 2) * 0.8 / len(servers)
            axes.bar(places, [row[column] for row in mine], 0.8 / len(servers), label=server)
        axes.set_xticks(range(len(CONNECTIONS)), [f"{n} connections" if n > 1 else "1 connection" for n in CONNECTIONS])
        axes.set_title(f"{column}, one item a request")
        axes.set_yscale("log")
    axes.legend()
    figure.savefig(path, dpi=120)


def run(bench: Bench, wanted: Sequence[str]) -> None:
    packages = ("torch", "ray", "uvicorn", "fastapi", "redis")
    found: Row = {
        "machine": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version(),
        "versions": {name: version_of(name) for name in packages}, "rounds": bench.rounds, "seconds": bench.seconds,
        "load average before": os.getloadavg(),
    }  # fmt: skip
    click.echo(json.dumps(found))
    if {"encode", "bulk"} & set(wanted):
        with all_up(bench) as targets:
            for section in (encode, bulk):
                if section.__name__ in wanted:
                    found[section.__name__] = section(bench, targets)
                    show(section.__name__, found[section.__name__])
    for section in (similar, load, growth):
        if section.__name__ in wanted:
            found[section.__name__] = section(bench)
            show(section.__name__, found[section.__name__])
    if "encode" in found:
        draw(found["encode"], bench.out / "serving.png")
    found["load average after"] = os.getloadavg()
    (bench.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    click.echo(f"\nload average after: {found['load average after']}; results in {bench.out}")


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the results.")
@click.option("--registry", type=click.Path(path_type=Path, file_okay=False), help="Of a film model trained before.")
@click.option("--peer-python", default=sys.executable, help="The interpreter that has BentoML and LitServe.")
@click.option("--only", default=",".join(SECTIONS), show_default=True, help="Sections.")
@click.option(
    "--rounds", type=click.IntRange(1), default=5, show_default=True, help="Of which each figure is the median."
)
@click.option("--quick", is_flag=True, help="One short round, up to 100,000 items: to see that it runs.")
def main(out: Path, registry: Path | None, peer_python: str, only: str, rounds: int, quick: bool) -> None:
    needs_wrk()
    wanted = only.split(",")
    if unknown := set(wanted) - set(SECTIONS):
        raise click.BadParameter(f"no such section: {', '.join(sorted(unknown))}", param_hint="--only")
    torch.set_num_threads(1)
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    if registry is None:
        registry = out / "registry"
        if not registry.exists():
            train(registry)
    with stop_signals():  # whoever ends it, the servers end with it
        run(Bench(out, registry.absolute(), peer_python, quick, rounds), wanted)


if __name__ == "__main__":
    main()
