"""Training starts at principal components, with columns weighted by what users like."""

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp
import torch
from sklearn.decomposition import PCA

from itemvec.encoder import EncoderConfig, ItemEncoder
from itemvec.schema import FeatureSchema
from training.config import TrainConfig
from training.data import Prepared
from training.folds import TRAIN
from training.interactions import Interactions
from training.start import columns, gains_from, start_from_components, unseen_as_unknown

SCHEMA = """
name: toys
id: id
features:
  color: {kind: nominal}
  tags: {kind: multi}
  size: {kind: numeric, bins: 0}
"""


def prepared(tmp_path, rows=400, schema=SCHEMA) -> Prepared:
    dice = np.random.default_rng(0)
    table = pa.table(
        {
            "id": [str(i) for i in range(rows)],
            "color": dice.choice(["red", "green", "blue"], rows).tolist(),
            "tags": [dice.choice(list("abcdefgh"), 3, replace=False).tolist() for _ in range(rows)],
            "size": dice.normal(size=rows).tolist(),
        }
    )
    return Prepared.make(table, FeatureSchema.from_yaml(schema), TrainConfig(), tmp_path / "prepared")


def embeddings(encoder: ItemEncoder, data: Prepared, items: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return encoder.eval().uncentred(*data.table.clean(items)).numpy()


def test_the_linear_encoder_starts_as_pca_of_columns_of_equal_variance(tmp_path):
    data = prepared(tmp_path)
    encoder = ItemEncoder(EncoderConfig(dim=4, hidden=()), data.layout)
    start_from_components(encoder, data)
    items = data.items(TRAIN)
    dense, indices, weights, lengths = data.table.clean(items)
    item = np.repeat(np.arange(len(items)), lengths.sum(1).numpy())
    wide = np.zeros((len(items), data.layout.table_rows), np.float64)
    np.add.at(wide, (item, indices.numpy()), weights.numpy())
    wide = np.hstack([wide, dense.numpy()])
    for column in columns(data):
        wide[:, column.place] /= np.sqrt(wide[:, column.place].var(0).sum())
    oracle = PCA(4).fit_transform(wide)
    ours = embeddings(encoder, data, items)
    ours = ours - ours.mean(0)
    ours *= np.sqrt((oracle**2).sum() / (ours**2).sum())
    # Components are found up to their sign; the geometry, all inner products, is one and the same.
    np.testing.assert_allclose(ours @ ours.T, oracle @ oracle.T, atol=1e-3)
    np.testing.assert_allclose(np.abs(ours), np.abs(oracle), atol=5e-2)


def test_a_label_that_no_training_item_has_says_nothing(tmp_path):
    named = SCHEMA.replace("{kind: nominal}", "{kind: nominal, labels: [red, green, blue, plaid]}")
    data = prepared(tmp_path, schema=named)
    encoder = ItemEncoder(EncoderConfig(dim=4, hidden=()), data.layout)
    start_from_components(encoder, data)
    items = [{"color": color, "tags": ["a"], "size": 0.0} for color in ("red", "green", "blue", "plaid")]
    with torch.inference_mode():
        batch = data.transform.transform(items).batch
        red, green, blue, plaid = encoder.uncentred(
            *(torch.from_numpy(a) for a in (batch.dense, batch.indices, batch.weights, batch.lengths))
        )
    counts = data.marginals.count[: data.layout.bags[0].rows]
    share = counts[2:5] / counts[2:5].sum()
    labels = data.transform.column("color").vocabulary.labels
    by_label = dict(zip(("red", "green", "blue"), (red, green, blue), strict=True))
    mean = sum(share[i] * by_label[label] for i, label in enumerate(labels[:3]))
    torch.testing.assert_close(plaid, mean, atol=1e-4, rtol=0)


def test_after_training_a_label_that_no_item_has_is_an_unknown_one(tmp_path):
    data = prepared(tmp_path, schema=SCHEMA.replace("{kind: nominal}", "{kind: nominal, labels: [red, green, plaid]}"))
    encoder = ItemEncoder(EncoderConfig(dim=4, hidden=()), data.layout)
    unknown, _, red, green, plaid = encoder.table[:5].detach().clone()  # and blue, which is not named, is unknown
    unseen_as_unknown(encoder, data)
    after = encoder.table[:5].detach()
    assert torch.equal(after[4], unknown) and not torch.equal(plaid, unknown)
    assert torch.equal(after[2], red) and torch.equal(after[3], green) and torch.equal(after[0], unknown)


def test_more_dimensions_than_the_columns_have_are_zeros(tmp_path):
    data = prepared(tmp_path)
    encoder = ItemEncoder(EncoderConfig(dim=64, hidden=()), data.layout)
    start_from_components(encoder, data)
    vectors = embeddings(encoder, data, data.items(TRAIN))
    assert np.isfinite(vectors).all()
    # Three colors, eight tags in sets of three, one number, flags: no more than 2 + 8 + 1 directions vary.
    assert (vectors.std(0) > 1e-3).sum() <= 11


def likes_of_one_color(data: Prepared, n: int) -> Interactions:
    """Every user likes items of one color, whatever else they are."""
    rows = data.table.rows[data.table.starts[: n * data.table.bag_count : data.table.bag_count]].numpy()
    fans = [np.flatnonzero(rows == color) for color in np.unique(rows)]
    dice = np.random.default_rng(1)
    picked = [dice.choice(fans[user % len(fans)], 12, replace=False) for user in range(120)]
    users = np.repeat(np.arange(120), 12)
    likes = sp.csr_matrix((np.ones(len(users), np.float32), (users, np.concatenate(picked))), shape=(120, n))
    return Interactions(likes, data.fold)


def test_the_column_that_users_go_by_gains_weight(tmp_path):
    data = prepared(tmp_path)
    gains = gains_from(likes_of_one_color(data, 400), data)
    assert gains.keys() == {"color", "tags", "size"}
    assert np.mean(list(gains.values())) == pytest.approx(1.0)
    assert gains["color"] > 3 * max(gains["tags"], gains["size"])


def test_held_out_items_are_in_no_pair_of_the_training_fold(tmp_path):
    data = prepared(tmp_path)
    likes = likes_of_one_color(data, 400)
    anchors, positives = likes.pairs(5_000, TRAIN, torch.Generator().manual_seed(0))
    assert (data.fold[anchors.numpy()] == TRAIN).all() and (data.fold[positives.numpy()] == TRAIN).all()
    assert (anchors != positives).all()
    both = likes.likes[:, anchors.numpy()].multiply(likes.likes[:, positives.numpy()])
    assert (np.asarray(both.sum(0)) > 0).all()  # some user likes both of each pair
    validation = likes.pairs(1_000, 1, torch.Generator().manual_seed(0))
    assert (data.fold[validation[0].numpy()] == TRAIN).all() and (data.fold[validation[1].numpy()] == 1).all()
    seen = np.bincount(positives.numpy(), minlength=400) / 5_000
    assert np.abs(seen - likes.popularity.numpy()).max() < 0.01
    assert likes.popularity.sum() == pytest.approx(1.0)
