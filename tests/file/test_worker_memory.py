"""Guest memory: regions that are cut anywhere, refused, replaced while requests are in flight."""

import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.driver import Buffer, DriverMemory, DriverQueue
from ring.inflight import InflightRegion, inflight_nbytes
from ring.memory import MemoryRegion
from ring.request import Request
from tests.blockguest import IN, MIB, OK, OUT, Guest, open_pipe
from tests.patience import TIMEOUT

SEAM = 8 * MIB + 1234  # between two regions, page aligned neither in the file nor in the guest


def two_regions(memory: DriverMemory) -> list[MemoryRegion]:
    """The whole memory, as two regions that touch at SEAM."""
    return [
        MemoryRegion(os.dup(memory.fd), SEAM, SEAM, memory.nbytes - SEAM, SEAM),
        MemoryRegion(os.dup(memory.fd), 0, 0, SEAM, 0),
    ]


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def count_mappings() -> int:
    """Mappings of memfds, which guest memory is made of."""
    return Path("/proc/self/maps").read_text().count("/memfd:")


PARTS = {"header": 16, "data": 512, "status": 1, "table": 48}


@pytest.mark.parametrize("straddler", PARTS)
def test_buffers_may_straddle_two_regions_at_any_byte(tmp_path: Path, straddler: str) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    with Guest(fd, regions=two_regions) as guest:
        place = {name: guest.memory.allocate(nbytes) for name, nbytes in PARTS.items()}
        for shift in range(PARTS[straddler] + 1):
            place[straddler] = SEAM - shift
            data = os.urandom(512)
            guest.memory.store(place["header"], struct.pack("<IIQ", OUT, 0, 5))
            guest.memory.store(place["data"], data)
            guest.queue.add(
                [Buffer(place["header"], 16), Buffer(place["data"], 512), Buffer(place["status"], 1, True)],
                table_address=place["table"] if straddler == "table" else None,
            )
            guest.queue.kick()
            assert guest.queue.wait()[0].nbytes == 1
            assert guest.memory.load(place["status"], 1)[0] == OK
            assert path.read_bytes()[2560:3072] == data, shift
    os.close(fd)


def test_read_scatters_over_two_regions(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(MIB))
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    with Guest(fd, regions=two_regions) as guest:
        guest.memory.allocate(SEAM - 3000 - guest.memory.allocate(0))  # data begins shortly before SEAM
        answer = guest.ask(IN, 0, room=8192)
    os.close(fd)
    assert answer == (OK, 8193, path.read_bytes()[:8192])


REFUSED = {
    "overlap in the guest": lambda fd: [MemoryRegion(fd(), 0, 0, 8192, 0), MemoryRegion(fd(), 8191, 1 << 40, 1, 0)],
    "overlap in the front-end": lambda fd: [MemoryRegion(fd(), 0, 0, 8192, 0), MemoryRegion(fd(), 1 << 40, 8191, 1, 0)],
    "guest address wraps": lambda fd: [MemoryRegion(fd(), (1 << 64) - 4096, 0, 8192, 0)],
    "user address wraps": lambda fd: [MemoryRegion(fd(), 0, (1 << 64) - 4096, 8192, 0)],
    "offset wraps": lambda fd: [MemoryRegion(fd(), 0, 0, 4096, (1 << 64) - 4096)],
    "nothing": lambda fd: [MemoryRegion(fd(), 0, 0, 0, 0)],
    "file is shorter": lambda fd: [MemoryRegion(fd(), 0, 0, 65537, 0)],
    "offset in a file that is shorter": lambda fd: [MemoryRegion(fd(), 0, 0, 4096, 61441)],
    "second is not mappable": lambda fd: [
        MemoryRegion(fd(), 0, 0, 4096, 0),
        MemoryRegion(os.eventfd(0), 4096, 4096, 4096, 0),
        MemoryRegion(fd(), 8192, 8192, 4096, 0),
    ],
    "too many": lambda fd: [MemoryRegion(fd(), i * 8192, i * 8192, 4096, 0) for i in range(513)],
}


@pytest.mark.parametrize("name", REFUSED)
def test_nonsensical_table_is_refused_and_the_old_one_stays(name: str) -> None:
    memfd = os.memfd_create("region", os.MFD_CLOEXEC)
    os.truncate(memfd, 65536)
    with Guest() as guest:
        guest.ask(IN, 0, room=512)
        before, mappings = open_fds(), count_mappings()
        regions = REFUSED[name](lambda: os.dup(memfd))
        with pytest.raises(OSError, match="memory region at guest address 0x"):
            guest.worker.call(lambda: guest.worker.set_memory(regions))
        assert (open_fds(), count_mappings()) == (before, mappings)
        assert guest.ask(IN, 0, room=512).status == OK
    os.close(memfd)


def test_five_hundred_and_twelve_regions_are_fine() -> None:
    memfd = os.memfd_create("region", os.MFD_CLOEXEC)
    os.truncate(memfd, 65536)
    with Guest() as guest:
        more = [MemoryRegion(os.dup(memfd), i << 32, i << 32, 4096, 0) for i in range(1, 512)]
        guest.worker.call(lambda: guest.worker.set_memory([*guest.regions, *more]))
        assert guest.ask(IN, 0, room=512).status == OK
    os.close(memfd)


def test_removing_a_region_waits_for_the_request_in_it() -> None:
    held: list[Request] = []
    arrived = threading.Event()
    removed = threading.Event()
    order: list[str] = []

    def hold(request: Request) -> None:
        held.append(request)
        arrived.set()

    with Guest(on_request=hold, regions=two_regions) as guest:
        guest.memory.allocate(SEAM)
        guest.post(IN, 0, room=512)
        guest.queue.kick()
        assert arrived.wait(TIMEOUT)

        def remove() -> None:
            def let_go() -> None:
                order.append("finished")
                held[0].finish(OK)

            guest.worker.compute(lambda: None, lambda result, error: let_go())
            guest.worker.set_memory(guest.regions[1:])
            order.append("removed")
            removed.set()

        guest.worker.call(remove)
        assert removed.wait(TIMEOUT)
        assert guest.queue.wait()[0].nbytes == 513
    assert order == ["finished", "removed"]


def remove_while_it_is_read(kept: slice) -> None:
    """All but the regions *kept*, while a request of both is with the kernel."""
    source, feed = open_pipe()
    begun, removed = threading.Event(), threading.Event()

    def remove() -> None:
        begun.set()
        guest.worker.set_memory(guest.regions[kept])
        removed.set()

    with source, Guest(source.fileno(), regions=two_regions) as guest, feed:
        guest.memory.allocate(SEAM)
        guest.post(IN, 0, room=512)
        guest.queue.kick()
        guest.wait_for_requests(1)
        guest.worker.post(remove)
        assert begun.wait(TIMEOUT)
        assert not removed.is_set()
        feed.write(bytes(512))
        assert removed.wait(TIMEOUT)
        assert guest.queue.wait()[0].nbytes == 513


def test_removing_a_region_waits_for_a_transfer_in_c() -> None:
    remove_while_it_is_read(kept=slice(1, None))


def test_ring_outside_the_new_table_is_left_alone_until_it_is_back() -> None:
    memfd = os.memfd_create("region", os.MFD_CLOEXEC)
    os.truncate(memfd, 4096)
    with Guest() as guest:
        guest.ask(IN, 0, room=512)
        guest.worker.call(lambda: guest.worker.set_memory([MemoryRegion(memfd, 1 << 40, 1 << 40, 4096, 0)]))
        posted = guest.post(IN, 0, room=512)
        guest.queue.publish()
        os.eventfd_write(guest.queue.kick_fd, 1)
        guest.worker.call(lambda: None)
        assert guest.queue.poll() is None
        guest.worker.call(lambda: guest.worker.set_memory([guest.memory.region()]))
        assert guest.answer(posted, guest.queue.wait()[0]).status == OK


def test_drain_of_a_ring_outside_the_table_answers_its_base() -> None:
    with Guest() as guest:
        guest.ask(IN, 0, room=512)
        guest.worker.call(lambda: guest.worker.set_memory([]))
        assert guest.drain() == 1


def test_answer_given_just_before_the_ring_goes_is_published() -> None:
    held: list[Request] = []
    arrived = threading.Event()

    def hold(request: Request) -> None:
        held.append(request)
        arrived.set()

    with Guest(on_request=hold) as guest:
        guest.post(IN, 0, room=512)
        guest.queue.kick()
        assert arrived.wait(TIMEOUT)

        def finish_and_remove() -> None:
            held[0].finish(OK)
            guest.worker.set_memory([])

        guest.worker.call(finish_and_remove)
        assert guest.queue.poll() is not None


def test_removing_the_region_of_a_ring_waits_for_its_requests() -> None:
    """Their answers go there, though their buffers do not."""
    remove_while_it_is_read(kept=slice(1))


def test_new_memory_at_the_same_addresses_is_used() -> None:
    with Guest() as guest, DriverMemory(guest.memory.nbytes) as other:
        content = guest.memory.load(0, guest.memory.nbytes)
        other.store(0, content)
        guest.worker.call(lambda: guest.worker.set_memory([other.region()]))
        posted = guest.post(IN, 0, room=512)
        other.store(0, guest.memory.load(0, guest.memory.nbytes))
        guest.queue.publish()
        other.store(guest.queue.layout.driver_address, guest.memory.load(guest.queue.layout.driver_address, 4))
        os.eventfd_write(guest.queue.kick_fd, 1)
        guest.wait_for_requests(1)
        guest.drain()
        assert other.load(posted.status_address, 1)[0] == OK


def test_nothing_is_left_open_or_mapped_after_the_worker() -> None:
    before, mappings = open_fds(), count_mappings()
    for _ in range(3):
        with Guest(regions=two_regions) as guest:
            guest.ask(IN, 0, room=512)
    assert (open_fds(), count_mappings()) == (before, mappings)


def test_hugetlbfs_is_mapped_in_whole_pages_of_its_own() -> None:
    huge = 2 * MIB
    before = count_mappings()
    with os.fdopen(os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB), "rb") as file:
        os.truncate(file.fileno(), 8 * huge)  # nothing is touched, so no huge page need be free
        with Guest() as guest:
            parts = [(0, huge), (huge + 4096, huge), (4 * huge - 4096, 8192), (7 * huge + 4096, huge - 4096)]
            regions = [MemoryRegion(os.dup(file.fileno()), (1 << 40) + at, (1 << 40) + at, n, at) for at, n in parts]
            guest.worker.call(lambda: guest.worker.set_memory([*guest.regions, *regions]))
            maps = Path("/proc/self/maps").read_text().splitlines()
            spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps if "memfd:huge" in line]
            assert sorted(end - start for start, end in spans) == [huge, huge, 2 * huge, 2 * huge]
            guest.worker.call(lambda: guest.worker.set_memory(guest.regions))
            assert count_mappings() == before + 2  # the driver's and the worker's of the guest's own memory
            assert guest.ask(IN, 0, room=512).status == OK
    assert count_mappings() == before


def test_a_ring_lost_just_before_the_worker_sleeps_is_told_of_at_once(tmp_path: Path) -> None:
    """Nothing else wakes the worker: what asks the driver to kick is the first to meet what is gone."""
    with Guest(queue_size=2048) as guest:
        lost = guest.queue.layout.device_address & -4096
        assert guest.queue.layout.driver_address + 4 <= lost
        os.truncate(guest.memory.fd, lost)
        os.eventfd_write(guest.queue.kick_fd, 1)
        assert guest.broken.wait(TIMEOUT)


def test_a_drain_ends_whose_ring_is_lost_while_all_requests_wait() -> None:
    """The ring owes what was in flight in an earlier daemon; nobody fetches from it, so nobody else meets the loss."""
    drained, nbytes = threading.Event(), inflight_nbytes(2, 128, packed=False)
    inflight = os.memfd_create("in-flight", os.MFD_CLOEXEC)
    os.truncate(inflight, nbytes)
    os.pwrite(inflight, struct.pack("<QHHHH", 0, 1, 128, 0, 0), nbytes // 2)
    os.pwrite(inflight, struct.pack("<B", 1), nbytes // 2 + 16)  # head 0 of queue 1 is in flight
    with Guest() as guest, DriverMemory(MIB, guest_address=1 << 40) as memory, DriverQueue(memory, 128) as queue:

        def lose(done: Callable[[None], None]) -> None:
            guest.worker.start_queue(1, queue.layout)
            guest.worker.drain_queue(1, lambda base: drained.set())
            os.truncate(memory.fd, 0)
            guest.worker.compute(lambda: guest.broken.wait(TIMEOUT), lambda result, error: done(None))

        def begin() -> None:
            guest.worker.set_memory([guest.memory.region(), memory.region()])
            guest.worker.set_inflight(InflightRegion(inflight, 0, nbytes, 2))
            guest.worker.run_alone(lose, lambda: False)

        guest.drain()
        guest.worker.call(begin)
        assert drained.wait(TIMEOUT)
