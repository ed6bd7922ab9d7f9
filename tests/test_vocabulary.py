import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itemvec.values import PLAIN, canonical, hashed
from itemvec.vocabulary import FIRST, MISSING, OOV, SEARCHED, Vocabulary


def test_frequent_labels_come_first_and_ties_in_alphabetical_order():
    assert Vocabulary.fit(["b", "c", "a", "c"], min_count=1).labels == ["c", "a", "b"]


def test_a_cap_keeps_the_most_frequent():
    assert Vocabulary.fit(["a", "b", "b", "c", "c", "c"], min_count=1, max_labels=2).labels == ["c", "b"]


def test_white_space_and_unicode_form_do_not_make_a_new_label():
    vocabulary = Vocabulary.fit(["Ame\u0301lie ", "Am\u00e9lie"], min_count=2)
    assert vocabulary.labels == ["Am\u00e9lie"] and vocabulary.counts.tolist() == [2]
    assert vocabulary.row(" Ame\u0301lie") == FIRST


def test_named_labels_keep_their_order_whatever_the_table_holds():
    vocabulary = Vocabulary.fit(["b", "b", "x"], min_count=2, max_labels=1, labels=["c", " b", "a"])
    assert vocabulary.labels == ["c", "b", "a"] and vocabulary.counts.tolist() == [0, 2, 0]
    assert [vocabulary.row(label) for label in ("c", "b", "a", "x")] == [FIRST, FIRST + 1, FIRST + 2, OOV]


def test_rare_labels_share_the_buckets_behind_the_known_ones():
    vocabulary = Vocabulary.fit(["red", "red", "blue"], min_count=2, hash_buckets=8)
    assert vocabulary.rows == FIRST + 1 + 8
    assert vocabulary.row("blue") == vocabulary.row(" blue ") == FIRST + 1 + hashed("blue", 8)
    assert vocabulary.filled == [hashed("blue", 8)]


def test_a_bucket_that_training_left_empty_has_no_trained_row_so_its_labels_are_out_of_vocabulary():
    assert hashed("violet", 8) != hashed("blue", 8)
    vocabulary = Vocabulary.fit(["red", "red", "blue"], min_count=2, hash_buckets=8)
    assert vocabulary.row("violet") == OOV


def test_without_a_vocabulary_every_label_is_hashed():
    vocabulary = Vocabulary.fit(["red", "red", "blue"], min_count=1, max_labels=0, hash_buckets=8)
    assert vocabulary.labels == []
    assert vocabulary.row("red") == FIRST + hashed("red", 8) < vocabulary.shared  # which is the plain case
    assert vocabulary.row(" ") == MISSING


@given(labels=st.lists(st.text(min_size=1, max_size=10), min_size=2, max_size=30), buckets=st.integers(0, 4))
@settings(max_examples=30)
def test_every_label_kept_by_fit_has_a_row_of_its_own(labels, buckets):
    vocabulary = Vocabulary.fit(labels, min_count=2, hash_buckets=buckets)
    rows = [vocabulary.row(label) for label in vocabulary.labels]
    assert rows == list(range(FIRST, FIRST + len(rows)))
    assert OOV not in {vocabulary.row(label) for label in labels} or not buckets  # what training saw has a trained row


texts = st.text(
    st.characters(exclude_categories=["Cs"], max_codepoint=0x2FF) | st.sampled_from(" \n\u0301\u212b"), max_size=6
)


@given(known=st.lists(texts, max_size=20), labels=st.lists(texts | st.none(), max_size=20), buckets=st.integers(0, 4))
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
@pytest.mark.parametrize("searched", [0, SEARCHED])
def test_an_arrow_array_has_the_rows_that_its_labels_have(known, labels, buckets, kind, searched):
    vocabulary = Vocabulary.fit(known, min_count=1, max_labels=10, hash_buckets=buckets)
    labels = [*labels, *known, "", None]
    with pytest.MonkeyPatch.context() as setting:
        setting.setattr("itemvec.vocabulary.SEARCHED", searched)
        rows = vocabulary.rows_of_arrow(pa.array(labels, kind))
    assert rows.tolist() == vocabulary.rows_of(labels).tolist() == [vocabulary.row(label) for label in labels]


def test_arrow_labels_that_are_not_of_a_text_are_found_too():
    numbers, flags = Vocabulary.fit([7, 7, 2**40], min_count=1), Vocabulary.fit([True], min_count=1)
    assert numbers.rows_of_arrow(pa.array([2**40, None, 7, 8])).tolist() == [FIRST + 1, MISSING, FIRST, OOV]
    assert flags.rows_of_arrow(pa.array([False, True])).tolist() == [OOV, FIRST]


@given(texts)
def test_what_looks_plain_is_in_its_canonical_form(text):
    if pc.match_substring_regex(pa.array([text]), PLAIN)[0].as_py():
        assert canonical(text) == text


def test_most_labels_look_plain():
    labels = ["Drama", "Sci-Fi & Fantasy", "Am\u00e9lie", "Dvo\u0159\u00e1k", "x"]
    assert pc.match_substring_regex(pa.array(labels), PLAIN).to_pylist() == [True] * len(labels)
    others = ["", " ", " a", "a ", "a\n", "Ame\u0301lie", "\u212b", None]
    assert not any(pc.match_substring_regex(pa.array(others), PLAIN).to_pylist())
