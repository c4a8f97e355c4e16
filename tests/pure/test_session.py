"""The session as a state machine: messages in, effects out. No socket, no fd, no worker."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from vhost import effect
from vhost.effect import Effect
from vhost.message import (
    U64,
    ConfigWindow,
    Inflight,
    Log,
    MemorySlot,
    MemoryTable,
    Message,
    ProtocolFeature,
    ProtocolViolation,
    Region,
    Request,
    VringAddress,
    VringState,
)
from vhost.session import PROTOCOL_FEATURES, Offer, Session
from virtio.config import Properties, block_config
from virtio.feature import BlockFeature, RingFeature, offered_features

FEATURES = offered_features(read_only=False)
SPLIT = FEATURES ^ RingFeature.RING_PACKED
BIT30 = 1 << 30
LOG_ALL = 1 << 26
NEED_REPLY = 0x9
GUEST = Region(guest_address=0, size=1 << 20, user_address=0x7F0000000000, mmap_offset=0)
HIGH = Region(guest_address=1 << 32, size=1 << 20, user_address=0x7F0000100000, mmap_offset=1 << 20)
ADDRESS = VringAddress(0, 0, descriptor=0x7F0000001000, used=0x7F0000003000, available=0x7F0000002000, log=0)


@dataclass
class FrontEnd:
    """Plays messages against a session and collects what it wants done.

    Answers StopQueue with *base*, TrackInflight with *noted*, StartQueue with *rings*.
    """

    session: Session
    base: int = 0
    rings: bool = True  # what it configures is a ring
    noted: bool | None = None  # the wce that an in-flight region carries
    fail: type | None = None  # effects of this type fail
    log: list[Effect] = field(default_factory=list)

    def send(self, request: int, payload: Any = b"", *, flags: int = 1, nfds: int = 0) -> list[Effect]:
        data = payload if isinstance(payload, bytes) else payload.pack()
        done = list(self._play(self.session.receive(Message(request, flags, data, nfds))))
        self.log += done
        return done

    def _play(self, steps: Any) -> Iterator[Effect]:
        result: Any = None
        error: OSError | None = None
        while True:
            try:
                wanted = steps.throw(error) if error else steps.send(result)
            except StopIteration:
                return
            yield wanted
            answers = {
                effect.StopQueue: self.base,
                effect.TrackInflight: self.noted,
                effect.StartQueue: self.rings,
            }
            result = answers.get(type(wanted))
            error = OSError(5, "made to fail") if self.fail and isinstance(wanted, self.fail) else None

    def u64(self, request: int) -> int:
        (reply,) = self.send(request)
        assert isinstance(reply, effect.Reply)
        assert reply.request == request
        return U64.parse(reply.payload).value

    def configure(self, index: int = 0, *, size: int = 128, base: int = 0) -> None:
        address = VringAddress(index, 0, ADDRESS.descriptor, ADDRESS.used, ADDRESS.available, 0)
        self.send(Request.SET_VRING_NUM, VringState(index, size))
        self.send(Request.SET_VRING_BASE, VringState(index, base))
        self.send(Request.SET_VRING_ADDR, address)

    def kick(self, index: int = 0) -> list[Effect]:
        return self.send(Request.SET_VRING_KICK, U64(index), nfds=1)


def make(*, read_only: bool = False, wce: bool = True, num_queues: int = 4) -> FrontEnd:
    config = block_config(Properties(size=1 << 30, read_only=read_only), num_queues=num_queues, wce=wce)
    offer = Offer(offered_features(read_only=read_only), num_queues, 3, config.pack())
    return FrontEnd(Session(offer, wce=wce))


@pytest.fixture
def front_end() -> FrontEnd:
    """A front-end that negotiated all but packed rings, as QEMU does."""
    it = make()
    it.send(Request.SET_PROTOCOL_FEATURES, U64(PROTOCOL_FEATURES))
    it.send(Request.SET_FEATURES, U64(SPLIT | BIT30))
    it.log.clear()
    return it


def kinds(effects: list[Effect]) -> list[type]:
    return [type(one) for one in effects]


# Negotiation


def test_features_are_the_offer_and_those_of_vhost_user() -> None:
    assert make().u64(Request.GET_FEATURES) == FEATURES | BIT30 | LOG_ALL


def test_only_what_works_is_offered_as_protocol_features() -> None:
    offered = make().u64(Request.GET_PROTOCOL_FEATURES)
    assert {bit for bit in range(64) if offered >> bit & 1} == {0, 1, 3, 5, 9, 12, 13, 15, 16}


def test_queue_number_is_the_maximum(front_end: FrontEnd) -> None:
    assert front_end.u64(Request.GET_QUEUE_NUM) == 4


def test_features_that_were_not_offered_end_the_connection() -> None:
    with pytest.raises(ProtocolViolation, match="0x8000000000000000"):
        make().send(Request.SET_FEATURES, U64(FEATURES | 1 << 63))


@pytest.mark.parametrize("bit", [1, 4, 17, 27, 37])
def test_features_between_driver_and_front_end_are_accepted(bit: int) -> None:
    """QEMU hands on whatever its guest has accepted, which it had offered by itself or for an earlier back-end."""
    assert make().send(Request.SET_FEATURES, U64(FEATURES | BIT30 | 1 << bit)) == [effect.SetWriteCache(writeback=True)]


@pytest.mark.parametrize("bit", [33, 35, 40])
def test_features_that_change_rings_and_were_not_offered_end_the_connection(bit: int) -> None:
    with pytest.raises(ProtocolViolation, match="were not offered"):
        make().send(Request.SET_FEATURES, U64(FEATURES | BIT30 | 1 << bit))


def test_protocol_features_that_were_not_offered_end_the_connection() -> None:
    with pytest.raises(ProtocolViolation, match="0x4000"):
        make().send(Request.SET_PROTOCOL_FEATURES, U64(PROTOCOL_FEATURES | 1 << 14))


def test_legacy_driver_is_accepted() -> None:
    done = make().send(Request.SET_FEATURES, U64(int(BlockFeature.FLUSH) | BIT30))
    assert done == [effect.SetWriteCache(writeback=True)]


def test_message_of_a_feature_not_negotiated_ends_the_connection() -> None:
    with pytest.raises(ProtocolViolation, match="request GET_QUEUE_NUM"):
        make().send(Request.GET_QUEUE_NUM)


@pytest.mark.parametrize("request_number", [0, 19, 20, 22, 41, 44, 2**32 - 1])
def test_unknown_request_ends_the_connection(front_end: FrontEnd, request_number: int) -> None:
    with pytest.raises(ProtocolViolation, match="is unknown or was not negotiated"):
        front_end.send(request_number)


@pytest.mark.parametrize("flags", [0, 2, 3, 5, 0x11, 0x80000001])
def test_wrong_header_flags_end_the_connection(front_end: FrontEnd, flags: int) -> None:
    with pytest.raises(ProtocolViolation, match="flags"):
        front_end.send(Request.SET_OWNER, flags=flags)


# The write cache


def writeback(effects: list[Effect]) -> list[bool]:
    return [one.writeback for one in effects if isinstance(one, effect.SetWriteCache)]


def test_without_flush_the_device_is_writethrough() -> None:
    it = make(wce=True)
    assert writeback(it.send(Request.SET_FEATURES, U64(int(RingFeature.VERSION_1) | BIT30))) == [False]


def test_every_set_features_is_judged_anew() -> None:
    it = make(wce=True)
    it.send(Request.SET_FEATURES, U64(BIT30))
    assert writeback(it.send(Request.SET_FEATURES, U64(FEATURES | BIT30))) == [True]


def test_switching_wce_off_flushes_before_the_acknowledgement(front_end: FrontEnd) -> None:
    done = front_end.send(Request.SET_CONFIG, ConfigWindow(32, 1, 0, b"\0"), flags=NEED_REPLY)
    assert done == [
        effect.SetWriteCache(writeback=False),
        effect.Flush(),
        effect.Reply(Request.SET_CONFIG, U64(0).pack()),
    ]


def test_cloud_hypervisor_s_flag_does_not_matter(front_end: FrontEnd) -> None:
    front_end.send(Request.SET_CONFIG, ConfigWindow(32, 1, 1, b"\0"))
    assert not front_end.session.wce


def test_switching_wce_on_does_not_flush(front_end: FrontEnd) -> None:
    front_end.send(Request.SET_CONFIG, ConfigWindow(32, 1, 0, b"\0"))
    done = front_end.send(Request.SET_CONFIG, ConfigWindow(32, 1, 0, b"\1"))
    assert done == [effect.SetWriteCache(writeback=True)]


def test_failed_flush_refuses_the_switch_and_stays_in_writeback(front_end: FrontEnd) -> None:
    front_end.fail = effect.Flush
    done = front_end.send(Request.SET_CONFIG, ConfigWindow(32, 1, 0, b"\0"), flags=NEED_REPLY)
    assert done[-2:] == [effect.SetWriteCache(writeback=True), effect.Reply(Request.SET_CONFIG, U64(1).pack())]
    assert front_end.session.wce


@pytest.mark.parametrize(
    "window",
    [
        ConfigWindow(0, 8, 0, bytes(8)),
        ConfigWindow(31, 1, 0, b"\0"),
        ConfigWindow(32, 2, 0, bytes(2)),
        ConfigWindow(32, 1, 2, b"\0"),
        ConfigWindow(32, 1, 0, b"\2"),
        ConfigWindow(32, 0, 0, b""),
    ],
)
def test_other_configuration_writes_are_refused(front_end: FrontEnd, window: ConfigWindow) -> None:
    done = front_end.send(Request.SET_CONFIG, window, flags=NEED_REPLY)
    assert done == [effect.Reply(Request.SET_CONFIG, U64(1).pack())]


def test_read_only_device_refuses_to_switch_its_cache() -> None:
    it = make(read_only=True)
    it.send(Request.SET_PROTOCOL_FEATURES, U64(PROTOCOL_FEATURES))
    done = it.send(Request.SET_CONFIG, ConfigWindow(32, 1, 0, b"\0"), flags=NEED_REPLY)
    assert done == [effect.Reply(Request.SET_CONFIG, U64(1).pack())]


@pytest.mark.parametrize("reset", [(Request.RESET_DEVICE, b""), (Request.SET_STATUS, U64(0))])
def test_reset_keeps_wce(front_end: FrontEnd, reset: tuple[int, Any]) -> None:
    front_end.send(Request.SET_CONFIG, ConfigWindow(32, 1, 0, b"\0"))
    front_end.send(*reset)
    assert read_config(front_end, 32, 1) == b"\0"


# Configuration space


def read_config(front_end: FrontEnd, start: int, size: int) -> bytes:
    (reply,) = front_end.send(Request.GET_CONFIG, ConfigWindow(start, size, 0, bytes(size)))
    assert isinstance(reply, effect.Reply)
    window = ConfigWindow.parse(reply.payload)
    assert (window.start, window.size) == (start, size)
    return window.data


@pytest.mark.parametrize(("start", "size"), [(0, 57), (0, 36), (0, 60), (32, 1), (0, 256), (200, 56), (0, 0)])
def test_config_reply_has_the_size_asked_for(front_end: FrontEnd, start: int, size: int) -> None:
    space = front_end.session.offer.config.ljust(512, b"\0")
    assert read_config(front_end, start, size) == space[start : start + size]


# Rings


def test_ring_starts_with_its_kick_where_its_base_says(front_end: FrontEnd) -> None:
    front_end.configure(2, size=256, base=7)
    assert front_end.kick(2) == [
        effect.SetKick(2, has_fd=True),
        effect.TakeBackend(),
        effect.StartQueue(
            2, 256, ADDRESS.descriptor, ADDRESS.available, ADDRESS.used, base=7, event_idx=True, packed=False
        ),
    ]


def test_ring_kicked_too_early_starts_when_it_is_complete_and_enabled(front_end: FrontEnd) -> None:
    assert kinds(front_end.kick()) == [effect.SetKick]
    front_end.configure()
    done = front_end.send(Request.SET_VRING_ENABLE, VringState(0, 1))
    assert kinds(done) == [effect.EnableQueue, effect.TakeBackend, effect.StartQueue]


def test_call_and_err_come_before_any_features() -> None:
    it = make()
    assert it.send(Request.SET_VRING_CALL, U64(1), nfds=1) == [effect.SetCall(1, has_fd=True)]
    assert it.send(Request.SET_VRING_ERR, U64(1), nfds=1) == [effect.SetErr(1, has_fd=True)]


def test_no_fd_bit_takes_the_call_away(front_end: FrontEnd) -> None:
    assert front_end.send(Request.SET_VRING_CALL, U64(0x101)) == [effect.SetCall(1, has_fd=False)]


def test_rings_without_bit_30_are_enabled_by_set_features() -> None:
    done = make(num_queues=2).send(Request.SET_FEATURES, U64(FEATURES))
    assert done[1:] == [effect.EnableQueue(0, enabled=True), effect.EnableQueue(1, enabled=True)]


def test_rings_with_bit_30_wait_to_be_enabled() -> None:
    assert effect.EnableQueue not in kinds(make().send(Request.SET_FEATURES, U64(FEATURES | BIT30)))


def test_never_configured_ring_may_be_enabled(front_end: FrontEnd) -> None:
    done = front_end.send(Request.SET_VRING_ENABLE, VringState(3, 1), flags=NEED_REPLY)
    assert done == [effect.EnableQueue(3, enabled=True), effect.Reply(Request.SET_VRING_ENABLE, U64(0).pack())]


def test_get_vring_base_drains_then_replies(front_end: FrontEnd) -> None:
    front_end.configure(1)
    front_end.kick(1)
    front_end.base = 4321
    assert front_end.send(Request.GET_VRING_BASE, VringState(1, 0)) == [
        effect.StopQueue(1),
        effect.LetGoOfBackend(),
        effect.Reply(Request.GET_VRING_BASE, VringState(1, 4321).pack()),
    ]


def test_base_of_a_ring_that_never_ran_is_the_one_it_was_given(front_end: FrontEnd) -> None:
    front_end.send(Request.SET_VRING_BASE, VringState(1, 9))
    done = front_end.send(Request.GET_VRING_BASE, VringState(1, 0))
    assert done[-1] == effect.Reply(Request.GET_VRING_BASE, VringState(1, 9).pack())


def test_stopped_ring_starts_again_where_it_stopped(front_end: FrontEnd) -> None:
    front_end.configure()
    front_end.kick()
    front_end.base = 77
    front_end.send(Request.GET_VRING_BASE, VringState(0, 0))
    start = front_end.kick()[-1]
    assert isinstance(start, effect.StartQueue)
    assert start.base == 77


def test_running_ring_may_be_told_its_address_again(front_end: FrontEnd) -> None:
    front_end.configure()
    front_end.kick()
    log = VringAddress(0, 1, ADDRESS.descriptor, ADDRESS.used, ADDRESS.available, 0x1000)
    assert front_end.send(Request.SET_VRING_ADDR, log) == [effect.LogQueue(0, 0x1000)]


@pytest.mark.parametrize(
    ("request_number", "payload"),
    [
        (Request.SET_VRING_NUM, VringState(0, 256)),
        (Request.SET_VRING_BASE, VringState(0, 0)),
        (Request.SET_VRING_ADDR, VringAddress(0, 0, 0x10, 0x20, 0x30, 0)),
    ],
)
def test_running_ring_is_stopped_before_it_changes(front_end: FrontEnd, request_number: int, payload: Any) -> None:
    front_end.configure()
    front_end.kick()
    assert front_end.send(request_number, payload) == [effect.StopQueue(0), effect.LetGoOfBackend()]


def test_rings_configured_anew_without_a_stop_start_anew(front_end: FrontEnd) -> None:
    front_end.configure(size=128)
    front_end.kick()
    front_end.send(Request.SET_VRING_ENABLE, VringState(0, 0))
    front_end.base = 500
    front_end.configure(size=128, base=0)
    start = front_end.kick()[-1]
    assert isinstance(start, effect.StartQueue)
    assert start.base == 0


@pytest.mark.parametrize(
    ("request_number", "payload", "nfds"),
    [
        (Request.SET_VRING_NUM, VringState(4, 128), 0),
        (Request.SET_VRING_ADDR, VringAddress(4, 0, 0x10, 0x20, 0x30, 0), 0),
        (Request.SET_VRING_BASE, VringState(4, 0), 0),
        (Request.GET_VRING_BASE, VringState(4, 0), 0),
        (Request.SET_VRING_ENABLE, VringState(4, 1), 0),
        (Request.SET_VRING_KICK, U64(4), 1),
        (Request.SET_VRING_CALL, U64(4), 1),
        (Request.SET_VRING_ERR, U64(0x104), 0),
        (Request.SET_VRING_NUM, VringState(2**32 - 1, 128), 0),
    ],
)
def test_ring_that_does_not_exist_ends_the_connection(
    front_end: FrontEnd, request_number: int, payload: Any, nfds: int
) -> None:
    with pytest.raises(ProtocolViolation, match="of 4"):
        front_end.send(request_number, payload, nfds=nfds)


def test_what_cannot_be_a_ring_does_not_start_and_the_others_do(front_end: FrontEnd) -> None:
    front_end.configure(0, size=0, base=7)
    front_end.configure(1)
    front_end.rings = False
    assert kinds(front_end.kick(0))[1:] == [effect.TakeBackend, effect.StartQueue, effect.LetGoOfBackend]
    front_end.rings = True
    assert kinds(front_end.kick(1))[1:] == [effect.TakeBackend, effect.StartQueue]
    done = front_end.send(Request.GET_VRING_BASE, VringState(0, 0))
    assert done == [effect.StopQueue(0), effect.Reply(Request.GET_VRING_BASE, VringState(0, 7).pack())]
    front_end.configure(0)
    assert kinds(front_end.kick(0))[1:] == [effect.StartQueue]


@pytest.mark.parametrize(
    ("request_number", "payload", "nfds", "words"),
    [
        (Request.SET_VRING_ADDR, VringAddress(0, 2, 0x10, 0x20, 0x30, 0), 0, "unknown flags"),
        (Request.SET_VRING_ENABLE, VringState(0, 2), 0, "neither 0 nor 1"),
        (Request.SET_VRING_KICK, U64(0x200), 1, "unknown bits"),
        (Request.SET_STATUS, U64(0x100), 0, "8 bits"),
    ],
)
def test_value_out_of_range_ends_the_connection(
    front_end: FrontEnd, request_number: int, payload: Any, nfds: int, words: str
) -> None:
    with pytest.raises(ProtocolViolation, match=words):
        front_end.send(request_number, payload, nfds=nfds)


# Memory


def test_memory_table_replaces_the_table(front_end: FrontEnd) -> None:
    done = front_end.send(Request.SET_MEM_TABLE, MemoryTable((GUEST, HIGH)), nfds=2, flags=NEED_REPLY)
    assert done == [
        effect.SetMemory((GUEST, HIGH)),
        effect.Reply(Request.SET_MEM_TABLE, U64(0).pack()),
    ]


def test_unmappable_memory_is_refused_when_an_answer_was_asked_for(front_end: FrontEnd) -> None:
    front_end.fail = effect.AddMemory
    done = front_end.send(Request.ADD_MEM_REG, MemorySlot(GUEST), nfds=1, flags=NEED_REPLY)
    assert done[-1] == effect.Reply(Request.ADD_MEM_REG, U64(1).pack())
    with pytest.raises(ProtocolViolation, match="no memory region"):
        front_end.send(Request.REM_MEM_REG, MemorySlot(GUEST))


def test_unmappable_memory_ends_the_connection_when_no_answer_was_asked_for(front_end: FrontEnd) -> None:
    front_end.fail = effect.AddMemory
    with pytest.raises(OSError, match="made to fail"):
        front_end.send(Request.ADD_MEM_REG, MemorySlot(GUEST), nfds=1)


def test_failure_before_a_natural_reply_ends_the_connection(front_end: FrontEnd) -> None:
    front_end.fail = effect.StopQueue
    with pytest.raises(OSError, match="made to fail"):
        front_end.send(Request.GET_VRING_BASE, VringState(0, 0), flags=NEED_REPLY)


@pytest.mark.parametrize("nfds", [0, 1])
def test_region_is_removed_by_its_addresses_whatever_fd_comes(front_end: FrontEnd, nfds: int) -> None:
    front_end.send(Request.SET_MEM_TABLE, MemoryTable((GUEST, HIGH)), nfds=2)
    wanted = Region(HIGH.guest_address, HIGH.size, HIGH.user_address, mmap_offset=0)
    assert front_end.send(Request.REM_MEM_REG, MemorySlot(wanted), nfds=nfds) == [effect.RemoveMemory(HIGH)]


def test_region_may_be_added_while_rings_run(front_end: FrontEnd) -> None:
    front_end.send(Request.SET_MEM_TABLE, MemoryTable((GUEST,)), nfds=1)
    front_end.configure()
    front_end.kick()
    assert front_end.send(Request.ADD_MEM_REG, MemorySlot(HIGH), nfds=1) == [effect.AddMemory(HIGH)]


def test_slots_are_limited(front_end: FrontEnd) -> None:
    assert front_end.u64(Request.GET_MAX_MEM_SLOTS) == 3
    for number in range(3):
        front_end.send(Request.ADD_MEM_REG, MemorySlot(Region(number << 20, 1 << 20, number << 20, 0)), nfds=1)
    with pytest.raises(ProtocolViolation, match="more than 3"):
        front_end.send(Request.ADD_MEM_REG, MemorySlot(Region(9 << 20, 1 << 20, 9 << 20, 0)), nfds=1)


@pytest.mark.parametrize(
    "region",
    [
        Region(0, 0, 0x7F0000000000, 0),
        Region(2**64 - 4096, 8192, 0x7F0000000000, 0),
        Region(0, 8192, 2**64 - 4096, 0),
        Region(0, 8192, 0x7F0000000000, 2**64 - 4096),
    ],
)
def test_impossible_region_ends_the_connection(front_end: FrontEnd, region: Region) -> None:
    with pytest.raises(ProtocolViolation, match="memory region"):
        front_end.send(Request.ADD_MEM_REG, MemorySlot(region), nfds=1)


@pytest.mark.parametrize("shift", [-(1 << 20) + 1, -4096, 0, 4096, (1 << 20) - 1])
def test_overlapping_regions_end_the_connection(front_end: FrontEnd, shift: int) -> None:
    other = Region(HIGH.guest_address + shift, 1 << 20, 0x1000, 0)
    with pytest.raises(ProtocolViolation, match="two memory regions"):
        front_end.send(Request.SET_MEM_TABLE, MemoryTable((HIGH, other)), nfds=2)


# Status and reset


def test_status_is_the_last_one_set(front_end: FrontEnd) -> None:
    front_end.send(Request.SET_STATUS, U64(0xF))
    assert front_end.u64(Request.GET_STATUS) == 0xF


@pytest.mark.parametrize("reset", [(Request.RESET_DEVICE, b""), (Request.SET_STATUS, U64(0))])
def test_reset_stops_and_disables_rings_and_keeps_memory(front_end: FrontEnd, reset: tuple[int, Any]) -> None:
    front_end.send(Request.SET_MEM_TABLE, MemoryTable((GUEST,)), nfds=1)
    front_end.configure()
    front_end.kick()
    front_end.send(Request.SET_VRING_ENABLE, VringState(0, 1))
    done = front_end.send(*reset)
    assert done == [effect.StopQueue(0), effect.LetGoOfBackend(), effect.EnableQueue(0, enabled=False)]
    assert list(front_end.session.regions) == [GUEST]
    assert front_end.session.status == 0


def test_base_is_known_after_a_status_of_0(front_end: FrontEnd) -> None:
    """QEMU 7.2 pauses a machine by it, and asks for the bases only then."""
    front_end.configure()
    front_end.kick()
    front_end.base = 1234
    front_end.send(Request.SET_STATUS, U64(0))
    front_end.base = 0  # of a queue that does not run
    done = front_end.send(Request.GET_VRING_BASE, VringState(0, 0))
    assert done[-1] == effect.Reply(Request.GET_VRING_BASE, VringState(0, 1234).pack())


def test_ring_begins_anew_after_a_reset_of_the_device(front_end: FrontEnd) -> None:
    """The specification resets "all internal device state to the initial state": also for who then sets no base."""
    front_end.configure()
    front_end.kick()
    front_end.base = 1234
    front_end.send(Request.RESET_DEVICE)
    front_end.send(Request.SET_VRING_NUM, VringState(0, 128))
    front_end.send(Request.SET_VRING_ADDR, ADDRESS)
    (start,) = (done for done in front_end.kick() if isinstance(done, effect.StartQueue))
    assert start.base == 0


def test_new_owner_finds_no_memory_and_no_ring(front_end: FrontEnd) -> None:
    # QEMU 7.2 keeps the connection of a device that is unplugged; the next device on it adds all memory again.
    front_end.send(Request.SET_MEM_TABLE, MemoryTable((GUEST,)), nfds=1)
    front_end.configure()
    front_end.kick()
    done = front_end.send(Request.SET_OWNER)
    assert done[:3] == [effect.StopQueue(0), effect.LetGoOfBackend(), effect.SetMemory(())]
    assert done[3:] == [effect.SetLog(None), effect.SetLogCall(has_fd=False)]
    assert front_end.send(Request.ADD_MEM_REG, MemorySlot(GUEST), nfds=1) == [effect.AddMemory(GUEST)]


def test_reset_ring_must_be_configured_again(front_end: FrontEnd) -> None:
    front_end.configure()
    front_end.kick()
    front_end.send(Request.RESET_DEVICE)
    assert kinds(front_end.kick()) == [effect.SetKick]


# Acknowledgements


def test_no_acknowledgement_without_need_reply(front_end: FrontEnd) -> None:
    assert front_end.send(Request.SET_OWNER) == []


def test_no_acknowledgement_unless_negotiated() -> None:
    assert make().send(Request.SET_OWNER, flags=NEED_REPLY) == []


def test_natural_reply_is_the_only_one(front_end: FrontEnd) -> None:
    assert len(front_end.send(Request.GET_FEATURES, flags=NEED_REPLY)) == 1


def test_acknowledgement_repeats_the_request(front_end: FrontEnd) -> None:
    assert front_end.send(Request.SET_OWNER, flags=NEED_REPLY) == [effect.Reply(Request.SET_OWNER, U64(0).pack())]


# What is under the device


def test_backend_is_held_from_the_first_ring_that_starts_to_the_last_that_stops(front_end: FrontEnd) -> None:
    held = []
    for index in (0, 1):
        front_end.configure(index)
        held.append(kinds(front_end.kick(index)).count(effect.TakeBackend))
    for index in (1, 0, 0):
        done = front_end.send(Request.GET_VRING_BASE, VringState(index, 0))
        held.append(-kinds(done).count(effect.LetGoOfBackend))
    assert held == [1, 0, 0, -1, 0]


def test_backend_is_let_go_before_the_front_end_knows_that_its_last_ring_stopped(front_end: FrontEnd) -> None:
    front_end.configure()
    front_end.kick()
    done = front_end.send(Request.GET_VRING_BASE, VringState(0, 0))
    assert kinds(done) == [effect.StopQueue, effect.LetGoOfBackend, effect.Reply]


# The dirty log


def test_log_base_is_answered_whether_or_not_the_front_end_asks_for_it(front_end: FrontEnd) -> None:
    for flags in (1, NEED_REPLY):
        done = front_end.send(Request.SET_LOG_BASE, Log(4096, 8192), flags=flags, nfds=1)
        assert done == [effect.SetLog(Log(4096, 8192)), effect.Reply(Request.SET_LOG_BASE, U64(0).pack())]


def test_log_that_cannot_be_mapped_ends_the_connection(front_end: FrontEnd) -> None:
    front_end.fail = effect.SetLog
    with pytest.raises(OSError, match="made to fail"):
        front_end.send(Request.SET_LOG_BASE, Log(4096, 0), flags=NEED_REPLY, nfds=1)


def test_log_shorter_than_memory_ends_the_connection(front_end: FrontEnd) -> None:
    front_end.send(Request.SET_MEM_TABLE, MemoryTable((GUEST, HIGH)), nfds=2)
    enough = (HIGH.guest_address + HIGH.size) // (8 * 4096)
    front_end.send(Request.SET_LOG_BASE, Log(enough, 0), nfds=1)
    with pytest.raises(ProtocolViolation, match="does not reach the end of memory at 0x100100000"):
        front_end.send(Request.SET_LOG_BASE, Log(enough - 1, 0), nfds=1)


def test_log_all_is_switched_on_a_running_ring_which_runs_on(front_end: FrontEnd) -> None:
    front_end.configure()
    front_end.kick()
    for features, enabled in ((FEATURES | BIT30 | LOG_ALL, True), (FEATURES | BIT30, False)):
        done = front_end.send(Request.SET_FEATURES, U64(features), flags=NEED_REPLY)
        assert done[0] == effect.LogBuffers(enabled)
        assert kinds(done) == [effect.LogBuffers, effect.SetWriteCache, effect.Reply]


def test_used_ring_is_logged_on_a_running_ring_which_runs_on(front_end: FrontEnd) -> None:
    front_end.configure()
    front_end.kick()
    logged = replace(ADDRESS, flags=VringAddress.LOG, log=0x3000)
    assert front_end.send(Request.SET_VRING_ADDR, logged) == [effect.LogQueue(0, 0x3000)]
    assert front_end.send(Request.SET_VRING_ADDR, logged) == []
    assert front_end.send(Request.SET_VRING_ADDR, ADDRESS) == [effect.LogQueue(0, None)]
    assert front_end.session.vrings.are_running


def test_new_owner_has_no_log(front_end: FrontEnd) -> None:
    front_end.send(Request.SET_MEM_TABLE, MemoryTable((GUEST,)), nfds=1)
    front_end.send(Request.SET_LOG_BASE, Log(1 << 20, 0), nfds=1)
    assert effect.SetLog(None) in front_end.send(Request.SET_OWNER)


# The back-end channel


def grow(front_end: FrontEnd) -> list[Effect]:
    """The disk becomes twice as long; what the session wants done about it."""
    config = block_config(Properties(size=2 << 30), num_queues=4, wce=True).pack()
    front_end.session.offer = replace(front_end.session.offer, config=config)
    return list(front_end.session.tell_config_change())


def test_backend_channel_takes_the_fd_and_knows_of_acknowledgements(front_end: FrontEnd) -> None:
    done = front_end.send(Request.SET_BACKEND_REQ_FD, flags=NEED_REPLY, nfds=1)
    assert done == [effect.SetBackendChannel(acks=True), effect.Reply(Request.SET_BACKEND_REQ_FD, U64(0).pack())]


def test_backend_channel_without_reply_ack_gets_none() -> None:
    it = make()
    it.send(Request.SET_PROTOCOL_FEATURES, U64(ProtocolFeature.BACKEND_REQ))
    assert it.send(Request.SET_BACKEND_REQ_FD, nfds=1) == [effect.SetBackendChannel(acks=False)]


def test_running_front_end_is_told_once_of_a_new_size_and_reads_it(front_end: FrontEnd) -> None:
    front_end.send(Request.SET_BACKEND_REQ_FD, nfds=1)
    read_config(front_end, 0, 60)
    front_end.configure()
    front_end.kick()
    assert grow(front_end) == [effect.TellConfigChange()]
    assert list(front_end.session.tell_config_change()) == []
    assert int.from_bytes(read_config(front_end, 0, 8), "little") == (2 << 30) // 512


def test_stopped_front_end_is_told_of_a_new_size_when_its_ring_starts(front_end: FrontEnd) -> None:
    front_end.send(Request.SET_BACKEND_REQ_FD, nfds=1)
    read_config(front_end, 0, 60)
    assert grow(front_end) == []
    front_end.configure()
    assert front_end.kick()[-1] == effect.TellConfigChange()


def test_front_end_that_read_the_configuration_is_told_nothing(front_end: FrontEnd) -> None:
    front_end.send(Request.SET_BACKEND_REQ_FD, nfds=1)
    read_config(front_end, 0, 60)
    front_end.configure()
    assert effect.TellConfigChange() not in front_end.kick()


def test_reconnected_front_end_that_never_reads_is_told_when_its_ring_starts(front_end: FrontEnd) -> None:
    front_end.send(Request.SET_BACKEND_REQ_FD, nfds=1)
    front_end.configure()
    assert front_end.kick()[-1] == effect.TellConfigChange()


def test_front_end_that_closed_the_channel_is_told_nothing(front_end: FrontEnd) -> None:
    front_end.send(Request.SET_BACKEND_REQ_FD, nfds=1)
    read_config(front_end, 0, 60)
    front_end.configure()
    front_end.kick()
    front_end.session.lose_backend_channel()
    assert grow(front_end) == []


@pytest.mark.parametrize("number", [Request.POSTCOPY_ADVISE, Request.SET_VRING_ENDIAN, Request.VRING_KICK])
def test_refused_request_is_named(front_end: FrontEnd, number: Request) -> None:
    with pytest.raises(ProtocolViolation, match=f"request {number.name} is unknown or was not negotiated"):
        front_end.send(number, bytes(8))


# Shapes

SHAPES: list[tuple[int, Any, int]] = [
    (Request.GET_FEATURES, b"", 0),
    (Request.SET_FEATURES, U64(BIT30), 0),
    (Request.SET_OWNER, b"", 0),
    (Request.RESET_OWNER, b"", 0),
    (Request.SET_MEM_TABLE, MemoryTable((GUEST, HIGH)), 2),
    (Request.SET_VRING_NUM, VringState(0, 128), 0),
    (Request.SET_VRING_ADDR, ADDRESS, 0),
    (Request.SET_VRING_BASE, VringState(0, 0), 0),
    (Request.GET_VRING_BASE, VringState(0, 0), 0),
    (Request.SET_VRING_KICK, U64(0), 1),
    (Request.SET_VRING_CALL, U64(0x100), 0),
    (Request.SET_VRING_ERR, U64(0), 1),
    (Request.GET_PROTOCOL_FEATURES, b"", 0),
    (Request.SET_PROTOCOL_FEATURES, U64(PROTOCOL_FEATURES), 0),
    (Request.GET_QUEUE_NUM, b"", 0),
    (Request.SET_VRING_ENABLE, VringState(0, 1), 0),
    (Request.SET_BACKEND_REQ_FD, b"", 1),
    (Request.SET_LOG_BASE, Log(4096, 0), 1),
    (Request.SET_LOG_FD, b"", 1),
    (Request.GET_CONFIG, ConfigWindow(0, 57, 0, bytes(57)), 0),
    (Request.SET_CONFIG, ConfigWindow(32, 1, 0, b"\1"), 0),
    (Request.GET_INFLIGHT_FD, Inflight(0, 0, 1, 128), 0),
    (Request.SET_INFLIGHT_FD, Inflight(4096, 0, 1, 128), 1),
    (Request.RESET_DEVICE, b"", 0),
    (Request.GET_MAX_MEM_SLOTS, b"", 0),
    (Request.ADD_MEM_REG, MemorySlot(GUEST), 1),
    (Request.SET_STATUS, U64(1), 0),
    (Request.GET_STATUS, b"", 0),
]
BY_NAME = pytest.mark.parametrize(
    ("request_number", "payload", "nfds"), SHAPES, ids=[Request(shape[0]).name for shape in SHAPES]
)


def packed(payload: Any) -> bytes:
    return payload if isinstance(payload, bytes) else payload.pack()


@BY_NAME
def test_shape_is_accepted(front_end: FrontEnd, request_number: int, payload: Any, nfds: int) -> None:
    front_end.send(request_number, payload, nfds=nfds)


@BY_NAME
def test_every_other_size_ends_the_connection(
    front_end: FrontEnd, request_number: int, payload: Any, nfds: int
) -> None:
    whole = packed(payload)
    wrong = [whole[:size] for size in range(len(whole))] + [whole + b"\0"]
    for data in wrong:
        with pytest.raises(ProtocolViolation):
            front_end.send(request_number, data, nfds=nfds)


@BY_NAME
def test_every_other_number_of_fds_ends_the_connection(
    front_end: FrontEnd, request_number: int, payload: Any, nfds: int
) -> None:
    for wrong in set(range(9)) - {nfds}:
        with pytest.raises(ProtocolViolation, match="file descriptors"):
            front_end.send(request_number, payload, nfds=wrong)


@pytest.mark.parametrize("count", [0, 1, 3, 9, 2**32 - 1])
def test_memory_table_that_lies_about_its_count_ends_the_connection(front_end: FrontEnd, count: int) -> None:
    table = MemoryTable((GUEST, HIGH)).pack()
    with pytest.raises(ProtocolViolation, match="claims"):
        front_end.send(Request.SET_MEM_TABLE, count.to_bytes(4, "little") + table[4:], nfds=2)


@pytest.mark.parametrize("size", [0, 56, 58, 257, 2**32 - 1])
def test_config_window_that_lies_about_its_size_ends_the_connection(front_end: FrontEnd, size: int) -> None:
    with pytest.raises(ProtocolViolation, match="claims"):
        front_end.send(Request.GET_CONFIG, ConfigWindow(0, size, 0, bytes(57)))


def test_offered_bits_are_known_to_the_enum() -> None:
    assert ProtocolFeature(PROTOCOL_FEATURES).value == PROTOCOL_FEATURES
