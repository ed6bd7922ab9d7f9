"""Ray Serve with its defaults but for the number of replicas, and the plain application as its ingress."""

import signal
import tempfile

import ray
from fastapi import FastAPI
from ray import serve

from benchmarks.peers.films import Encoder, Films, arguments, workers

app = FastAPI()


@serve.deployment
@serve.ingress(app)
class Embed:
    def __init__(self, version: str) -> None:
        import os  # noqa: PLC0415 - in the replica

        os.environ["VERSION"] = version
        self._encoder = Encoder()

    @app.post("/embed")
    async def embed(self, films: Films) -> dict[str, list[list[float]]]:
        return {"embeddings": self._encoder.encode(films.input)}


if __name__ == "__main__":
    import os

    port = arguments()
    with tempfile.TemporaryDirectory(prefix="peer-") as folder:
        ray.init(address="local", include_dashboard=False, num_gpus=0, object_store_memory=80 << 20, _temp_dir=folder)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(Embed.options(num_replicas=workers()).bind(os.environ["VERSION"]))
        signal.sigwait({signal.SIGTERM, signal.SIGINT})
        ray.shutdown()
