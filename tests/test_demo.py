"""`itemvec demo` as the README promises it, but for the training: an untrained model of the films is there already."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from liveservice import LiveService

from benchmarks._services import free_port
from itemvec.client import Client
from itemvec.encoder import Decoder, EncoderConfig, ItemEncoder
from itemvec.features import FeatureTransform
from itemvec.registry import Registry
from itemvec.schema import FeatureSchema
from itemvec.table import read_table
from itemvec.version import Lineage, ModelVersion
from service.demo import FILMS, load
from service.redis_server import EmbeddedRedis

EXAMPLES = Path(__file__).parents[1] / "examples"


def demo(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "itemvec", "demo", *map(str, words)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ITEMVEC_", "REDIS_URL"))}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=150)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_demo_loads_every_film_finds_them_again_after_a_restart_and_shows_neighbors(tmp_path, capsys):
    schema = FeatureSchema.load(EXAMPLES / "movies.schema.yaml")
    transform = FeatureTransform.fit(read_table(str(EXAMPLES / "movies.parquet")), schema)
    torch.manual_seed(0)
    config = EncoderConfig(dim=16, hidden=(16,))
    encoder, decoder = ItemEncoder(config, transform.layout), Decoder(config, transform.layout)
    lineage = Lineage(table="movies.parquet", table_sha256="0" * 64, table_rows=17_470, train_rows=17_470, config={})

    def write(folder: Path, version: int) -> None:
        ModelVersion.make("movies", version, transform, encoder, decoder, {}, lineage).save(folder, [])

    Registry(tmp_path / "registry").publish("movies", write, alias="champion")
    # The first time as the demo does it, but in this process, which is sooner ready; the second time is the command.
    with (
        EmbeddedRedis(tmp_path / "redis") as redis,
        LiveService(tmp_path / "registry", redis.url, model="movies").up() as service,
        Client(service.url) as client,
    ):
        load(client, EXAMPLES / "movies.parquet")
    assert "17470 films encoded and stored" in capsys.readouterr().out
    again = demo("--once", "--data-dir", tmp_path, "--port", free_port())
    assert again.returncode == 0, again.stdout + again.stderr
    assert "using movies@1" in again.stdout
    assert "17470 items are in the store already" in again.stdout
    assert all(title in again.stdout for title in FILMS.values())
    assert "Traceback" not in again.stderr


def test_a_port_in_use_is_one_line_that_says_what_to_do(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = demo("--once", "--data-dir", tmp_path, "--port", port)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"port {port}" in done.stderr and "--port" in done.stderr
