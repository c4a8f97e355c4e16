"""Any messages at all: a session answers, refuses or ends the connection, and never asks for what makes no sense."""

import random
from collections.abc import Iterator

import pytest

from tests.pure.test_session import ADDRESS, FEATURES, GUEST, HIGH, NEED_REPLY, FrontEnd, make
from vhost import effect
from vhost.effect import Effect
from vhost.message import (
    U64,
    ConfigWindow,
    MemorySlot,
    MemoryTable,
    ProtocolViolation,
    Request,
    VringAddress,
    VringState,
)
from vhost.session import PROTOCOL_FEATURES, RULES

SEEDS = 1500
LENGTH = 40
EFFECTS_MAX = 64  # of one message to a device of four rings

VALID: list[tuple[int, bytes, int]] = [
    (Request.SET_FEATURES, U64(FEATURES | 1 << 30).pack(), 0),
    (Request.SET_FEATURES, U64(FEATURES).pack(), 0),
    (Request.SET_PROTOCOL_FEATURES, U64(PROTOCOL_FEATURES).pack(), 0),
    (Request.SET_MEM_TABLE, MemoryTable((GUEST,)).pack(), 1),
    (Request.SET_MEM_TABLE, MemoryTable((GUEST, HIGH)).pack(), 2),
    (Request.ADD_MEM_REG, MemorySlot(HIGH).pack(), 1),
    (Request.REM_MEM_REG, MemorySlot(HIGH).pack(), 0),
    *((Request.SET_VRING_NUM, VringState(index, 128).pack(), 0) for index in range(4)),
    *((Request.SET_VRING_BASE, VringState(index, 7).pack(), 0) for index in range(4)),
    *(
        (
            Request.SET_VRING_ADDR,
            VringAddress(i, i & 1, ADDRESS.descriptor, ADDRESS.used, ADDRESS.available, 0).pack(),
            0,
        )
        for i in range(4)
    ),
    *((Request.SET_VRING_ENABLE, VringState(index, 1).pack(), 0) for index in range(4)),
    *((Request.GET_VRING_BASE, VringState(index, 0).pack(), 0) for index in range(4)),
    *((request, U64(index).pack(), 1) for index in range(4) for request in (12, 13, 14)),
    *((request, U64(index | U64.NO_FD).pack(), 0) for index in range(4) for request in (12, 13, 14)),
    (Request.SET_LOG_BASE, bytes(16), 1),
    (Request.SET_LOG_FD, b"", 1),
    (Request.SET_BACKEND_REQ_FD, b"", 1),
    (Request.GET_INFLIGHT_FD, bytes(16) + b"\4\0\x80\0" + bytes(4), 0),
    (Request.SET_INFLIGHT_FD, b"\0\x10" + bytes(14) + b"\4\0\x80\0" + bytes(4), 1),
    (Request.GET_CONFIG, ConfigWindow(0, 60, 0, bytes(60)).pack(), 0),
    (Request.SET_CONFIG, ConfigWindow(32, 1, 0, b"\0").pack(), 0),
    (Request.SET_STATUS, U64(0).pack(), 0),
    (Request.SET_STATUS, U64(15).pack(), 0),
    *((request, b"", 0) for request in (1, 3, 4, 15, 17, 34, 36, 40)),
]


def test_every_request_is_in_the_sequences() -> None:
    assert {request for request, _, _ in VALID} == set(RULES)


def messages(rng: random.Random) -> Iterator[tuple[int, bytes, int, int]]:
    """Mostly valid messages in any order; some with other bytes, lengths, flags, fds; some of no kind at all."""
    yield Request.SET_PROTOCOL_FEATURES, U64(PROTOCOL_FEATURES).pack(), 0, 1
    for _ in range(LENGTH):
        request, payload, nfds = rng.choice(VALID)
        flags = rng.choice([1, 1, NEED_REPLY])
        match rng.randrange(12):
            case 0 if payload:
                changed = bytearray(payload)
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
                payload = bytes(changed)
            case 1:
                nfds = rng.randrange(9)
            case 2:
                payload = rng.randbytes(rng.randrange(280))
            case 3:
                request, flags = rng.randrange(50), rng.randrange(16)
            case _:
                pass
        yield request, payload, nfds, flags


class Backend:
    """Follows what a session asks for, and objects to what no worker could do."""

    def __init__(self, front_end: FrontEnd) -> None:
        self.session = front_end.session
        self.running: set[int] = set()

    def check(self, request: int, flags: int, effects: list[Effect]) -> None:
        assert len(effects) <= EFFECTS_MAX
        replies = [one for one in effects if isinstance(one, effect.Reply)]
        assert len(replies) <= 1
        assert all(one.request == request for one in replies)
        assert not replies or effects[-1] is replies[0]  # done before it is said
        if request in RULES and RULES[request].replies and not isinstance(effects[-1], effect.ShareInflight):
            assert replies
        for one in effects:
            self._follow(one)
        assert len(self.session.regions) <= self.session.offer.max_regions

    def _follow(self, wanted: Effect) -> None:
        match wanted:
            case effect.StartQueue():
                assert wanted.index not in self.running
                assert wanted.size < 1 << 32
                assert wanted.base < 1 << 32
                self.running.add(wanted.index)
            case effect.StopQueue(index):
                self.running.discard(index)
            case effect.SetMemory(regions):
                places = sorted((region.guest_address, region.guest_address + region.size) for region in regions)
                assert all(start < end <= 1 << 64 for start, end in places)
                assert all(places[i][1] <= places[i + 1][0] for i in range(len(places) - 1))
            case effect.SetKick(index) | effect.SetCall(index) | effect.SetErr(index) | effect.EnableQueue(index):
                assert index < 4
            case _:
                pass


@pytest.mark.parametrize("fail", [None, effect.SetMemory, effect.StartQueue, effect.Flush, effect.TrackInflight])
def test_any_messages_are_answered_or_end_the_connection(fail: type | None) -> None:
    ends: list[str] = []
    for seed in range(SEEDS // 5):
        front_end = make()
        front_end.fail = fail
        backend = Backend(front_end)
        for request, payload, nfds, flags in messages(random.Random(seed)):
            try:
                effects = front_end.send(request, payload, flags=flags, nfds=nfds)
            except (ProtocolViolation, OSError) as end:
                ends.append(str(end))
                break
            if fail is None:
                backend.check(request, flags, effects)
    assert ends
    assert all(end and "\n" not in end for end in ends)
