"""A made-up film table whose columns follow from two hidden facts, so that there is something to learn."""

from datetime import date

import numpy as np
import pyarrow as pa

from itemvec.schema import FeatureSchema

SCHEMA = FeatureSchema.from_yaml(
    """
    name: films
    id: id
    features:
      title: {kind: text, buckets: 64}
      provider: {kind: nominal}
      genres: {kind: multi}
      cast: {kind: multi}
      rating: {kind: ordinal, order: [G, PG, PG-13, R]}
      year: {kind: numeric}
      released: {kind: timestamp}
    """
)
WORDS = (("star", "moon", "robot"), ("love", "heart", "rose"), ("gun", "heist", "night"))
GENRES = (("Sci-Fi", "Action"), ("Romance", "Drama"), ("Crime", "Thriller"))


def table(rows: int = 240, seed: int = 0) -> pa.Table:
    """Every film has one of three styles and one of two decades; a tenth of the values are missing."""
    rng = np.random.default_rng(seed)

    def or_missing(value):
        return None if rng.random() < 0.1 else value

    films = []
    for i in range(rows):
        style, decade = int(rng.integers(3)), int(rng.integers(2))
        year = 1990 + 20 * decade + int(rng.integers(10))
        films.append(
            {
                "id": f"film-{i}",
                "title": or_missing(" ".join(rng.choice(WORDS[style], 2))),
                "provider": or_missing(("Hulu", "Netflix")[decade]),
                "genres": or_missing(
                    [str(g) for g in rng.choice(GENRES[style], int(rng.integers(1, 3)), replace=False)]
                ),
                "cast": or_missing([f"actor {style}-{a}" for a in rng.choice(12, 3, replace=False)]),
                "rating": or_missing(("G", "PG", "PG-13", "R")[min(3, style + int(rng.integers(2)))]),
                "year": or_missing(float(year)),
                "released": or_missing(date(year, 1 + int(rng.integers(12)), 3)),
            }
        )
    return pa.Table.from_pylist(films)
