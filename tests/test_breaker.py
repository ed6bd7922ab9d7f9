import pytest

from itemvec.errors import StoreUnavailable
from service.breaker import Breaker


def test_the_breaker_opens_after_failures_in_a_row_and_lets_one_call_try_after_twice_as_long_each_time() -> None:
    now = 0.0
    breaker = Breaker(failures=3, pause=0.25, longest=1.0, clock=lambda: now)
    for _ in range(2):
        breaker.failure()
    breaker.success()
    for _ in range(3):
        breaker.enter()
        breaker.failure()
    assert breaker.is_open
    now = 0.125
    with pytest.raises(StoreUnavailable) as refusal:
        breaker.enter()
    assert refusal.value.retry_after == 0.125
    now = 0.25
    breaker.enter()
    with pytest.raises(StoreUnavailable):  # one is trying already
        breaker.enter()
    now = 0.75
    breaker.enter()  # that one was given up by its caller; the next may try
    breaker.failure()
    now = 1.5
    with pytest.raises(StoreUnavailable) as refusal:  # 0.25 + 0.5 + 1 = 1.75
        breaker.enter()
    assert refusal.value.retry_after == 0.25
    now = 1.75
    breaker.enter()
    breaker.success()
    breaker.enter()
    breaker.enter()
    assert not breaker.is_open
