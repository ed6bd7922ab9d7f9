"""A real S3-speaking server (moto) on a free port, with one bucket."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
import s3fs
from moto.server import ThreadedMotoServer

BUCKET = "itemvec"


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[s3fs.S3FileSystem]:
    """Where every s3:// URL leads to during the test."""
    with served(monkeypatch) as files:
        yield files


@contextmanager
def served(patch: pytest.MonkeyPatch) -> Iterator[s3fs.S3FileSystem]:
    """The same for a block, and for the processes that start in it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1",
    }.items():  # fmt: skip
        patch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # they keep the server that they found first
    try:
        files = s3fs.S3FileSystem()
        files.mkdir(BUCKET)
        yield files
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        httpx.post(f"http://127.0.0.1:{port}/moto-api/reset")  # what it keeps outlives it in this process
        server.stop()
