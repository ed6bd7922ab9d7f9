import numpy as np
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from itemvec.sparse import Csr

COLUMNS = 5
rows_of_columns = st.lists(st.sets(st.integers(0, COLUMNS - 1)).map(sorted), max_size=6)


def as_scipy(matrix):
    return sp.csr_matrix((matrix.data, matrix.indices, matrix.indptr), matrix.shape)


@given(rows_of_columns)
def test_it_is_the_matrix_that_scipy_builds_from_the_same_arrays(rows):
    matrix = Csr.of_rows(rows, COLUMNS)
    assert matrix.shape == (len(rows), COLUMNS)
    assert np.array_equal(matrix.toarray(), as_scipy(matrix).toarray())
    assert as_scipy(matrix).has_canonical_format


@given(st.lists(st.tuples(*[st.sets(st.integers(0, COLUMNS - 1)).map(sorted)] * 3), min_size=1, max_size=6))
def test_blocks_beside_each_other_are_scipys_hstack(rows):
    blocks = [Csr.of_rows(block, COLUMNS) for block in zip(*rows, strict=True)]
    together = Csr.beside(blocks)
    assert np.array_equal(together.toarray(), sp.hstack([as_scipy(b) for b in blocks]).toarray())
    assert as_scipy(together).has_canonical_format


@given(st.lists(rows_of_columns, min_size=1, max_size=4))
def test_stacked_blocks_are_scipys_vstack(parts):
    blocks = [Csr.of_rows(rows, COLUMNS) for rows in parts]
    assert np.array_equal(Csr.stacked(blocks).toarray(), np.concatenate([b.toarray() for b in blocks]))


@given(rows_of_columns, st.integers(0, COLUMNS))
def test_the_tail_is_the_columns_from_there_on(rows, first):
    matrix = Csr.of_rows(rows, COLUMNS)
    assert np.array_equal(matrix.tail(first).toarray(), matrix.toarray()[:, first:])
