"""Range locks: overlapping holders take turns in the order they came, others do not wait."""

import random

import pytest

from qcow2.driver.crash import CrashDriver
from qcow2.operation import Grace
from qcow2.rangelock import RangeLocks

pytestmark = pytest.mark.pure


def test_holders_that_overlap_exclude_each_other_and_go_in_order() -> None:
    driver, locks, draw = CrashDriver(7), RangeLocks(), random.Random(7)
    held: dict[int, int] = {}  # number -> who holds it
    order: list[tuple[int, int, int]] = []

    async def take(me: int, first: int, last: int) -> None:
        async with locks.hold(first, last):
            numbers = range(first, last + 1)
            assert not held.keys() & set(numbers)
            held.update(dict.fromkeys(numbers, me))
            order.append((me, first, last))
            for _ in range(draw.randrange(4)):
                await Grace()
            for number in numbers:
                assert held.pop(number) == me

    for me in range(200):
        first = draw.randrange(30)
        driver.spawn(take(me, first, first + draw.randrange(6)))
    driver.finish()
    assert len(order) == 200
    for position, (me, first, last) in enumerate(order):
        overtaken = [o for o, start, end in order[position + 1 :] if o < me and start <= last and first <= end]
        assert not overtaken


def test_a_holder_that_fails_lets_go() -> None:
    driver, locks = CrashDriver(), RangeLocks()

    async def fail() -> None:
        async with locks.hold(1, 5):
            await Grace()
            raise ValueError

    async def follow() -> bool:
        async with locks.hold(5, 6) as hold:
            return hold.was_immediate

    driver.spawn(fail(), lambda task: None)
    assert driver.run(follow()) is False
