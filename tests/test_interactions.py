"""Likes, read from a table of their own."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from itemvec.errors import TableError
from training.config import InteractionsConfig
from training.folds import TRAIN
from training.interactions import Interactions

RATED = InteractionsConfig(weight="stars", least=4)
LIKES = pa.table(
    {
        "user_id": ["ann", "ann", "bob", "bob", "cid", None, "ann"],
        "item_id": [7, 8, 8, 9, 7, 7, 8],  # numbers, where ids are text; 9 is not in the table; ann rated 8 twice
        "stars": [5, 4, 4, 5, 1, 5, 5],
    }
)
FOLD = np.full(3, TRAIN, np.int8)
IDS = ["6", "7", "8"]


@pytest.mark.parametrize("form", ["one file", "a folder", "csv"])
def test_a_like_is_a_user_and_a_row_of_the_table_once_however_the_likes_are_kept(tmp_path, form):
    place = tmp_path / ("likes.csv" if form == "csv" else "likes.parquet")
    if form == "csv":
        csv.write_csv(LIKES, place)
    elif form == "one file":
        pq.write_table(LIKES, place)
    else:  # each file has its own users
        place.mkdir()
        for at in range(0, 7, 2):
            pq.write_table(LIKES.slice(at, 2), place / f"{at}.parquet")
    for ids in (IDS, pa.chunked_array([["6", "7"], ["8"]]), pa.chunked_array([[6, 7, 8]])):
        likes = Interactions.read(str(place), RATED, ids, FOLD).likes
        # ann 7 and 8, bob 8; cid liked nothing, and nobody is no user.
        assert likes.toarray().tolist() == [[0, 1, 1], [0, 0, 1]]


def test_likes_of_other_items_are_refused_with_examples_of_both(tmp_path):
    pq.write_table(LIKES, tmp_path / "likes.parquet")
    with pytest.raises(TableError, match=r"none of its 6 rows .* such as '7', '8'; ids are such as 'film 1'"):
        Interactions.read(str(tmp_path / "likes.parquet"), RATED, ["film 1"], FOLD[:1])
    pq.write_table(LIKES.drop_columns(["stars"]), tmp_path / "likes.parquet")
    with pytest.raises(TableError, match=r"has no column 'stars': name the one .*interactions\.weight"):
        Interactions.read(str(tmp_path / "likes.parquet"), RATED, IDS, FOLD)
    for stars, said in (([1] * 7, "no row has 'stars' of at least"), (["good"] * 7, "column 'stars' is string")):
        rated = LIKES.set_column(LIKES.column_names.index("stars"), "stars", pa.array(stars))
        pq.write_table(rated, tmp_path / "likes.parquet")
        with pytest.raises(TableError, match=said):
            Interactions.read(str(tmp_path / "likes.parquet"), RATED, IDS, FOLD)
