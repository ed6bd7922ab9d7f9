import copy
import math

import numpy as np
import pyarrow as pa
import pytest
import torch

from itemvec import forward
from itemvec.encoder import Decoder, EncoderConfig, ItemEncoder, finish, tensors
from itemvec.features import FeatureTransform
from itemvec.forward import FEW, Forward, gelu
from itemvec.schema import FeatureSchema

columns = Forward._columns

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
        vectors = Forward(network)(batch)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, exact.encode(batch), atol=1e-6)


@pytest.mark.parametrize("config", [{}, {"hidden": []}, {"skip": False}], ids=str)
@pytest.mark.parametrize("without", ["room", "few rows"])
def test_without_the_worked_out_layer_the_vectors_are_the_same(config, without, monkeypatch):
    network = trained(**config)
    batches = [TRANSFORM.transform(ITEMS[:n]).batch for n in (1, 2, len(BATCH))]
    usual = [Forward(network)(batch) for batch in batches]
    taken = []
    monkeypatch.setattr(Forward, "_columns", lambda self, batch: taken.append(len(batch)) or columns(self, batch))
    monkeypatch.setattr(forward, *(("WORKED_OUT", 0) if without == "room" else ("FEW_ROWS", 3)))
    for batch, vectors in zip(batches, usual, strict=True):
        np.testing.assert_allclose(Forward(network)(batch), vectors, atol=1e-6)
    assert taken == [1, 2, len(BATCH)]


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


@pytest.mark.parametrize(("rows", "atol", "rtol"), [(1, 4e-7, 6e-8), (FEW + 1, 2e-6, 1e-6)])
def test_gelu_is_exact_but_for_rounding(rows, atol, rtol):
    """Torch's, of many rows, is off by 8e-7 on a processor with AVX-512."""
    x = np.concatenate([np.linspace(-9, 9, 4001), [-100, 100]]).astype(np.float32)
    exact = [float(v) * 0.5 * math.erfc(-float(v) * 2**-0.5) for v in x]
    np.testing.assert_allclose(gelu(np.repeat(x[None], rows, 0))[-1], exact, atol=atol, rtol=rtol)
