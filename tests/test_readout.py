"""What reads numbers back, fitted to whole items and with less weight to the same items without the column."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression
from test_start import prepared

from itemvec.encoder import Decoder, EncoderConfig, ItemEncoder
from training.folds import TRAIN
from training.judged import Views, judged
from training.readout import WITHOUT, refit_numbers
from training.start import start_from_components

SCHEMA = """
name: toys
id: id
features:
  color: {kind: nominal}
  tags: {kind: multi}
  size: {kind: numeric, bins: 4}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    data = prepared(tmp_path_factory.mktemp("readout"), schema=SCHEMA)
    size = data.layout.dense[0]
    data.table.dense[:40, size.start : size.start + size.width] = 0.0
    data.table.dense[:40, size.flag] = 1.0  # the first forty have no size
    torch.manual_seed(0)
    config = EncoderConfig(dim=16, hidden=(8,), decoder_hidden=(8,))
    encoder, decoder = ItemEncoder(config, data.layout), Decoder(config, data.layout)
    start_from_components(encoder, data)
    return judged(data, encoder, decoder), np.flatnonzero(data.fold == TRAIN)


def test_numbers_are_read_as_least_squares_reads_them(model):
    model, items = model
    size = model.layout.dense[0]
    flag = model.decoder.dense_head.weight[size.flag].clone()
    refit_numbers(model, items)
    with torch.inference_mode():
        views = Views(model, items)
        whole, without = (model.decoder(vectors) for vectors in (views.whole, views.without("size")))
        ours = model.decoder.dense(whole)[:, size.start].numpy()
    there = model.table.dense[items, size.flag].numpy() == 0
    truth = model.table.dense[items, size.start].numpy()
    assert 0 < (~there).sum() < 50  # who has no size says nothing of sizes
    x = np.concatenate([whole.numpy()[there], without.numpy()[there]])
    weight = np.repeat([1.0, WITHOUT], there.sum())
    oracle = LinearRegression().fit(x, np.tile(truth[there], 2), weight).predict(whole.numpy())
    np.testing.assert_allclose(ours, oracle, atol=2e-2)
    assert np.corrcoef(ours[there], truth[there])[0, 1] > 0.7
    assert torch.equal(model.decoder.dense_head.weight[size.flag], flag)


def test_fewer_items_than_unknowns_leave_what_was_learned(model):
    model, items = model
    before = model.decoder.dense_head.weight.clone()
    refit_numbers(model, items[-8:])  # eight hidden numbers and a constant are nine unknowns
    assert torch.equal(model.decoder.dense_head.weight, before)
