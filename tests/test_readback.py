import pytest
import torch

from itemvec.features import BagSlot, DenseSlot
from training.readback import _Tally

GENRES = BagSlot("genres", "multi", base=0, rows=6)  # unseen, missing, and four genres


def tallied(slot, answer, truth):
    tally = _Tally(slot)
    for one in range(len(truth)):  # part by part
        tally.add(torch.tensor(answer[one : one + 1]), torch.tensor(truth[one : one + 1]))
    return tally


def test_labels_that_are_ranked_first_but_below_one_half_show_in_r_precision_only():
    # Two genres each. The first item's two are ranked first and third, the second item's first and second; no score is
    # above 0, so none counts as named.
    answer = [[0.0, 0.0, -1.0, -2.0, -3.0, -4.0], [0.0, 0.0, -4.0, -3.0, -2.0, -1.0]]
    truth = [[0.0, 0.0, 1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]]
    tally = tallied(GENRES, answer, truth)
    assert tally.score() == 0.0
    assert tally.r_precision() == pytest.approx((1 / 2 + 2 / 2) / 2)


def test_micro_f1_counts_labels_over_all_items():
    # Named: 3, of which 2 are right; there are 3. 2 x 2 / (3 + 3).
    answer = [[9.0, 9.0, 1.0, 1.0, -1.0, -1.0], [9.0, 9.0, 1.0, -1.0, -1.0, -1.0]]
    truth = [[0.0, 0.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0, 1.0]]
    assert tallied(GENRES, answer, truth).score() == pytest.approx(4 / 6)


def test_an_item_without_labels_is_no_part_of_r_precision():
    answer = [[0.0, 0.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]]
    truth = [[0.0, 1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]]
    assert tallied(GENRES, answer, truth).r_precision() == 1.0
    assert tallied(GENRES, answer[:1], truth[:1]).r_precision() is None


def test_accuracy_is_of_the_labels_of_items_that_have_one():
    # Rows: unseen, missing, red, blue. The second item has no color, and `missing` is no answer for the third.
    color = BagSlot("color", "nominal", base=0, rows=4)
    answer = [[0.0, 0.0, 5.0, 1.0], [0.0, 0.0, 5.0, 1.0], [0.0, 9.0, 1.0, 5.0], [0.0, 0.0, 5.0, 1.0]]
    truth = [[0.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]]
    assert tallied(color, answer, truth).score() == pytest.approx(2 / 3)


def test_an_ordinal_answer_is_off_by_steps():
    # G, PG, PG-13, R as thermometers. Told PG (one step up) where it is R: two steps off; told G where it is G: none.
    rating = BagSlot("rating", "ordinal", base=0, rows=6)
    answer = [[0.0, 0.0, 1.0, 1.0, -1.0, -1.0], [0.0, 0.0, 1.0, -1.0, -1.0, -1.0]]
    truth = [[0.0, 0.0, 1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]]
    assert tallied(rating, answer, truth).score() == pytest.approx(1.0)


def test_r2_is_the_share_of_the_variance_that_is_explained():
    # Values 1, 3, 5 around their mean 3: 8. Errors 1, 0, 1: 2. The item whose flag is up does not count.
    year = DenseSlot("year", "numeric", start=4, width=2, targets=1)
    answer, truth = [[2.0, 0.0], [3.0, 0.0], [4.0, 0.0], [50.0, 0.0]], [[1.0, 0.0], [3.0, 0.0], [5.0, 0.0], [9.0, 1.0]]
    assert tallied(year, answer, truth).score() == pytest.approx(1 - 2 / 8)


def test_a_number_that_is_the_same_everywhere_has_no_r2():
    year = DenseSlot("year", "numeric", start=0, width=2, targets=1)
    assert tallied(year, [[2.0, 0.0], [2.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]).score() is None
