import numpy as np
import torch
from films import table
from test_embed_table import published

from itemvec.registry import Registry
from training.folds import TRAIN
from training.judged import Views, judged_version


def test_some_rows_of_a_table_are_judged_as_they_are_in_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr("training.judged.BLOCK", 2)  # three rows: a block and a rest
    registry, rows = Registry(tmp_path), np.array([50, 3, 7])
    published(registry)
    version, fold = registry.load("films"), np.full(90, TRAIN, np.int8)
    every = Views(judged_version(version, table(90), fold), rows)
    some = Views(judged_version(version, table(90), fold, rows), np.arange(3))
    assert torch.equal(some.whole, every.whole) and torch.equal(some.without("genres"), every.without("genres"))
    assert some.model.table.n == 3 and some.model.marginals.n == 3
