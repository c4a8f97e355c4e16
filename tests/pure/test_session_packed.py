"""The session and packed rings: sizes that are no power of two, bases of two positions."""

from typing import Any

import pytest

from tests.pure.test_session import ADDRESS, BIT30, FEATURES, FrontEnd, make
from vhost import effect
from vhost.message import U64, Request, VringState


@pytest.fixture
def front_end() -> FrontEnd:
    it = make()
    it.send(Request.SET_FEATURES, U64(FEATURES | BIT30))
    return it


def started(done: list[Any]) -> effect.StartQueue:
    (found,) = [one for one in done if isinstance(one, effect.StartQueue)]
    return found


@pytest.mark.parametrize("size", [1, 3, 1000, 1024])
def test_any_size_will_do(front_end: FrontEnd, size: int) -> None:
    front_end.configure(size=size)
    ring = started(front_end.kick())
    assert (ring.size, ring.packed, ring.event_idx) == (size, True, True)


def test_base_is_the_one_it_was_given(front_end: FrontEnd) -> None:
    front_end.configure(base=0x8001_0007)
    assert started(front_end.kick()).base == 0x8001_0007


def test_ring_without_a_base_begins_in_the_first_lap(front_end: FrontEnd) -> None:
    front_end.send(Request.SET_VRING_NUM, VringState(0, 128))
    front_end.send(Request.SET_VRING_ADDR, ADDRESS)
    assert started(front_end.kick()).base == 0x8000_8000


def test_base_that_it_stopped_at_is_told_whole(front_end: FrontEnd) -> None:
    front_end.configure(base=0x8000_8000)
    front_end.kick()
    front_end.base = 0xFFFF_FFFF
    done = front_end.send(Request.GET_VRING_BASE, VringState(0, 0))
    assert done[-1] == effect.Reply(Request.GET_VRING_BASE, VringState(0, 0xFFFF_FFFF).pack())
