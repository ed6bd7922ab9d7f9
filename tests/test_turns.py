"""How many calls may be on their way to Redis at once."""

import asyncio

import pytest

from service.turns import Turns

pytestmark = pytest.mark.anyio


async def entered(turns: Turns) -> int:
    """Takes all that there are."""
    count = 0
    while not turns.all_taken():
        await turns.take()
        count += 1
    return count


async def test_quick_calls_raise_the_number_by_one_a_round_up_to_the_most() -> None:
    turns = Turns(most=7, slow=0.06)
    assert await entered(turns) == 5
    for _ in range(5):  # a round of five
        turns.give_back(0.001)
    assert await entered(turns) == 6
    for _ in range(6 + 7 + 8):
        turns.give_back(0.001)
        await turns.take()
    assert turns.limit == 7


async def test_a_slow_call_halves_the_number_once_in_the_time_that_is_slow() -> None:
    now = 0.0
    turns = Turns(most=16, slow=0.06, clock=lambda: now)
    for _ in range(5 + 6 + 7 + 8 + 9 + 10 + 11):  # 5 -> 12
        await turns.take()
        turns.give_back(0.001)
    assert await entered(turns) == 12
    turns.give_back(0.07)  # 12 -> 6: five of the eleven under way are beyond that
    for _ in range(5):
        turns.give_back(0.07)
    assert turns.limit == 6 and turns.all_taken()
    turns.give_back(None)  # no call was made, which tells nothing
    assert await entered(turns) == 1
    now = 0.1
    turns.give_back(0.07)  # 6 -> 5, the fewest
    assert turns.limit == 5 and turns.all_taken()


async def test_calls_that_a_server_does_one_after_the_other_stay_few() -> None:
    """Each takes it 5 ms: with twelve or more at once the last would take the 60 ms that a call may. Quick calls would
    have come to sixteen after 5 + 6 + ... + 15 = 110."""
    turns, server = Turns(most=16, slow=0.03), asyncio.Lock()

    async def call() -> None:
        await turns.take()
        began = asyncio.get_running_loop().time()
        async with server:
            await asyncio.sleep(0.005)
        turns.give_back(asyncio.get_running_loop().time() - began)

    await asyncio.gather(*(call() for _ in range(130)))
    assert turns.limit < 12
