"""Errors come back from other processes as they were."""

import pickle

import pytest

from itemvec.errors import FieldError, InvalidItem, SchemaMismatch, StoreUnavailable, VersionNotFound


@pytest.mark.parametrize(
    "error",
    [
        SchemaMismatch("films.parquet", ["it has no column 'genres'"]),
        InvalidItem([FieldError("/1/runtime_minutes", "expected a number, got null")]),
        VersionNotFound("movies", 9, [1, 2]),
        StoreUnavailable("Redis is down", retry_after=0.5),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_crosses_between_processes_with_all_that_it_says(error):
    back = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert type(back) is type(error) and str(back) == str(error) and vars(back) == vars(error)
