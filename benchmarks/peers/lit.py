"""LitServe with its batching: up to 64 requests that come within a millisecond."""

from typing import Any

import litserve

from benchmarks.peers.films import Encoder, Film, Films, arguments, workers


class Embed(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self._encoder = Encoder()

    def decode_request(self, request: Films) -> list[Film]:
        return request.input

    def predict(self, requests: list[list[Film]]) -> list[list[list[float]]]:
        vectors = iter(self._encoder.encode([film for films in requests for film in films]))
        return [[next(vectors) for _ in films] for films in requests]

    def encode_response(self, output: Any) -> dict[str, list[list[float]]]:
        return {"embeddings": output}


if __name__ == "__main__":
    port = arguments()
    server = litserve.LitServer(
        Embed(max_batch_size=64, batch_timeout=0.001, api_path="/embed"),
        accelerator="cpu",
        workers_per_device=workers(),
    )
    server.run(host="127.0.0.1", port=port, log_level="warning", generate_client_file=False, pretty_logs=False)
