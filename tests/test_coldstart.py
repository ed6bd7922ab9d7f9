import numpy as np
import pytest
import scipy.sparse as sp
import torch
from films import SCHEMA, table

from itemvec.encoder import Decoder, EncoderConfig, ItemEncoder
from training.colditems import ColdItems, popularity_matched_auc, recall_and_ndcg
from training.coldstart import cold_start
from training.config import TrainConfig
from training.data import Prepared
from training.folds import TEST, TRAIN
from training.judged import judged


def test_recall_is_the_share_found_and_ndcg_counts_places():
    # Ranked: items 0, 1, 2, 3. The user likes 1 and 3; among the first two is 1 of the 2, at place 2.
    scores, liked = np.array([[0.9, 0.8, 0.2, 0.1]], np.float32), np.array([[False, True, False, True]])
    recall, ndcg = recall_and_ndcg(scores, liked, k=2)
    assert recall == 0.5
    # Gain 1/log2(3) = 0.6309; at best places 1 and 2: 1 + 0.6309.
    assert ndcg == pytest.approx(0.6309 / 1.6309, abs=1e-4)


def test_a_perfect_ranking_has_an_ndcg_of_1_though_more_is_liked_than_is_shown():
    scores, liked = np.array([[3.0, 2.0, 1.0]], np.float32), np.array([[True, True, True]])
    assert recall_and_ndcg(scores, liked, k=2) == (pytest.approx(2 / 3), pytest.approx(1.0))


def test_popularity_matched_auc_compares_items_of_nearly_the_same_popularity_only():
    # In order of popularity: items 0, 1, 2, 3. The user likes item 1. Within one place: pairs (0, 1) and (1, 2).
    liked, popularity = np.array([[False, True, False, False]]), np.array([1, 2, 3, 4])
    scores = np.array([[0.1, 0.5, 0.9, 0.0]], np.float32)  # above item 0, below item 2; item 3 is too far away
    assert popularity_matched_auc(scores, liked, popularity, window=1) == 0.5
    assert popularity_matched_auc(scores, liked, popularity, window=2) == pytest.approx(2 / 3)  # and above item 3


def test_a_ranking_by_popularity_alone_gains_nothing_by_popularity_matched_auc():
    # Two items of one popularity for each of 50 popularities, one of each pair liked: scores tie, and a tie is half.
    popularity = np.repeat(np.arange(50), 2)
    liked = np.tile([True, False], 50)[None]
    scores = popularity[None].astype(np.float32)
    assert popularity_matched_auc(scores, liked, popularity, window=1) == pytest.approx(0.5, abs=0.02)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    config = TrainConfig(encoder=EncoderConfig(dim=8, hidden=(), skip=False), test=0.3)
    data = Prepared.make(table(), SCHEMA, config, tmp_path_factory.mktemp("prepared"))
    torch.manual_seed(0)
    encoder, decoder = ItemEncoder(config.encoder, data.layout), Decoder(config.encoder, data.layout)
    return data, judged(data, encoder, decoder)


def test_users_are_asked_who_liked_5_training_items_and_one_that_was_held_out(untrained):
    data, model = untrained
    warm, cold = (np.flatnonzero(data.fold == fold) for fold in (TRAIN, TEST))
    likes = np.zeros((4, 240), np.float32)
    likes[0, warm[:5]], likes[0, cold[:2]] = 1, 1
    likes[1, warm[:4]], likes[1, cold[:2]] = 1, 1  # one training item too few
    likes[2, warm[:9]] = 1  # nothing to find
    likes[3, warm[3:9]], likes[3, cold[2]] = 5, 2  # how much they were liked does not count
    found = cold_start(model, sp.csr_matrix(likes), data.fold)
    assert (found["users"], found["warm_items"], found["cold_items"]) == (2, 9, 3)
    # All three candidates are among the first 20.
    assert found["model"]["recall"] == found["chance"]["recall"] == 1.0


def test_of_many_warm_items_those_count_that_a_part_of_the_users_liked(monkeypatch):
    # Ten users who liked five warm items of their own each, and item 50, which is cold.
    likes = np.zeros((10, 51), np.float32)
    likes[np.repeat(range(10), 5), range(50)] = likes[:, 50] = 1
    fold = np.append(np.full(50, TRAIN, np.int8), TEST)
    assert ColdItems.of(sp.csr_matrix(likes), fold, TEST).profile.shape == (10, 50)
    monkeypatch.setattr("training.colditems.WARM", 15)  # those of 10 and of 5 users are too many
    task = ColdItems.of(sp.csr_matrix(likes), fold, TEST)
    assert task.profile.shape == (3, 15) and task.profile.toarray() == pytest.approx(np.repeat(np.eye(3), 5, 1) / 5)
    assert task.warm.tolist() == [*range(5), *range(20, 25), *range(40, 45)]


def test_without_such_users_there_is_nothing_to_say(untrained):
    data, model = untrained
    assert cold_start(model, sp.csr_matrix(np.zeros((3, 240), np.float32)), data.fold) is None
