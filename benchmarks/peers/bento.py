"""BentoML with its adaptive batching."""

import os
import sys

import bentoml

from benchmarks.peers.films import Encoder, Film, arguments, workers


@bentoml.service(workers=workers())
class Films:
    def __init__(self) -> None:
        self._encoder = Encoder()

    @bentoml.api(batchable=True, max_batch_size=1024, max_latency_ms=60_000)
    def embed(self, input: list[Film]) -> list[list[float]]:  # noqa: A002 - the name is the request's field
        return self._encoder.encode(input)


if __name__ == "__main__":
    port = arguments()
    program = [sys.executable, "-m", "bentoml", "serve", "benchmarks.peers.bento:Films"]
    os.execv(sys.executable, [*program, "--host", "127.0.0.1", "--port", str(port)])  # noqa: S606
