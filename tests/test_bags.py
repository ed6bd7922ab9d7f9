import math

import numpy as np
import pyarrow as pa
import pytest
from fitting import bag, fitted, status, table

from itemvec.errors import InvalidItem
from itemvec.features import FIRST, MISSING, OOV
from itemvec.values import hashed

STUDIOS = ["Acme", "Acme", "Solo", None]
GENRES = [["Drama", "War"], ["Drama"], [], None]
AGES = "kind: ordinal, order: [G, PG, R]"


# --- nominal ---


def test_rare_labels_share_the_out_of_vocabulary_row():
    # "Solo" stands on one row only and min_count is 2
    studio = fitted("kind: nominal", STUDIOS)
    assert bag(studio, "Acme") == ([FIRST], [1.0])
    assert bag(studio, "Solo") == ([OOV], [1.0])
    assert [status(studio, label) for label in ("Acme", "Solo", "New", None)] == [None, "oov", "oov", "missing"]


def test_a_blank_label_is_missing():
    studio = fitted("kind: nominal", STUDIOS)
    assert bag(studio, "  ")[0] == [MISSING] and status(studio, "  ") == "missing"


def test_integers_and_booleans_are_labels_of_their_own_types():
    code = fitted("kind: nominal, dtype: integer, min_count: 1", [7, 7, 8, None])
    sequel = fitted("kind: nominal, dtype: boolean, min_count: 1", [True, False, False, None])
    assert bag(code, 7)[0] == [FIRST] and bag(code, 9)[0] == [OOV] and bag(sequel, False)[0] == [FIRST]
    for column, wrong in ((code, "7"), (code, True), (code, 7.0), (sequel, 1), (sequel, "true")):
        with pytest.raises(InvalidItem):
            bag(column, wrong)


def test_named_labels_have_the_rows_of_their_order_and_others_none():
    provider = fitted("kind: nominal, labels: [Netflix, Prime Video, Hulu]", ["Hulu", "Hulu", "Vudu"])
    assert [bag(provider, label)[0] for label in ("Netflix", "Prime Video", "Hulu")] == [[2], [3], [4]]
    assert bag(provider, "Vudu")[0] == [OOV] and status(provider, "Vudu") == "oov"
    assert status(provider, "Netflix") is None  # though no item of the table has it


def test_a_label_in_a_hash_bucket_is_still_reported_as_unseen():
    studio = fitted("kind: nominal, hash_buckets: 8", STUDIOS)
    assert bag(studio, "Solo") == ([FIRST + 1 + hashed("Solo", 8)], [1.0])
    assert status(studio, "Solo") == "oov" and status(studio, "Acme") is None


def test_a_column_that_is_only_hashed_knows_what_fell_into_its_buckets():
    studio = fitted("kind: nominal, max_labels: 0, hash_buckets: 8", STUDIOS)
    assert status(studio, "Acme") is None and bag(studio, "Acme")[0] == [FIRST + hashed("Acme", 8)]
    empty = next(name for name in "abcdefgh" if hashed(name, 8) not in (hashed("Acme", 8), hashed("Solo", 8)))
    assert status(studio, empty) == "oov" and bag(studio, empty)[0] == [OOV]


# --- multi ---


def test_a_set_of_n_labels_counts_one_over_root_n_each():
    rows, weights = bag(fitted("kind: multi, min_count: 1", GENRES), ["War", "Drama"])
    assert rows == [FIRST, FIRST + 1]  # Drama stands on two rows, War on one
    assert weights == pytest.approx([1 / math.sqrt(2)] * 2)


def test_unseen_labels_of_a_set_fall_into_one_row_and_are_reported():
    genres = fitted("kind: multi, min_count: 1", GENRES)
    assert bag(genres, ["Opera", "Drama", "Noir"])[0] == [OOV, FIRST]
    given = (["Opera", "Drama"], ["Opera"], [], None, ["Drama"], [None, " "])
    assert [status(genres, g) for g in given] == ["partly_oov", "oov", "missing", "missing", None, "missing"]


def test_hashed_labels_of_a_set_are_reported_as_unseen_but_stay_apart():
    genres = fitted("kind: multi, hash_buckets: 64", [["Drama", "War"], ["Drama", "Noir"]])
    assert len(bag(genres, ["War", "Noir"])[0]) == 2
    assert [status(genres, g) for g in (["War", "Drama"], ["War", "Noir"], ["Drama"])] == ["partly_oov", "oov", None]


def test_of_a_set_of_wrong_labels_only_the_first_is_named():
    with pytest.raises(InvalidItem) as caught:
        bag(fitted("kind: multi, min_count: 1", GENRES), ["Drama", *range(10_000)])
    assert [e.pointer for e in caught.value.errors] == ["/0/x/1"]


def test_a_string_is_a_set_only_where_a_separator_is_named():
    genres = fitted('kind: multi, min_count: 1, separator: "|"', ["Drama | War", "Drama", "", None])
    assert bag(genres, "War|Drama") == bag(genres, ["Drama", "War"])
    with pytest.raises(InvalidItem):
        bag(fitted("kind: multi, min_count: 1", GENRES), "Drama")


# --- ordinal ---


def test_an_order_is_a_thermometer():
    age = fitted(AGES, ["G", "R", None, "PG"])
    w = pytest.approx(1 / math.sqrt(3))
    assert bag(age, "G") == ([FIRST], [w])
    assert bag(age, "R") == ([FIRST, FIRST + 1, FIRST + 2], [w, w, w])
    assert bag(age, "X") == ([OOV], [1.0]) and status(age, "X") == "oov"
    assert bag(age, None) == ([MISSING], [1.0]) and status(age, " ") == "missing"


def test_two_ranks_differ_in_as_many_rows_as_there_are_steps_between_them():
    stars = fitted("kind: ordinal, order: [1, 2, 3, 4, 5]", [1, 2, 5])
    rows = {star: set(bag(stars, star)[0]) for star in range(1, 6)}
    assert all(len(rows[a] ^ rows[b]) == abs(a - b) for a in rows for b in rows)


def test_numbers_in_an_order_are_numbers_and_not_their_text():
    stars = fitted("kind: ordinal, order: [1, 2, 3]", [1, 2, 3])
    for wrong in ("2", 2.0, True, [2]):
        with pytest.raises(InvalidItem):
            bag(stars, wrong)
    assert status(stars, 4) == "oov"


def test_an_order_may_mix_types_and_keeps_them_apart():
    mixed = fitted('kind: ordinal, order: ["1", 1, true]', ["1", "1"])
    assert [len(bag(mixed, label)[0]) for label in ("1", 1, True)] == [1, 2, 3]


# --- text ---


def test_words_and_parts_of_words_are_shared_whatever_the_case():
    title = fitted("kind: text, buckets: 100000", ["One", "Two words"])
    matrix, matrices, heat = (set(bag(title, t)[0]) for t in ("the Matrix", "THE MATRICES", "Heat"))
    assert len(matrix & matrices) > 8
    assert not matrix & heat


def test_text_is_read_up_to_a_limit():
    title = fitted("kind: text, max_characters: 10", ["One"])
    assert bag(title, "ten letter") == bag(title, "ten letters and more")


def test_a_text_without_words_is_missing():
    title = fitted("kind: text, buckets: 8", ["One", "", None])
    assert bag(title, " \n")[0] == [MISSING] and status(title, " \n") == "missing"


@pytest.mark.parametrize(
    ("settings", "column"), [("kind: nominal", STUDIOS), (AGES, ["G", "R"]), ("kind: text", ["a b", "c"])]
)
def test_codes_of_a_dictionary_are_the_labels_that_they_stand_for(settings, column):
    plain, coded = pa.array(column), pa.array(column).dictionary_encode()
    one, other = fitted(settings, plain), fitted(settings, coded)
    assert one.digest() == other.digest()
    np.testing.assert_array_equal(one.transform_table(table(plain)).indices, one.transform_table(table(coded)).indices)
