import pytest

from itemvec.errors import StoreUnavailable
from service.breaker import Breaker


def test_the_breaker_opens_after_failures_in_a_row_and_lets_one_call_try_each_second() -> None:
    now = 0.0
    breaker = Breaker(failures=3, pause=1.0, clock=lambda: now)
    for _ in range(2):
        breaker.failure()
    breaker.success()
    for _ in range(3):
        breaker.enter()
        breaker.failure()
    assert breaker.is_open
    now = 0.75
    with pytest.raises(StoreUnavailable) as refusal:
        breaker.enter()
    assert refusal.value.retry_after == 0.25
    now = 1.0
    breaker.enter()
    with pytest.raises(StoreUnavailable):  # one is trying already
        breaker.enter()
    now = 2.0
    breaker.enter()  # that one was given up by its caller; the next may try
    breaker.success()
    breaker.enter()
    breaker.enter()
    assert not breaker.is_open
