"""Group commit, writethrough, and what a failed fdatasync means."""

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ring.request import Request
from tests.blockguest import DISCARD, FLUSH, IN, IOERR, MIB, OK, OUT, WRITE_ZEROES, Guest
from tests.patience import TIMEOUT

SEGMENT = (8).to_bytes(8, "little") + (8).to_bytes(8, "little")


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    yield fd
    os.close(fd)


def break_syncs(fd: int) -> None:
    """Put a pipe in the place of *fd*: fdatasync fails with EINVAL from now on."""
    reader, writer = os.pipe()
    os.dup2(writer, fd, inheritable=False)
    os.close(reader)
    os.close(writer)


def wait_for_operation(guest: Guest, begin: str, *arguments: object) -> int:
    """Begin an operation of the worker and wait for its result."""
    results: list[int] = []
    done = threading.Event()

    def finish(result: int) -> None:
        results.append(result)
        done.set()

    guest.worker.call(lambda: getattr(guest.worker, begin)(*arguments, finish))
    assert done.wait(TIMEOUT)
    return results[0]


def test_flush_syncs_the_file_without_python(fd: int) -> None:
    with Guest(fd) as guest:
        assert guest.ask(FLUSH).status == OK
        assert (guest.counters.syncs, guest.counters.python_requests) == (1, 0)


def test_flushes_that_come_together_share_one_sync(fd: int) -> None:
    with Guest(fd) as guest:
        answers = guest.ask_all([guest.post(FLUSH) for _ in range(12)])
        assert {answer.status for answer in answers} == {OK}
        assert (guest.counters.syncs, guest.counters.sync_waiters) == (1, 12)


def test_long_batch_does_not_wait_for_its_end_to_start_a_sync(fd: int) -> None:
    with Guest(fd) as guest:
        guest.ask_all([guest.post(FLUSH) for _ in range(40)])
        assert (guest.counters.syncs, guest.counters.sync_waiters) == (2, 40)


def test_writeback_write_does_not_sync(fd: int) -> None:
    with Guest(fd) as guest:
        guest.ask(OUT, 0, data=bytes(512))
        assert guest.counters.syncs == 0


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize(("type", "data"), [(OUT, bytes(512)), (WRITE_ZEROES, SEGMENT), (DISCARD, SEGMENT)])
def test_every_change_in_writethrough_waits_for_a_sync_of_its_own(
    fd: int, mapped: bool, type: int, data: bytes
) -> None:
    with Guest(fd, mapped=mapped) as guest:
        guest.worker.call(lambda: guest.block.set_writethrough(True))
        for count in range(1, 11):
            assert guest.ask(type, 0, data=data).status == OK
            assert guest.counters.syncs == count


def test_changes_in_flight_together_share_syncs(fd: int) -> None:
    with Guest(fd) as guest:
        guest.worker.call(lambda: guest.block.set_writethrough(True))
        guest.ask_all([guest.post(OUT, sector, data=bytes(512)) for sector in range(32)])
        assert guest.counters.sync_waiters == 32
        assert guest.counters.syncs < 32


def test_reads_in_writethrough_do_not_sync(fd: int) -> None:
    with Guest(fd) as guest:
        guest.worker.call(lambda: guest.block.set_writethrough(True))
        guest.ask(IN, 0, room=512)
        assert guest.counters.syncs == 0


def test_failed_change_in_writethrough_does_not_sync(fd: int) -> None:
    with Guest(fd, mapped=False, on_request=lambda request: request.finish(IOERR)) as guest:
        guest.worker.call(lambda: guest.block.set_writethrough(True))
        assert guest.ask(OUT, 0, data=bytes(512)).status == IOERR
        assert guest.counters.syncs == 0


def test_syncs_of_one_batch_share_one(fd: int) -> None:
    with Guest(fd) as guest:
        results: list[int] = []

        def begin() -> None:
            for _ in range(3):
                guest.worker.sync(guest.slot, results.append)

        guest.worker.call(begin)
        guest.worker.stop()
        assert results == [0, 0, 0]
        assert guest.counters.syncs == 1


def test_a_sync_that_started_before_does_not_serve_a_later_waiter(fd: int) -> None:
    with Guest(fd) as guest:
        results: list[int] = []
        guest.worker.call(lambda: guest.worker.sync(guest.slot, results.append))
        guest.worker.call(lambda: guest.worker.sync(guest.slot, results.append))
        guest.worker.stop()
        assert results == [0, 0]
        assert guest.counters.syncs == 2


def test_unsafe_file_is_never_synced(fd: int) -> None:
    with Guest(fd, sync=False) as guest:
        guest.worker.call(lambda: guest.block.set_writethrough(True))
        assert guest.ask(OUT, 0, data=bytes(512)).status == OK
        assert guest.ask(FLUSH).status == OK
        assert wait_for_operation(guest, "sync", guest.slot) == 0
        assert guest.counters.syncs == 0


def test_failed_sync_fails_its_flush_and_tells(fd: int) -> None:
    with Guest(fd) as guest:
        break_syncs(fd)
        assert guest.ask(FLUSH).status == IOERR
        guest.worker.stop()
        assert guest.sync_errors == [errno.EINVAL]


@pytest.mark.parametrize(
    ("type", "data"), [(OUT, bytes(512)), (FLUSH, b""), (WRITE_ZEROES, SEGMENT), (DISCARD, SEGMENT)]
)
def test_failed_sync_is_final_even_if_the_file_recovers(fd: int, type: int, data: bytes) -> None:
    good = os.dup(fd)
    with Guest(fd) as guest:
        break_syncs(fd)
        assert guest.ask(FLUSH).status == IOERR
        os.dup2(good, fd, inheritable=False)
        assert guest.ask(type, 0, data=data).status == IOERR
        assert guest.ask(IN, 0, room=512).status == OK
        assert guest.counters.syncs == 1
    os.close(good)


def test_failed_sync_fails_every_later_change_of_python(fd: int) -> None:
    good = os.dup(fd)
    with Guest(fd) as guest:
        break_syncs(fd)
        assert wait_for_operation(guest, "sync", guest.slot) == -errno.EIO
        os.dup2(good, fd, inheritable=False)
        assert wait_for_operation(guest, "sync", guest.slot) == -errno.EIO
        assert wait_for_operation(guest, "write", guest.slot, 0, [b"x"]) == -errno.EIO
        assert wait_for_operation(guest, "zero", guest.slot, 0, 512) == -errno.EIO
        assert wait_for_operation(guest, "read", guest.slot, 0, [bytearray(4)]) == 0
    os.close(good)


def test_after_a_failed_sync_a_mark_can_be_left_for_the_next_process(fd: int) -> None:
    good = os.dup(fd)
    with Guest(fd) as guest:
        break_syncs(fd)
        assert wait_for_operation(guest, "sync", guest.slot) == -errno.EIO
        os.dup2(good, fd, inheritable=False)
        assert wait_for_operation(guest, "write_despite", guest.slot, 7, b"x") == 0
        assert wait_for_operation(guest, "write", guest.slot, 7, [b"y"]) == -errno.EIO  # still
        assert os.pread(good, 1, 7) == b"x"
    os.close(good)


def test_write_in_flight_when_a_sync_fails_is_an_error(fd: int) -> None:
    held: list[Request] = []
    arrived = threading.Event()

    def hold(request: Request) -> None:
        held.append(request)
        arrived.set()

    with Guest(fd, mapped=False, on_request=hold) as guest:
        break_syncs(fd)
        written, flushed = guest.post(OUT, 0, data=bytes(512)), guest.post(FLUSH)
        guest.queue.kick()
        assert arrived.wait(TIMEOUT)
        assert guest.answer(flushed, guest.queue.wait()[0]).status == IOERR
        guest.worker.call(lambda: held[0].finish(OK))
        assert guest.answer(written, guest.queue.wait()[0]).status == IOERR


def test_writethrough_write_reports_its_failed_sync(fd: int) -> None:
    good = os.dup(fd)

    def serve_then_break(request: object) -> None:
        break_syncs(fd)
        request.finish(OK)  # type: ignore[attr-defined]

    with Guest(fd, mapped=False, on_request=serve_then_break) as guest:
        guest.worker.call(lambda: guest.block.set_writethrough(True))
        assert guest.ask(OUT, 0, data=bytes(512)).status == IOERR
    os.close(good)
