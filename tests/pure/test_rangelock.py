"""Range locks: overlapping holders take turns in the order they came, others do not wait."""

import random
import sys
import tracemalloc
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from qcow2.driver.operation import Grace
from qcow2.engine import rangelock
from qcow2.engine.rangelock import RangeLocks
from tests.crash.driver import CrashDriver

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


@pytest.mark.parametrize("widest", [60, 2000, 40000])
def test_wide_holders_take_turns_with_narrow_ones_too(widest: int) -> None:
    driver, locks, draw = CrashDriver(7), RangeLocks(), random.Random(widest)
    held: list[tuple[int, int, int]] = []
    order: list[tuple[int, int, int]] = []

    async def take(mine: tuple[int, int, int]) -> None:
        _, first, last = mine
        async with locks.hold(first, last):
            assert not [1 for _, start, end in held if start <= last and first <= end]
            held.append(mine)
            order.append(mine)
            for _ in range(draw.randrange(4)):
                await Grace()
            held.remove(mine)

    for me in range(200):
        first = draw.randrange(widest)
        driver.spawn(take((me, first, first + draw.choice((0, 0, 31, 32, draw.randrange(widest))))))
    driver.finish()
    assert len(order) == 200
    for position, (me, first, last) in enumerate(order):
        assert not [1 for o, start, end in order[position + 1 :] if o < me and start <= last and first <= end]


def steps(run: Callable[[], Any]) -> int:
    """Lines of `qcow2.engine.rangelock` that *run* executes; its loops are all Python's."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename != rangelock.__file__:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("stride", [0, 1, 1000])
def test_a_request_costs_the_same_however_many_are_under_way(stride: int) -> None:
    async def take(locks: RangeLocks, number: int) -> None:
        async with locks.hold(number, number):
            await Grace()

    def run(nholders: int) -> None:
        driver, locks = CrashDriver(), RangeLocks()
        for me in range(nholders):
            driver.spawn(take(locks, me * stride))
        driver.finish()

    few, many = steps(lambda: run(100)), steps(lambda: run(800))
    assert many <= 8 * few + 8


def test_what_waits_takes_memory_in_proportion_to_its_number() -> None:
    locks = RangeLocks()
    tracemalloc.start()
    try:
        holds = [locks.hold(0, 0) for _ in range(10_000)]
        assert tracemalloc.get_traced_memory()[0] < len(holds) * 400
    finally:
        tracemalloc.stop()


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
