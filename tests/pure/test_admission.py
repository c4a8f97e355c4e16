"""Requests that wait for the engine: few are under way, and no queue keeps the others waiting."""

from dataclasses import dataclass

import pytest

from vhost.admission import LIMIT, SHARE, Admission

pytestmark = pytest.mark.pure


@dataclass(frozen=True)
class Asked:
    queue: int
    number: int


class Engine:
    """Notes what is begun; ends it when told, or at once."""

    def __init__(self, *, at_once: bool = False) -> None:
        self.begun: list[Asked] = []
        self.admission: Admission[Asked] = Admission(self._begin)
        self._at_once = at_once

    def _begin(self, asked: Asked) -> None:
        self.begun.append(asked)
        if self._at_once:
            self.admission.end(asked.queue)

    def offer(self, queue: int, count: int) -> None:
        for number in range(count):
            self.admission.offer(Asked(queue, number))


def test_so_many_are_under_way_and_no_more() -> None:
    engine = Engine()
    engine.offer(0, 65536)
    assert engine.begun == [Asked(0, number) for number in range(LIMIT)]
    engine.admission.end(0)
    assert engine.begun[LIMIT:] == [Asked(0, LIMIT)]


def test_a_queue_has_its_share_whatever_another_one_waits_for() -> None:
    engine = Engine()
    engine.offer(0, 2 * LIMIT)
    engine.offer(1, 2 * SHARE)
    assert engine.begun[LIMIT:] == [Asked(1, number) for number in range(SHARE)]
    engine.admission.end(1)
    assert engine.begun[-1] == Asked(1, SHARE)


def test_queues_that_wait_take_turns() -> None:
    engine = Engine()
    for queue in range(3):
        engine.offer(queue, 2 * LIMIT)
    del engine.begun[:]
    for _ in range(2 * SHARE + 30):
        engine.admission.end(0)
    assert [sum(asked.queue == queue for asked in engine.begun) for queue in range(3)] == [10, 10, 10]


def test_what_ends_at_once_is_begun_in_order_and_never_from_within() -> None:
    engine = Engine(at_once=True)
    engine.offer(0, 5000)
    assert engine.begun == [Asked(0, number) for number in range(5000)]
