from concurrent.futures import ThreadPoolExecutor

import pytest

from training.tasks import Others, ahead


def test_results_come_in_order_and_few_wait_to_be_taken():
    begun = []
    with ThreadPoolExecutor(1) as pool:
        squares = ahead(Others(pool.submit, 1), lambda n: begun.append(n) or n * n, [(n,) for n in range(9)])
        assert next(squares) == 0
        assert max(begun) <= 2  # a core and two results
        assert list(squares) == [1, 4, 9, 16, 25, 36, 49, 64]


def test_what_fails_there_is_raised_here():
    with ThreadPoolExecutor(1) as pool, pytest.raises(ZeroDivisionError):
        list(ahead(Others(pool.submit, 1), lambda n: 1 // n, [(1,), (0,)]))
