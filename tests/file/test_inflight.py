"""In-flight regions as a killed daemon may leave them, after every single store, and as no daemon would."""

import itertools
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.driver import wait_readable
from tests.builder import Recipe, build
from tests.frontend import GET_ID, OK, QUEUE_SIZE, SET_VRING_ENABLE, BackendGone, FrontEnd, Queue
from tests.inflightmodel import SplitModel
from tests.packedqueue import PackedModel, PackedQueue
from tests.program import Daemon

pytestmark = pytest.mark.xdist_group("inflight")  # one daemon outlives it all

WORK = [4, [1], 2, [5, 0, 2], 1, [4, 6]]  # the third request stays in flight throughout
REQUESTS = 9  # two of them nobody fetches
Model = SplitModel | PackedModel
FORMATS: dict[type[Model], type[Queue]] = {SplitModel: Queue, PackedModel: PackedQueue}
BASES = {SplitModel: (0, 3), PackedModel: (0, 3, QUEUE_SIZE - 4)}
SET_VRING_ERR = 14


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon that takes over from all the dead ones, and outlives every lie."""
    path = build(Recipe(size=1 << 20), tmp_path_factory.mktemp("inflight") / "a").path
    with Daemon(path) as running:
        yield running
        running.stop()


class Guest(FrontEnd):
    """A front-end that was there before the daemon, with an err fd on its queue."""

    def __init__(self, model: type[Model], base: int = 0) -> None:
        super().__init__(Path(), connect=False, queue_type=FORMATS[model])
        self.err = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.queues[0].begin_at(base)
        self.model = model(self)

    def start_queue(self, base: int, index: int = 0) -> None:
        self.tell(SET_VRING_ERR, struct.pack("<Q", index), fds=(self.err,))
        super().start_queue(base, index)

    def close(self) -> None:
        super().close()
        os.close(self.err)

    def post(self, count: int) -> list[int]:
        """Post requests that are answered at once, so that their order shows in the used ring."""
        return [self.submit(GET_ID, nbytes=20) for _ in range(count)]

    def collect(self, count: int) -> list[int]:
        """The slots of *count* completions."""
        slots: list[int] = []
        while len(slots) < count:
            for done in self.wait():
                assert done.status in (OK, 0xFF)  # 0xFF: the model completed it, and it writes no status
                slots.append(done.slot)
        return slots


def points(model: type[Model]) -> int:
    with Guest(model) as guest:
        guest.post(REQUESTS)
        return sum(1 for _ in guest.model.life(WORK)) + 1


@pytest.mark.sample(1)
@pytest.mark.parametrize("model", FORMATS)
def test_death_after_every_store_completes_each_request_once_and_in_order(daemon: Daemon, model: type[Model]) -> None:
    count = points(model)
    assert count > 40
    for base in BASES[model]:
        for point in range(count):
            with Guest(model, base) as guest:
                slots = guest.post(REQUESTS)
                for _ in itertools.islice(guest.model.life(WORK), point):
                    pass
                done_before = [completion.slot for completion in guest.reap()]
                guest.connect(daemon.socket_path)
                done_after = guest.collect(REQUESTS - len(done_before))
                assert done_after == [slot for slot in slots if slot not in done_before], (base, point)


def test_index_wraps_between_two_lives(daemon: Daemon) -> None:
    with Guest(SplitModel, 0xFFFE) as guest:
        slots = guest.post(REQUESTS)
        *_, _last = guest.model.life([4, [1, 3, 0]])
        guest.connect(daemon.socket_path)
        done = guest.collect(REQUESTS)
        assert done[3:] == [slot for slot in slots if slot not in done[:3]]


def test_second_death_goes_on_where_the_first_did(daemon: Daemon, tmp_path: Path) -> None:
    """The next daemon keeps the region as well as the dead one did: its own death is like any other."""
    with Guest(SplitModel) as guest:
        slots = guest.post(REQUESTS)
        *_, _last = guest.model.life([5])
        guest.connect(daemon.socket_path)
        assert guest.collect(REQUESTS) == slots
        region = guest.model.region
        assert not any(region.get(guest.model.entry(head), "B") for head in range(QUEUE_SIZE))
        assert region.get(SplitModel.USED_IDX, "H") == REQUESTS
        more = guest.post(5)
        assert guest.collect(5) == more
        counters = [region.get(guest.model.entry(3 * slot) + SplitModel.COUNTER, "Q") for slot in more]
        assert counters == sorted(counters)
        assert counters[0] >= REQUESTS


def test_fresh_region_begins_at_the_ring_and_not_at_zero(daemon: Daemon) -> None:
    """A guest that was paused, or came from elsewhere, has used indices that no batch of this region explains."""
    with Guest(SplitModel, 7) as guest:
        guest.model.region.put(SplitModel.VERSION, "HHHH", 0, 0, 0, 0)
        guest.connect(daemon.socket_path)
        guest.collect(len(guest.post(2)))
        assert guest.model.region.get(SplitModel.USED_IDX, "H") == 9
        assert guest.model.region.get(SplitModel.VERSION, "H") == 1
        assert guest.model.region.get(SplitModel.DESC_NUM, "H") == QUEUE_SIZE


def test_drain_finishes_what_was_left_in_flight(daemon: Daemon) -> None:
    with Guest(SplitModel) as guest:
        guest.post(REQUESTS)
        *_, _last = guest.model.life([5])
        guest.connect(daemon.socket_path)
        assert guest.stop_queue() == REQUESTS
        assert len(guest.reap()) == REQUESTS


class DisabledGuest(Guest):
    """It never enables its ring."""

    def tell(self, request: int, payload: bytes, *, fds: tuple[int, ...] = ()) -> None:
        if request != SET_VRING_ENABLE:
            super().tell(request, payload, fds=fds)


@pytest.mark.parametrize("model", FORMATS)
def test_drain_of_a_disabled_ring_finishes_what_was_left_and_fetches_nothing(
    daemon: Daemon, model: type[Model]
) -> None:
    with DisabledGuest(model) as guest:
        guest.post(REQUESTS)
        *_, _last = guest.model.life([5])
        guest.connect(daemon.socket_path)
        assert not guest.reap()
        guest.stop_queue()
        assert len(guest.reap()) == 5


def test_drain_ends_also_if_what_was_left_is_nonsense(daemon: Daemon) -> None:
    with DisabledGuest(PackedModel) as guest:
        guest.post(3)
        *_, _last = guest.model.life([2])
        guest.model.region.put(guest.model.entry(0) + PackedModel.ADDR, "Q", 1 << 62)
        guest.connect(daemon.socket_path)
        guest.stop_queue()
        assert not guest.reap()


LIES: dict[str, Callable[[SplitModel], None]] = {
    "version": lambda model: model.region.put(SplitModel.VERSION, "H", 2),
    "features": lambda model: model.region.put(0, "Q", 1),
    "used index": lambda model: model.region.put(SplitModel.USED_IDX, "H", 0x8000),
    "batch": lambda model: model.region.put(SplitModel.LAST_BATCH_HEAD, "HH", QUEUE_SIZE, 0xFFFF),
    "next": lambda model: (
        model.region.put(SplitModel.LAST_BATCH_HEAD, "HH", 0, 0xFFFE),
        model.region.put(model.entry(0) + SplitModel.NEXT, "H", 0xFFFF),
    )[0],
}


@pytest.mark.parametrize("lie", LIES)
def test_region_that_lies_breaks_its_queue(daemon: Daemon, lie: str) -> None:
    with Guest(SplitModel) as guest:
        guest.post(2)
        LIES[lie](guest.model)
        guest.connect(daemon.socket_path)
        wait_readable(guest.err, 10)
        assert not guest.reap()


def entry_lie(index: int, field: int, form: str, value: int) -> Callable[[PackedModel], None]:
    return lambda model: model.region.put(model.entry(index) + field, form, value)


PACKED_LIES: dict[str, Callable[[PackedModel], None]] = {
    "version": lambda model: model.region.put(PackedModel.VERSION, "H", 2),
    "features": lambda model: model.region.put(0, "Q", 1),
    "used index": lambda model: model.region.put(PackedModel.USED_IDX, "H", QUEUE_SIZE),
    "old used index": lambda model: model.region.put(PackedModel.OLD_USED_IDX, "H", 0xFFFF),
    "wrap counter": lambda model: model.region.put(PackedModel.USED_WRAP, "B", 2),
    "more than a lap": lambda model: model.region.put(PackedModel.OLD_USED_IDX, "H", 1),
    "free list in circles": entry_lie(QUEUE_SIZE - 1, PackedModel.NEXT, "H", QUEUE_SIZE - 1),
    "free list cut short": entry_lie(QUEUE_SIZE - 2, PackedModel.NEXT, "H", 0xFFFF),
    "free head in a chain": lambda model: model.region.put(PackedModel.OLD_FREE_HEAD, "H", 1),
    "chain of nothing": entry_lie(0, PackedModel.NUM, "H", 0),
    "chain longer than the ring": entry_lie(0, PackedModel.NUM, "H", 0xFFFF),
    "chain that ends elsewhere": entry_lie(0, PackedModel.LAST, "H", 0),
    "chain out of the region": entry_lie(0, PackedModel.NEXT, "H", QUEUE_SIZE),
    "chain in circles": entry_lie(1, PackedModel.NEXT, "H", 0),
    "entries of a smaller ring": lambda model: model.region.put(10, "H", QUEUE_SIZE - 1),
    "more entries than the region has": lambda model: model.region.put(10, "H", QUEUE_SIZE + 1),
    "id twice": lambda model: model.region.put(
        model.entry(5) + PackedModel.ID, "H", model.region.get(model.entry(2) + PackedModel.ID, "H")
    ),
    "buffer outside memory": entry_lie(0, PackedModel.ADDR, "Q", 1 << 62),
}


@pytest.mark.parametrize("lie", PACKED_LIES)
def test_packed_region_that_lies_breaks_its_queue(daemon: Daemon, lie: str) -> None:
    with Guest(PackedModel) as guest:
        guest.post(3)
        *_, _last = guest.model.life([2])
        PACKED_LIES[lie](guest.model)
        guest.connect(daemon.socket_path)
        wait_readable(guest.err, 10)
        assert not guest.reap()


def test_nonsense_that_does_no_harm_is_served(daemon: Daemon) -> None:
    """A list of the last batch that goes round in circles, flags that are neither 0 nor 1, equal counters."""
    with Guest(SplitModel) as guest:
        guest.post(3)
        model = guest.model
        model.region.put(model.LAST_BATCH_HEAD, "HH", 0, 0xFFF0)
        for head in range(QUEUE_SIZE):
            model.region.put(model.entry(head), "B5xHQ", 0xFF if head % 3 == 0 else 0, head, 1 << 63)
        guest.connect(daemon.socket_path)
        guest.collect(3)


Change = Callable[[FrontEnd], None]


def told(nbytes: int, offset: int, queues: int, size: int) -> Change:
    def change(guest: FrontEnd) -> None:
        guest.inflight_payload = struct.pack("<QQHH4x", nbytes, offset, queues, size)

    return change


SERVED: dict[str, Change] = {
    "too small": told(16 * QUEUE_SIZE, 0, 1, QUEUE_SIZE),
    "more queues": told(16 * QUEUE_SIZE + 64, 0, 129, QUEUE_SIZE),
    "no entries": told(16 * QUEUE_SIZE + 64, 0, 1, 0),
    "fewer entries than the ring": told(16 * QUEUE_SIZE + 64, 0, 1, QUEUE_SIZE // 2),
}
REFUSED: dict[str, Change] = {
    "past the end of the file": told(16 * QUEUE_SIZE + 64, 4096, 1, QUEUE_SIZE),
    "no bytes": told(0, 0, 1, QUEUE_SIZE),
    "no queues": told(16 * QUEUE_SIZE + 64, 0, 0, QUEUE_SIZE),
    "more queues than there can be": told(16 * QUEUE_SIZE + 64, 0, 257, QUEUE_SIZE),
    "offset that wraps": told(16 * QUEUE_SIZE + 64, (1 << 64) - 4096, 1, QUEUE_SIZE),
    "offset that no file has": told(16 * QUEUE_SIZE + 64, 1 << 63, 1, QUEUE_SIZE),
    "size that no file has": told((1 << 64) - 1, 0, 1, QUEUE_SIZE),
}


@pytest.mark.parametrize("name", SERVED)
def test_ring_is_served_whatever_a_front_end_says_of_its_region(daemon: Daemon, name: str) -> None:
    with Guest(SplitModel) as guest:
        slots = guest.post(1)
        SERVED[name](guest)
        guest.connect(daemon.socket_path)
        assert guest.collect(1) == slots


@pytest.mark.parametrize("name", REFUSED)
def test_region_that_cannot_be_is_refused(daemon: Daemon, name: str) -> None:
    with Guest(SplitModel) as guest:
        guest.post(1)
        REFUSED[name](guest)
        with pytest.raises((AssertionError, BackendGone)):  # a refusal, or the end of the connection
            guest.connect(daemon.socket_path)
        assert not guest.reap()


@pytest.mark.parametrize("queue_type", [Queue, PackedQueue])
def test_region_tracks_longer_rings_than_were_asked_for(tmp_path: Path, queue_type: type[Queue]) -> None:
    """As QEMU 10.0 asks: for 8 entries here, while the ring has more. The heads used first are the last ones."""
    path = build(Recipe(size=1 << 20), tmp_path / "a").path
    with Daemon(path) as first:
        guest = FrontEnd(first.socket_path, inflight=True, inflight_entries=8, queue_type=queue_type)
        with guest:
            guest.write(0, b"1" * 512)
            first.kill()
            slots = {guest.submit(GET_ID, nbytes=20) for _ in range(REQUESTS)}
            with Daemon(path) as second:
                guest.connect(second.socket_path)
                done: set[int] = set()
                while done != slots:
                    done |= {completion.slot for completion in guest.wait()}
                second.stop()
                assert second.process.stderr is not None
                assert "in-flight" not in second.process.stderr.read()


def test_region_that_cannot_be_mapped_is_refused(daemon: Daemon) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, Guest(SplitModel) as guest:
        os.dup2(theirs.fileno(), guest.inflight_fd)
        with pytest.raises(AssertionError):
            guest.connect(daemon.socket_path)


def test_daemon_serves_on_after_all_that(daemon: Daemon) -> None:
    with Guest(SplitModel) as guest:
        guest.connect(daemon.socket_path)
        slots = guest.post(2)
        assert guest.collect(2) == slots
