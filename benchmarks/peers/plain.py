"""FastAPI and uvicorn. The work is done in the event loop: a thread pool would cost more than encoding an item."""

import uvicorn
from fastapi import FastAPI

from benchmarks.peers.films import Encoder, Films, arguments, workers


def make_app() -> FastAPI:
    app, encoder = FastAPI(), Encoder()

    @app.post("/embed")
    async def embed(films: Films) -> dict[str, list[list[float]]]:
        return {"embeddings": encoder.encode(films.input)}

    return app


if __name__ == "__main__":
    port = arguments()
    app = f"{__spec__.name}:make_app"  # by its name: each worker makes its own
    uvicorn.run(
        app, factory=True, workers=workers(), host="127.0.0.1", port=port, log_level="warning", access_log=False
    )
