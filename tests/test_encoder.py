import numpy as np
import pyarrow as pa
import pytest
import torch

from itemvec.encoder import Decoder, EncoderConfig, ItemEncoder, tensors
from itemvec.features import FIRST, FeatureTransform
from itemvec.schema import FeatureSchema

SCHEMA = FeatureSchema.from_yaml("""
name: t
id: id
features:
  color: {kind: nominal, min_count: 1}
  tags: {kind: multi, min_count: 1}
  size: {kind: numeric}
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
    return ItemEncoder(EncoderConfig(dim=8, **config), TRANSFORM.layout).eval()


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


def test_xor_of_two_columns_is_learned_with_a_hidden_layer_and_not_without():
    # a linear encoder gives f(a) + g(b): the four rows are the corners of a parallelogram, and no plane parts diagonals
    table = pa.table({"id": list("abcd"), "a": list("0011"), "b": list("0101")})
    schema = FeatureSchema.from_yaml("name: t\nid: id\nfeatures: {a: {kind: nominal}, b: {kind: nominal}}")
    transform = FeatureTransform.fit(table, schema)
    batch, xor = tensors(transform.transform_table(table)), torch.tensor([0.0, 1.0, 1.0, 0.0])

    def accuracy(hidden):
        torch.manual_seed(1)
        config = EncoderConfig(dim=4, hidden=hidden, activation="tanh", dropout=0, normalization="none", centre=False)
        network, head = ItemEncoder(config, transform.layout), torch.nn.Linear(4, 1)
        optimizer = torch.optim.Adam([*network.parameters(), *head.parameters()], lr=0.02)
        for _ in range(400):
            optimizer.zero_grad()
            scores = head(network.uncentred(*batch)).squeeze(1)
            torch.nn.functional.binary_cross_entropy_with_logits(scores, xor).backward()
            optimizer.step()
        return ((scores > 0) == (xor > 0.5)).float().mean().item()

    assert accuracy((16,)) == 1.0
    assert accuracy(()) <= 0.75


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
