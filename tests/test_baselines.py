import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.decomposition import PCA, TruncatedSVD

from training.baselines import (
    LeaveOneOut,
    Recalled,
    centred_cosines,
    dense_cosines,
    fitted,
    hashed_columns,
    stacked,
    total_variance,
)


@pytest.fixture
def blocks():
    rng = np.random.default_rng(0)
    return {
        "labels": sp.csr_matrix((rng.random((60, 30)) < 0.1).astype(np.float32)),
        "numbers": (rng.standard_normal((60, 4)) * [4, 3, 2, 1]).astype(np.float32),
        "other": sp.csr_matrix((rng.random((60, 8)) < 0.3).astype(np.float32)),
    }


def cosines(vectors):
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit @ unit.T


def test_the_coordinates_are_scikit_learn_s(blocks):
    x = stacked(blocks).toarray()
    ours = LeaveOneOut(blocks, dim=4).without(None).coordinates
    assert cosines(ours["pca"].numpy()) == pytest.approx(cosines(PCA(4).fit_transform(x)), abs=1e-2)
    svd = TruncatedSVD(4, algorithm="arpack").fit_transform(x)
    assert cosines(ours["svd"].numpy()) == pytest.approx(cosines(svd), abs=1e-2)
    unit = np.hstack([np.asarray(sp.csr_matrix(b).todense()) / total_variance(b) ** 0.5 for b in blocks.values()])
    theirs = cosines(PCA(4).fit_transform(unit))
    assert cosines(ours["pca_unit_variance"].numpy()) == pytest.approx(theirs, abs=5e-2)


def test_a_column_is_left_out_as_if_it_had_never_been_there(blocks):
    left = LeaveOneOut(blocks, dim=2).without("labels")
    never = LeaveOneOut({name: block for name, block in blocks.items() if name != "labels"}, dim=2).without(None)
    assert left.one_hot.numpy() == pytest.approx(never.one_hot.numpy(), abs=1e-4)
    for kind in ("svd", "pca", "pca_unit_variance"):
        one, other = (cosines(side.coordinates[kind].numpy()) for side in (left, never))
        assert one == pytest.approx(other, abs=1e-2), kind


def test_one_hot_cosines_are_those_of_the_centred_columns(blocks):
    x = stacked(blocks).toarray()
    everyone = np.arange(60)
    theirs = cosines(x - x.mean(0))
    assert LeaveOneOut(blocks, dim=2).without(None).one_hot.numpy() == pytest.approx(theirs, abs=1e-4)
    ours = centred_cosines(stacked(blocks), everyone)
    assert ours(everyone, everyone) == pytest.approx(theirs, abs=1e-4)
    sums = sp.random(3, len(x), density=0.5, format="csr", random_state=0)
    assert ours(everyone, everyone[:7], sums) == pytest.approx(sums @ theirs[:, :7], abs=1e-4)


def test_hashing_puts_each_label_at_one_place_with_a_sign():
    labels = sp.identity(50, format="csr", dtype=np.float32)
    hashed = hashed_columns({"labels": labels}, dim=8)["labels"]
    assert (np.abs(hashed).sum(1) == 1).all() and set(np.unique(hashed)) == {-1.0, 0.0, 1.0}
    both = hashed_columns({"labels": sp.csr_matrix(labels[[0]] + labels[[1]])}, dim=8)["labels"]
    assert both[0].tolist() == (hashed[0] + hashed[1]).tolist()  # a set is the sum of its labels


def test_what_is_fitted_on_some_items_does_not_know_the_others(blocks):
    some = np.arange(40)
    changed = {**blocks, "numbers": np.concatenate([blocks["numbers"][:40], 100 * blocks["numbers"][40:]])}
    for (name, one), (_, other) in zip(fitted(blocks, some, 3), fitted(changed, some, 3), strict=True):
        assert one(some, some) == pytest.approx(other(some, some), abs=1e-3), name


def test_cosines_between_items_do_not_depend_on_length():
    near = dense_cosines(np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 0.0]], np.float32))
    assert near(np.array([0]), np.array([0, 1, 2])).tolist() == [[1.0, pytest.approx(0.7071, abs=1e-4), 0.0]]


def test_components_as_many_as_there_are_directions_give_every_column_back(blocks):
    recalled = Recalled.fit(blocks, dim=42)
    codes = recalled.codes(blocks)
    for name, block in blocks.items():
        wanted = block.toarray() if sp.issparse(block) else block
        assert recalled.column(codes, name) == pytest.approx(wanted, abs=0.2), name
    assert Recalled.fit({"numbers": blocks["numbers"]}, dim=64).axes.shape == (3, 4)


def test_of_rows_that_are_all_alike_the_components_say_nothing_and_the_mean_all():
    alike = {"label": sp.csr_matrix([[0.0, 1.0]] * 12, dtype=np.float32), "number": np.full((12, 1), 3.0, np.float32)}
    recalled = Recalled.fit(alike, dim=2)
    assert recalled.column(recalled.codes(alike), "label") == pytest.approx(np.array([[0.0, 1.0]] * 12))
    for name, cosine in fitted(alike, np.arange(12), dim=2):
        assert np.isfinite(cosine(np.arange(2), np.arange(12))).all(), name
