"""A transform of one column `x`, and what it makes of one value."""

from typing import Any

import numpy as np
import pyarrow as pa

from itemvec.features import FeatureTransform
from itemvec.schema import FeatureSchema


def fitted(settings: str, column: Any) -> FeatureTransform:
    """`settings` as in a schema, without the braces: `kind: nominal, min_count: 1`."""
    schema = FeatureSchema.from_yaml(f"name: t\nid: id\nfeatures: {{x: {{{settings}}}}}")
    return FeatureTransform.fit(table(column), schema)


def table(column: Any) -> pa.Table:
    return pa.table({"id": pa.array(np.arange(len(column))), "x": column})


def bag(transform: FeatureTransform, value: Any) -> tuple[list[int], list[float]]:
    """Rows and weights of the value's bag."""
    batch = transform.transform([{"x": value}]).batch
    return batch.indices.tolist(), batch.weights.tolist()


def dense(transform: FeatureTransform, value: Any) -> list[float]:
    return transform.transform([{"x": value}]).batch.dense[0].tolist()


def status(transform: FeatureTransform, value: Any) -> str | None:
    return transform.transform([{"x": value}]).statuses[0].get("x")
