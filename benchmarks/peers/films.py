"""What all peers share: the request of the examples' films, and the encoder."""

import os
import sys
from pathlib import Path

import torch
from pydantic import BaseModel

from itemvec.version import ModelVersion


class Film(BaseModel):
    title: str | None = None
    release_year: int | None = None
    age_rating: str | None = None
    runtime_minutes: float | None = None
    genres: list[str] | None = None
    directors: list[str] | None = None
    writers: list[str] | None = None
    cast: list[str] | None = None
    languages: list[str] | None = None
    countries: list[str] | None = None
    studios: list[str] | None = None


class Films(BaseModel):
    input: list[Film]


class Encoder:
    """The version of the variable VERSION, which a server's workers inherit."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._version = ModelVersion.load(Path(os.environ["VERSION"]))

    def encode(self, films: list[Film]) -> list[list[float]]:
        return self._version.encode([film.model_dump() for film in films]).vectors.tolist()


def arguments() -> int:
    """The port; leaves the folder in the environment."""
    port, os.environ["VERSION"] = sys.argv[1:3]
    return int(port)
