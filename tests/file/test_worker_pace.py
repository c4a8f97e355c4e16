"""Small buffered transfers are done on the worker's own thread, until the host makes whoever writes wait."""

import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.blockguest import IN, MIB, OK, OUT, Guest
from tests.patience import TIMEOUT

LONG = 64 * MIB
ATTEMPTS = 10_000  # a machine that takes the processor away in the midst of a transfer has made us wait, too


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    fd = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    os.truncate(fd, MIB)
    with Guest(fd) as guest:
        yield guest
    os.close(fd)


@contextmanager
def somebody_writing(path: Path) -> Iterator[None]:
    """Around it the file at *path* is being written to for long: the kernel lets others write to it only after that."""
    begun, ended = threading.Event(), threading.Event()

    def write() -> None:
        with open(path, "r+b") as file, mmap.mmap(-1, LONG) as content:
            begun.set()
            while not ended.is_set():  # one write holds the lock of the file from its first byte to its last
                os.pwrite(file.fileno(), content, MIB)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        assert begun.wait(TIMEOUT)
        yield
    finally:
        ended.set()
        thread.join()


def write(guest: Guest, sector: int, data: bytes) -> None:
    assert guest.ask(OUT, sector, data=data).status == OK


def test_a_small_write_and_its_warm_read_need_no_io_uring(guest: Guest) -> None:
    for _ in range(ATTEMPTS):
        before = guest.counters.immediate
        write(guest, 8, b"w" * 4096)
        answer = guest.ask(IN, 8, room=4096)
        assert answer.data == b"w" * 4096
        if guest.counters.immediate == before + 2:
            return
    pytest.fail(f"{guest.counters.stalls} stalls")


def test_a_large_write_is_left_to_another_core(guest: Guest) -> None:
    write(guest, 0, b"l" * (128 << 10))
    assert guest.counters.immediate == 0


def test_a_write_that_bypasses_the_page_cache_is_left_to_io_uring(tmp_path: Path) -> None:
    path = tmp_path / "direct"
    path.write_bytes(bytes(MIB))
    fd, direct_fd = (os.open(path, os.O_RDWR | os.O_CLOEXEC | flag) for flag in (0, os.O_DIRECT))
    with Guest(fd, direct_fd=direct_fd) as guest:
        assert guest.ask(OUT, 8, data=b"d" * 4096, align=4096).status == OK
        assert guest.counters.immediate == 0
    os.close(fd)
    os.close(direct_fd)
    assert path.read_bytes()[4096:8192] == b"d" * 4096


def test_who_is_made_to_wait_rests_and_comes_back(guest: Guest, tmp_path: Path) -> None:
    path = next(tmp_path.glob("disk"))
    with somebody_writing(path):
        while guest.counters.stalls == 0:
            write(guest, 0, b"s" * 512)
        stalled = guest.counters.immediate
        write(guest, 1, b"r" * 512)  # within the rest, which is longer than this takes once stalls repeat
        while guest.counters.stalls < 4:
            write(guest, 0, b"s" * 512)
        assert guest.counters.writes > guest.counters.immediate >= stalled
    before = guest.counters.immediate
    while guest.counters.immediate == before:
        write(guest, 2, b"q" * 512)
    assert path.read_bytes()[:1536] == b"s" * 512 + b"r" * 512 + b"q" * 512


def test_python_writes_at_once_a_bounded_number_of_times(guest: Guest) -> None:
    def write_all() -> int:
        return sum(guest.worker.write_at_once(guest.slot, 0, [b"one", b"two"]) for _ in range(1000))

    for _ in range(ATTEMPTS):
        first, second = guest.worker.call(write_all), guest.worker.call(write_all)
        assert max(first, second) < 1000
        if first and second:  # the next batch may again
            return
    pytest.fail(f"{guest.counters.stalls} stalls")


def test_at_once_fails_as_the_host_says(tmp_path: Path) -> None:
    path = tmp_path / "read-only"
    path.write_bytes(bytes(4096))
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    with Guest(fd) as guest, pytest.raises(OSError, match="Bad file descriptor"):
        guest.worker.call(lambda: guest.worker.write_at_once(guest.slot, 0, [b"x"]))
    os.close(fd)
