import copy
import math

import numpy as np
import pyarrow as pa
import pytest
import torch

from itemvec.encoder import Decoder, EncoderConfig, ItemEncoder, finish, tensors
from itemvec.features import FeatureTransform
from itemvec.forward import FEW, Forward, gelu
from itemvec.schema import FeatureSchema

SCHEMA = FeatureSchema.from_yaml("""
name: t
id: id
features:
  color: {kind: nominal, min_count: 1}
  tags: {kind: multi, min_count: 1}
  name: {kind: text, buckets: 64}
  size: {kind: numeric, bins: 4}
""")
ITEMS = [
    {"id": str(i), "color": "rgb"[i % 3], "tags": [*"xyz"[: i % 4]], "name": f"item {i}", "size": i} for i in range(60)
]
TABLE = pa.Table.from_pylist(ITEMS)
TRANSFORM = FeatureTransform.fit(TABLE, SCHEMA)
BATCH = TRANSFORM.transform_table(TABLE)


def trained(**config):
    """An encoder whose every weight and buffer is drawn, as after training, and finished."""
    torch.manual_seed(0)
    network = ItemEncoder(EncoderConfig(**{"dim": 8, "embedding_dim": 16, "hidden": [24]} | config), TRANSFORM.layout)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
        network.train()
        for _ in range(3):
            network(*tensors(BATCH))  # running means and variances of batch normalization
        network.eval()
        z = network.uncentred(*tensors(BATCH)).double()
    decoder = Decoder(network.config, TRANSFORM.layout)
    finish(network, decoder, z.mean(0), torch.cov(z.T, correction=0))
    return network


@pytest.mark.parametrize(
    "config",
    [
        *({"activation": activation} for activation in ("relu", "gelu", "silu", "tanh", "sigmoid")),
        *({"normalization": normalization, "hidden": [24, 16]} for normalization in ("layer", "batch", "none")),
        {"hidden": []},
        {"hidden": [], "cross": 2},
        {"cross": 2, "cross_rank": 3},
        {"skip": False},
        {"centre": False},
        {"whiten": True},
        {"nested": [2, 4]},
        {"widths": {"tags": 3}},
    ],
    ids=str,
)
def test_the_network_that_serves_gives_the_vectors_of_the_one_that_learned(config):
    network = trained(**config)
    exact = copy.deepcopy(network).double()
    for n in (1, 2, len(BATCH)):
        batch = TRANSFORM.transform(ITEMS[:n]).batch
        assert (batch.lengths.size <= FEW) == (n < 60)  # both ways of adding up bags
        vectors = Forward(network)(batch)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, exact.encode(batch), atol=1e-6)


def test_without_bags_the_dense_columns_go_through():
    schema = FeatureSchema.from_yaml("name: t\nid: id\nfeatures: {size: {kind: numeric}}")
    transform = FeatureTransform.fit(TABLE, schema)
    network = ItemEncoder(EncoderConfig(dim=4), transform.layout).eval()
    batch = transform.transform_table(TABLE)
    np.testing.assert_allclose(Forward(network)(batch), network.encode(batch), atol=1e-6)
    nothing = transform.transform([]).batch
    assert Forward(network)(nothing).shape == (0, 4)


def test_an_item_of_no_direction_is_zero_and_not_nan():
    network = ItemEncoder(EncoderConfig(dim=4, hidden=[], centre=False), TRANSFORM.layout).eval()
    with torch.no_grad():
        network.out.weight.zero_()
        network.out.bias.zero_()
    batch = TRANSFORM.transform(ITEMS[:2]).batch
    assert Forward(network)(batch).tolist() == network.encode(batch).tolist() == [[0.0] * 4] * 2


@pytest.mark.parametrize("rows", [1, FEW + 1])
def test_gelu_is_exact_but_for_rounding(rows):
    x = np.concatenate([np.linspace(-9, 9, 4001), [-100, 100]]).astype(np.float32)
    exact = [float(v) * 0.5 * math.erfc(-float(v) * 2**-0.5) for v in x]
    np.testing.assert_allclose(gelu(np.repeat(x[None], rows, 0))[-1], exact, atol=4e-7, rtol=6e-8)
