"""The arithmetic of `benchmarks.quality`: its figures on data that can be checked by hand."""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp

from benchmarks import _artworks, _films, quality
from benchmarks._inner import without_judged
from training.baselines import dense_cosines


def films(ids, likes, cold):
    likes = sp.csr_matrix(np.array(likes, np.float32))
    return _films.Films(pa.table({"id": ids}), ids, likes, np.ones(len(ids), bool), np.array(cold))


def test_a_cold_film_is_ranked_by_its_mean_cosine_to_the_warm_films_that_a_user_liked():
    # Five warm films and two cold ones. The user likes all the warm ones, three of them east and two north, and the
    # cold one that lies east: mean cosines .6 (east) and .4 (north), so it is ranked first of the two.
    task = _films.ColdStart(films(list("abcdefg"), [[1, 1, 1, 1, 1, 1, 0]], [False] * 5 + [True] * 2))
    east, north = [1.0, 0.0], [0.0, 1.0]
    vectors = np.array([east, east, east, north, north, east, north], np.float32)
    assert task.score(dense_cosines(vectors)) == {"recall@20": 1.0, "NDCG@20": pytest.approx(1.0), "pmAUC": 1.0}
    turned = np.array([east, east, east, north, north, north, east], np.float32)
    # At the second place a hit is worth 1 / log2(3) = 0.6309.
    assert task.score(dense_cosines(turned)) == {
        "recall@20": 1.0,
        "NDCG@20": pytest.approx(0.6309, abs=1e-4),
        "pmAUC": 0.0,
    }


def test_a_user_with_four_warm_likes_is_not_asked():
    likes = [[1, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]]
    assert _films.ColdStart(films(list("abcdef"), likes, [False] * 5 + [True])).liked.shape == (1, 1)


def test_neighbors_share_labels_by_the_jaccard_index():
    # The nearest of item 0 is 1 and the other way round: one label in common of two, 1/2. The nearest of 2 is 1, which
    # has none of its labels: 0. Mean 1/3.
    vectors = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]], np.float32)
    truth = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1]], np.float32)
    assert _films.shared(dense_cosines(vectors), np.arange(3), truth, k=1) == pytest.approx(1 / 3)


def test_which_films_are_cold_follows_from_the_first_byte_of_the_hash_of_their_id():
    ids = [f"tt{i:07}" for i in range(500)]
    cold = _films.fold_of(ids, _films.COLD, 0.0) == _films.TEST
    assert cold.tolist() == [hashlib.sha256(i.encode()).digest()[0] < 51 for i in ids]


def test_no_rating_of_a_cold_film_is_handed_on(tmp_path):
    ids = [f"tt{i:07}" for i in range(100)]
    pq.write_table(pa.table({"item_id": ids, "user_id": ids, "rating": [9] * 100}), tmp_path / "movie_ratings.parquet")
    kept = _films.warm_ratings(tmp_path).column("item_id").to_pylist()
    cold = _films.fold_of(ids, _films.COLD, 0.0) == _films.TEST
    assert kept == [item for item, is_cold in zip(ids, cold, strict=True) if not is_cold]
    assert 0 < len(kept) < 100


def test_settings_are_compared_on_rows_that_are_not_judged_a_fifth_of_which_is_held_out_instead():
    ids = [f"tt{i:07}" for i in range(500)]
    judged = {i for i in ids if hashlib.sha256(i.encode()).digest()[0] < 51}
    inner = without_judged(pa.table({"x": ids, "item": ids}), "item", 51 / 256)
    assert inner.column("x").to_pylist() == [i for i in ids if i not in judged]
    held = _films.fold_of(inner.column("item").to_pylist(), _films.COLD, 0.0) == _films.TEST
    assert held.mean() == pytest.approx(51 / 256, abs=0.06)


def test_every_candidate_has_settings_that_there_are():
    assert [quality.config_of(given) for of_ours in quality.candidates().values() for given in of_ours.values()]


def test_reading_back_counts_known_labels_and_the_pairs_of_all_sets_together():
    # Rows of a column: unseen, missing, then its labels. Nominal: the second item is missing and is no question; of the
    # other two one is right. "Missing" is no answer, however sure.
    nominal = np.array([[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]], np.float32)
    answer = np.array([[0, 9, 1, 0], [0, 9, 0, 0], [0, 0, 1, 0]], np.float32)
    # Sets: of three labels that are there two are named, and one is named that is not: F1 = 2 * 2 / (3 + 3).
    sets = np.array([[0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 1]], np.float32)
    said = np.array([[9, 9, 1, -1], [9, 9, 1, -1], [0, 0, -1, 1]], np.float32)
    found = _artworks.figures({"n": answer, "s": said}, {"n": nominal, "s": sets}, {"n": "nominal", "s": "multi"})
    assert found == {"accuracy": 0.5, "micro-F1": pytest.approx(2 / 3)}


def test_ridge_regression_to_likes_gives_films_of_the_same_columns_the_same_place():
    # Two kinds of films by their one column; users like one kind only, so the kinds lie apart.
    kind = np.array([0, 0, 1, 1] * 10)
    x = np.eye(2, dtype=np.float32)[kind] - 0.5
    likes = sp.csr_matrix(np.stack([kind == 0, kind == 1] * 40).astype(np.float32))
    for _, vectors in _films.ridge_to_likes(x, likes, np.arange(40)):
        cosine = dense_cosines(vectors)(np.array([0]), np.array([1, 2]))[0]
        assert cosine[0] == pytest.approx(1.0) and cosine[1] < 0.5


def test_a_table_shows_the_median_over_seeds_between_the_least_and_the_most(capsys):
    rows = [
        {"method": "ours", "figures": {"AUC": auc}, "seed": s, "seconds": 1} for s, auc in enumerate([0.7, 0.9, 0.8])
    ]
    quality.show("cold_start", [quality.baseline("PCA", {"AUC": 0.6}), *rows])
    shown = capsys.readouterr().out
    assert "0.800 (0.700 to 0.900)" in shown and "0.600\n" in shown
