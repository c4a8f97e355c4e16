"""The dirty log: whatever byte of guest memory we change, the bit of its page is set; the judge compares memory."""

import mmap
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.driver import Buffer, DriverMemory
from ring.memory import MemoryRegion
from ring.request import Request
from tests.blockguest import FLUSH, GET_ID, IN, IOERR, MIB, OK, OUT, Guest
from tests.frontend import DATA_START, GUEST_ADDRESS, QUEUE_SIZE, BackendGone, FrontEnd
from tests.program import Daemon

PAGE = 4096
HIGH = 1 << 40  # where the second region lies in the guest


class Log:
    """A bitmap in a memfd, a context manager."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.fd = os.memfd_create("log", os.MFD_CLOEXEC)
        os.truncate(self.fd, nbytes)
        self._bits = mmap.mmap(self.fd, nbytes)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bits.close()
        os.close(self.fd)

    def region(self, skip: int = 0) -> MemoryRegion:
        return MemoryRegion(os.dup(self.fd), 0, 0, self.nbytes - skip, skip)

    def is_empty(self) -> bool:
        return not any(self._bits[:])

    def take(self) -> set[int]:
        """The pages logged since the last time; what is logged meanwhile may be lost."""
        held = self._bits[:]
        self._bits[:] = bytes(self.nbytes)
        return {8 * at + bit for at, byte in enumerate(held) if byte for bit in range(8) if byte >> bit & 1}


def log_of(guest: Guest) -> Log:
    """A log of all that *guest* writes."""
    log = Log(guest.memory.nbytes // PAGE // 8)

    def begin() -> None:
        guest.worker.set_log(log.region())
        guest.worker.log_buffers(True)
        guest.worker.log_queue(0, guest.queue.layout.device_address)

    guest.worker.call(begin)
    return log


def changed_pages(memory: DriverMemory, before: bytes) -> set[int]:
    after = memory.load(0, memory.nbytes)
    starts = range(0, memory.nbytes, PAGE)
    return {at // PAGE for at in starts if before[at : at + PAGE] != after[at : at + PAGE]}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(MIB))
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    yield fd
    os.close(fd)


def in_python(request: Request) -> None:
    """Serve reads with bytes of Python's."""
    if request.type == IN:
        request.data().store(b"\x77" * request.nbytes)
    request.finish(OK)


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
def test_every_page_that_changes_is_logged(disk: int, event_idx: bool, mapped: bool) -> None:
    rng = random.Random(7)
    with Guest(disk, event_idx=event_idx, mapped=mapped, on_request=in_python) as guest, log_of(guest) as log:
        for _round in range(40):
            kind = rng.choice([IN, IN, IN, OUT, FLUSH, GET_ID])
            room = {IN: 512 * rng.randrange(1, 40), GET_ID: 20}.get(kind, 0)
            data = os.urandom(512) if kind == OUT else b""
            cuts = [rng.randrange(1, room + 2) for _ in range(3)] if room > 100 else []
            indirect, align = rng.random() < 0.5, rng.choice([16, 4096])
            posted = guest.post(kind, 0, data=data, room=room, cuts=cuts, indirect=indirect, align=align)
            before = guest.memory.load(0, guest.memory.nbytes)
            guest.queue.kick()
            assert guest.answer(posted, guest.queue.wait()[0]).status == OK
            guest.worker.call(lambda: None)  # the wish to be kicked again is written after the answer
            logged = log.take()
            changed = changed_pages(guest.memory, before) - {guest.queue.layout.driver_address // PAGE}
            assert changed <= logged | {guest.queue.layout.driver_address // PAGE}
            assert posted.status_address // PAGE in logged
            assert len(logged) <= room // PAGE + 5


def test_read_that_fails_is_logged_too(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with Guest(reader) as guest, log_of(guest) as log:
        posted = guest.post(IN, 0, room=8192, align=4096)
        os.write(writer, bytes(100))
        os.close(writer)
        guest.queue.kick()
        guest.queue.wait()
        assert set(range(posted.data_address // PAGE, posted.status_address // PAGE + 1)) <= log.take()
    os.close(reader)


def test_request_past_the_end_logs_its_status(disk: int) -> None:
    with Guest(disk) as guest, log_of(guest) as log:
        posted = guest.post(IN, 1 << 40, room=512, align=4096)
        guest.queue.kick()
        assert guest.answer(posted, guest.queue.wait()[0]).status == IOERR
        assert posted.status_address // PAGE in log.take()


@pytest.mark.parametrize("count", [1, 130])  # the latter is more than one request may ask for
def test_refused_read_logs_no_data(disk: int, count: int) -> None:
    with Guest(disk) as guest, log_of(guest) as log:
        header, status, table = (guest.memory.allocate(nbytes) for nbytes in (16, 1, 16 * (count + 2)))
        guest.memory.store(header, struct.pack("<IIQ", IN, 0, 1 << 40))
        all_memory = Buffer(0, guest.memory.nbytes, True)
        guest.queue.add([Buffer(header, 16), *[all_memory] * count, Buffer(status, 1, True)], table_address=table)
        guest.queue.kick()
        assert guest.queue.wait()[0].nbytes == 1
        assert guest.memory.load(status, 1)[0] == IOERR
        logged = log.take()
        assert status // PAGE in logged
        assert len(logged) <= 5


def test_used_ring_is_logged_as_where_the_front_end_says(disk: int) -> None:
    with Guest(disk) as guest, log_of(guest) as log:
        elsewhere = 3 * MIB
        guest.worker.call(lambda: guest.worker.log_queue(0, elsewhere))
        guest.ask(IN, 0, room=512)
        assert elsewhere // PAGE in log.take()
        guest.worker.call(lambda: guest.worker.log_queue(0, None))
        guest.ask(IN, 0, room=512)
        assert elsewhere // PAGE not in log.take()


def test_wish_to_be_kicked_is_logged(disk: int) -> None:
    with Guest(disk) as guest:
        guest.ask(IN, 0, room=512)
        with log_of(guest) as log:
            os.eventfd_write(guest.queue.kick_fd, 1)  # there is nothing to fetch: only the wish is written again
            while log.is_empty():
                guest.worker.call(lambda: None)
            logged = log.take()
        assert logged == {guest.queue.layout.device_address // PAGE}


def test_second_region_is_logged_by_its_guest_address(disk: int) -> None:
    def apart(memory: DriverMemory) -> list[MemoryRegion]:
        """The upper half of memory lies far away in the guest; rings and headers are in the lower."""
        half = memory.nbytes // 2
        return [
            MemoryRegion(os.dup(memory.fd), 0, 0, half, 0),
            MemoryRegion(os.dup(memory.fd), HIGH, half, half, half),
        ]

    with Guest(disk, regions=apart) as guest, Log((HIGH + 16 * MIB) // PAGE // 8) as log:
        guest.worker.call(lambda: guest.worker.set_log(log.region()))
        guest.worker.call(lambda: guest.worker.log_buffers(True))
        posted = guest.post(GET_ID, 0, room=20)
        guest.queue.kick()
        guest.queue.wait()
        assert posted.status_address // PAGE in first_pages(log, 64)
        address = HIGH + 3 * PAGE + 5
        guest.memory.store(posted.data_address, bytes(20))
        header = guest.memory.allocate(16)
        guest.memory.store(header, struct.pack("<IIQ", IN, 0, 0))
        guest.queue.add([Buffer(header, 16), Buffer(address, 513, True)])
        guest.queue.kick()
        guest.queue.wait()
        assert os.pread(log.fd, 1, address // PAGE // 8)[0] >> (address // PAGE % 8) & 1


def first_pages(log: Log, npages: int) -> set[int]:
    held = os.pread(log.fd, npages // 8, 0)
    return {page for page in range(npages) if held[page // 8] >> page % 8 & 1}


def test_nothing_is_logged_in_a_log_that_was_replaced_or_taken_away(disk: int) -> None:
    with Guest(disk) as guest, log_of(guest) as old, Log(old.nbytes) as new:
        guest.worker.call(lambda: guest.worker.set_log(new.region()))
        old.take()
        guest.ask(IN, 0, room=512)
        assert old.take() == set()
        guest.worker.call(lambda: guest.worker.set_log(None))
        assert new.take() != set()
        guest.ask(IN, 0, room=512)
        assert new.take() == set()


def test_log_may_begin_anywhere_in_its_file(disk: int) -> None:
    with Guest(disk) as guest, Log(3 * PAGE) as log:
        guest.worker.call(lambda: guest.worker.set_log(log.region(skip=PAGE + 24)))
        guest.worker.call(lambda: guest.worker.log_buffers(True))
        posted = guest.post(IN, 0, room=512)
        guest.queue.kick()
        guest.queue.wait()
        assert log.take() == {posted.status_address // PAGE + 8 * (PAGE + 24)}


def test_pages_past_the_end_of_the_log_are_not_logged(disk: int) -> None:
    with Guest(disk) as guest, Log(PAGE) as log:
        small = MemoryRegion(os.dup(log.fd), 0, 0, 1, 0)  # 8 pages
        guest.worker.call(lambda: guest.worker.set_log(small))
        guest.worker.call(lambda: guest.worker.log_buffers(True))
        guest.worker.call(lambda: guest.worker.log_queue(0, (1 << 64) - 8))
        for _request in range(4):
            guest.ask(IN, 0, room=65536)
        assert log.take() <= set(range(8))


REFUSED = {
    "longer than its file": lambda fd: MemoryRegion(fd, 0, 0, PAGE + 1, 0),
    "past the end of its file": lambda fd: MemoryRegion(fd, 0, 0, PAGE, 1),
    "empty": lambda fd: MemoryRegion(fd, 0, 0, 0, 0),
    "wrapping": lambda fd: MemoryRegion(fd, 0, 0, PAGE, (1 << 64) - 1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_impossible_log_is_refused_and_the_old_one_stays(disk: int, name: str) -> None:
    with Guest(disk) as guest, log_of(guest) as log, Log(PAGE) as bad:
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(OSError, match="memory region"):
            guest.worker.call(lambda: guest.worker.set_log(REFUSED[name](os.dup(bad.fd))))
        assert len(os.listdir("/proc/self/fd")) == before
        guest.ask(IN, 0, room=512)
        assert log.take() != set()


def test_log_call_is_signalled_once_bits_are_set(disk: int) -> None:
    call = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    with Guest(disk) as guest, log_of(guest):
        guest.worker.call(lambda: guest.worker.set_log_call(os.dup(call)))
        guest.ask(IN, 0, room=512)
        guest.worker.call(lambda: None)
        assert os.eventfd_read(call) >= 1
    os.close(call)


def test_a_log_call_that_is_a_kick_does_not_keep_the_worker_busy(disk: int) -> None:
    with Guest(disk) as guest, log_of(guest):
        guest.worker.call(lambda: guest.worker.set_log_call(os.dup(guest.queue.kick_fd)))
        guest.ask(IN, 0, room=512)
        before = guest.worker.counters.kicks
        for _ in range(200):
            guest.worker.call(lambda: None)
        assert guest.worker.counters.kicks - before <= 210  # one for each time that it was woken


# Through the socket


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(4 << 20))
    with Daemon(path, "--format=raw") as running:
        yield running


def log_for(guest: FrontEnd) -> Log:
    return Log((GUEST_ADDRESS + len(guest.memory)) // PAGE // 8 + 1)


def test_log_is_switched_on_and_off_while_requests_are_in_flight(daemon: Daemon) -> None:
    with FrontEnd(daemon.socket_path) as guest, log_for(guest) as log:
        for enabled in (True, False, True):
            for slot in range(32):
                guest.submit(IN, slot << 16, nbytes=65536)
            guest.set_log(log.fd, log.nbytes)
            guest.log(enabled)
            done = []
            while len(done) < 32:
                done += guest.wait()
            assert {completion.status for completion in done} == {OK}
            log.take()
            slot = guest.submit(IN, 0, nbytes=65536)
            guest.wait()
            data = (GUEST_ADDRESS + DATA_START + slot * 256 * 1024) // PAGE
            used_ring = (GUEST_ADDRESS + guest.queues[0].device_ring) // PAGE
            wanted = {*range(data, data + 16), used_ring} if enabled else set()
            assert log.take() & {*range(data, data + 16), used_ring} == wanted
        assert guest.stop_queue() == 3 * 33 % QUEUE_SIZE**2


def test_nothing_is_logged_after_the_queue_has_stopped(daemon: Daemon) -> None:
    with FrontEnd(daemon.socket_path) as guest, log_for(guest) as log:
        guest.set_log(log.fd, log.nbytes)
        guest.log(True)
        for slot in range(32):
            guest.submit(IN, slot << 16, nbytes=65536)
        guest.stop_queue()
        log.take()
        guest.read_config()
        assert log.take() == set()


def test_log_whose_file_is_too_short_ends_the_connection(daemon: Daemon) -> None:
    with FrontEnd(daemon.socket_path) as guest, log_for(guest) as log:
        with pytest.raises(BackendGone):
            guest.set_log(log.fd, log.nbytes + 1)
    with FrontEnd(daemon.socket_path) as guest:
        guest.read(0, 512)
