import random

import numpy as np
import pyarrow as pa
import pytest
import torch

from itemvec.encoder import Cross, Decoder, EncoderConfig, ItemEncoder, finish, tensors
from itemvec.errors import ConfigError
from itemvec.features import FIRST, FeatureTransform
from itemvec.schema import FeatureSchema

SCHEMA = FeatureSchema.from_yaml("""
name: t
id: id
features:
  color: {kind: nominal, min_count: 1}
  tags: {kind: multi, min_count: 1}
  size: {kind: numeric, bins: 0}
""")
TABLE = pa.table(
    {
        "id": list("abcd"),
        "color": list("rgbr"),
        "tags": [["x"], ["x", "y"], [], ["z"]],
        "size": [1.0, 2, 3, 4],
    }
)
TRANSFORM = FeatureTransform.fit(TABLE, SCHEMA)
BATCH = TRANSFORM.transform_table(TABLE)


def encoder(**config):
    torch.manual_seed(0)
    return ItemEncoder(EncoderConfig(dim=8, **{"embedding_dim": 32} | config), TRANSFORM.layout).eval()


def test_vectors_have_length_one():
    vectors = encoder().encode(BATCH)
    assert vectors.shape == (4, 8) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_an_item_alone_gets_the_vector_it_gets_among_others():
    network, items = encoder(), TABLE.select(["color", "tags", "size"]).to_pylist()
    together = network.encode(BATCH)
    alone = np.concatenate([network.encode(TRANSFORM.transform([item]).batch) for item in items])
    np.testing.assert_allclose(alone, together, atol=1e-6)


def test_the_linear_encoder_is_the_sum_of_its_rows_by_hand():
    # z = out(concat(color's row, mean-free sum of the tags' rows / sqrt(n), size and its flag))
    network = encoder(hidden=(), centre=False, embedding_dim=4)
    color, tags = TRANSFORM.layout.bags
    color_part = network.table[color.base + TRANSFORM.column("color").vocabulary.row("g"), : _width(network, 0)]
    x, y = (TRANSFORM.column("tags").vocabulary.row(t) for t in "xy")
    tags_part = (network.table[tags.base + x] + network.table[tags.base + y])[: _width(network, 1)] / 2**0.5
    size_part = torch.tensor([(2 - 2.5) / np.std([1, 2, 3, 4]), 0.0], dtype=torch.float32)
    z = network.out(torch.cat([color_part, tags_part, size_part]))
    expected = (z / z.norm()).detach().numpy()
    np.testing.assert_allclose(network.encode(BATCH)[1], expected, atol=1e-6)


def _width(network, column):
    width = network.config.embedding_dim
    return int(((network.used >= column * width) & (network.used < (column + 1) * width)).sum())


def test_centring_subtracts_the_mean_before_the_length_is_made_one():
    network = encoder(centre=True)
    with torch.no_grad():
        z = network.uncentred(*tensors(BATCH))
        network.mean.copy_(z.mean(0))
    assert np.abs(network.encode(BATCH).mean(0)).max() < np.abs(encoder(centre=False).encode(BATCH).mean(0)).max()
    expected = torch.nn.functional.normalize(z - z.mean(0), dim=1)
    np.testing.assert_allclose(network.encode(BATCH), expected.numpy(), atol=1e-6)


def test_encoding_leaves_a_training_network_in_training():
    network = encoder().train()
    network.encode(BATCH)
    assert network.training


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh", "sigmoid"])
@pytest.mark.parametrize("normalization", ["layer", "batch", "none"])
def test_every_shape_of_network_trains_and_encodes(activation, normalization):
    network = encoder(activation=activation, normalization=normalization, hidden=(16, 16)).train()
    network(*tensors(BATCH)).sum().backward()
    assert torch.isfinite(network.table.grad).all()
    assert np.isfinite(network.encode(BATCH)).all()


def test_widths_by_hand_go_before_the_rule():
    network = encoder(embedding_dim=16, widths={"tags": 7})
    by_rule = encoder(embedding_dim=16)
    assert (_width(network, 0), _width(network, 1)) == (_width(by_rule, 0), 7)
    assert network.encode(BATCH).shape == (4, 8)


def test_widths_of_a_column_that_is_not_there_or_wider_than_the_table_are_refused():
    with pytest.raises(ConfigError, match=r"names colour; the columns with rows in the table are color, tags"):
        encoder(widths={"colour": 3})
    with pytest.raises(ValueError, match=r"beyond embedding_dim \(16\): {'tags': 17}"):
        EncoderConfig(embedding_dim=16, widths={"tags": 17})


def test_a_cross_layer_multiplies_columns_by_hand():
    # x = (2, 3): narrow takes their sum 5, wide gives (5 + 1, 0 + 1), times the columns (12, 3), and x is added.
    cross = Cross(2, 1)
    columns = torch.tensor([[2.0, 3.0]])
    assert cross(columns, columns).tolist() == [[2.0, 3.0]], "the identity, until it is trained"
    with torch.no_grad():
        cross.narrow.weight.copy_(torch.tensor([[1.0, 1.0]]))
        cross.wide.weight.copy_(torch.tensor([[1.0], [0.0]]))
        cross.wide.bias.fill_(1.0)
    assert cross(columns, columns).tolist() == [[14.0, 6.0]]


def test_cross_layers_are_part_of_the_network():
    network = encoder(cross=2, hidden=()).train()
    network(*tensors(BATCH))[:, 0].sum().backward()
    assert all(layer.wide.weight.grad.abs().sum() > 0 for layer in network.cross)


def finished(**config) -> tuple[ItemEncoder, Decoder, torch.Tensor]:
    """Encoder and decoder after `finish` with the statistics of 300 made-up items, and those items as a batch."""
    network = encoder(**config)
    torch.manual_seed(1)
    decoder = Decoder(network.config, TRANSFORM.layout).eval()
    draw = random.Random(0)  # noqa: S311
    items = [
        {"color": draw.choice("rgb"), "tags": draw.sample("xyz", 2), "size": 4 * draw.random()} for _ in range(300)
    ]
    batch = TRANSFORM.transform(items).batch
    with torch.no_grad():
        z = network.uncentred(*tensors(batch)).double()
    finish(network, decoder, z.mean(0), torch.cov(z.T, correction=0))
    return network, decoder, batch


def spread(network: ItemEncoder, batch) -> torch.Tensor:
    """(dim, dim) covariance of the vectors before their length is made 1."""
    with torch.no_grad():
        return torch.cov(network.unscaled(*tensors(batch)).double().T, correction=0)


@pytest.mark.parametrize("hidden", [(), (64,)])
def test_finishing_orders_numbers_by_variance_and_changes_no_angle(hidden):
    network, _, batch = finished(hidden=hidden)
    before = encoder(hidden=hidden)
    before.mean.copy_(before.uncentred(*tensors(batch)).mean(0).detach())
    old, new = before.encode(batch), network.encode(batch)
    np.testing.assert_allclose(new @ new.T, old @ old.T, atol=1e-4)
    assert not np.allclose(new, old, atol=0.1)
    covariance = spread(network, batch)
    variance = covariance.diagonal()
    assert (variance.diff() <= 1e-6).all()
    assert (covariance - variance.diag()).abs().max() < 1e-4 * variance[0]


def test_trained_prefixes_stay_where_they_are():
    network, _, batch = finished(nested=(2, 4))
    before = encoder(nested=(2, 4))
    before.mean.copy_(before.uncentred(*tensors(batch)).mean(0).detach())
    np.testing.assert_allclose(network.encode(batch), before.encode(batch), atol=1e-5)


@pytest.mark.parametrize("nested", [(), (2, 4)])
def test_whitened_numbers_have_variance_one_and_no_correlation(nested):
    network, _, batch = finished(whiten=True, nested=nested)
    covariance = spread(network, batch)
    # Directions with hardly any spread stay narrow, the others have v / (v + what is added).
    used = torch.linalg.eigvalsh(covariance)
    assert used.max() <= 1 + 1e-4 and (used > 0.9).sum() >= 4
    assert (covariance - covariance.diagonal().diag()).abs().max() < 0.05
    np.testing.assert_allclose(np.linalg.norm(network.encode(batch), axis=1), 1, atol=1e-6)


def test_a_whitened_prefix_follows_from_the_same_trained_prefix():
    plain, _, batch = finished(nested=(2, 4))
    white, _, _ = finished(nested=(2, 4), whiten=True)
    old, new = (network.unscaled(*tensors(batch)).detach().numpy() for network in (plain, white))
    factor, *_ = np.linalg.lstsq(old[:, :4], new[:, :4], rcond=None)
    np.testing.assert_allclose(old[:, :4] @ factor, new[:, :4], atol=1e-3)


@pytest.mark.parametrize("config", [{}, {"whiten": True}, {"whiten": True, "nested": (2, 4)}])
def test_the_decoder_reads_finished_vectors_as_it_was_trained(config):
    network, decoder, batch = finished(**config)
    before = encoder(**config)
    before.mean.copy_(before.uncentred(*tensors(batch)).mean(0).detach())
    served = torch.from_numpy(network.encode(batch))
    np.testing.assert_allclose(decoder.as_trained(served), before.encode(batch), atol=1e-3)


@pytest.mark.parametrize("nested", [(16, 8), (8, 8), (1, 4), (8, 64), (65,)])
def test_prefixes_that_do_not_grow_below_the_size_of_the_vector_are_refused(nested):
    with pytest.raises(ValueError, match="nested must"):
        EncoderConfig(dim=64, nested=nested)


def test_whitening_needs_the_mean_taken_out():
    with pytest.raises(ValueError, match="whiten needs centre"):
        EncoderConfig(whiten=True, centre=False)


def test_the_decoder_scores_a_column_as_a_slice_of_the_shared_rows():
    config = EncoderConfig(dim=8)
    decoder = Decoder(config, TRANSFORM.layout).eval()
    hidden = decoder(torch.from_numpy(encoder().encode(BATCH)))
    color, tags = TRANSFORM.layout.bags
    everything = decoder.rows(hidden, slice(None))
    assert everything.shape == (4, TRANSFORM.layout.table_rows)
    torch.testing.assert_close(
        decoder.rows(hidden, slice(tags.base, tags.base + tags.rows)), everything[:, tags.base :]
    )
    torch.testing.assert_close(
        decoder.rows(hidden, torch.tensor([color.base + FIRST])), everything[:, [color.base + FIRST]]
    )
    assert decoder.dense(hidden).shape == (4, TRANSFORM.layout.dense_width)


def test_a_setting_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="dims"):
        EncoderConfig(dims=8)
