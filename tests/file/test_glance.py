"""What is read at once, in C on the caller's thread, is what the engine reads, or it is refused."""

import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import qcow2
from qcow2.driver.buffer import MemoryBuffer
from qcow2.library.glance import MOST
from tests.forked import fork, status_of
from tests.oracle import qemu_img

pytestmark = pytest.mark.file
SIZE = 5 << 20


def written(path: Path, seed: int, **options: str) -> None:
    draw = random.Random(seed)
    with qcow2.open(path, "r+", **options) as disk:
        for _ in range(40):
            offset = draw.randrange(SIZE - 100_000)
            nbytes = draw.choice([1, 512, 4096, 65536, 100_000])
            match draw.randrange(4):
                case 0:
                    disk.write_zeroes(offset, nbytes)
                case 1:
                    disk.discard(offset, nbytes)
                case _:
                    disk.write(offset, draw.randbytes(nbytes))


def plain(path: Path, options: str = "") -> None:
    qemu_img("create", "-q", "-f", "qcow2", *(["-o", options] if options else []), str(path), str(SIZE))
    written(path, 1)


def overlay(path: Path) -> None:
    plain(path.with_name("base"))
    words = ("-b", "base", "-F", "qcow2", str(path), str(SIZE + (1 << 20)))
    qemu_img("create", "-q", "-f", "qcow2", "-o", "extended_l2=on,cluster_size=128k", *words)
    written(path, 2)


def over_raw(path: Path) -> None:
    path.with_name("base").write_bytes(random.Random(3).randbytes(SIZE - 70_000))
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", str(path), str(SIZE))
    written(path, 4)


def compressed(path: Path) -> None:
    plain(path)
    with qcow2.open(path, "r+") as disk:
        disk.write_compressed(1 << 20, b"text" * (1 << 18))


def beside(path: Path) -> None:
    plain(path, f"data_file={path}.data")


IMAGES: dict[str, Callable[[Path], None]] = {
    "plain": plain,
    "small clusters": lambda path: plain(path, "cluster_size=512"),
    "version 2": lambda path: plain(path, "compat=0.10"),
    "overlay": overlay,
    "over raw": over_raw,
    "compressed": compressed,
    "data file": beside,
}


@pytest.mark.parametrize("make", IMAGES.values(), ids=IMAGES)
def test_it_reads_what_the_engine_reads(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "disk")
    draw = random.Random(5)
    with qcow2.open(tmp_path / "disk") as disk:
        engine = bytearray(disk.size)
        disk._run(lambda: disk.image.read(0, MemoryBuffer(memoryview(engine))))
        done = 0
        for _ in range(300):
            offset = draw.randrange(disk.size)
            nbytes = min(disk.size - offset, draw.choice([1, 2, 512, 5000, 65536, 300_000]))
            target = bytearray(b"?" * nbytes)
            if disk._glance.fills(offset, memoryview(target)):
                assert target == engine[offset : offset + nbytes]
                done += 1
            assert disk.read(offset, nbytes) == engine[offset : offset + nbytes]
        assert done > 100
        assert (done < 300) == (make is compressed)


def test_what_the_engine_has_to_decipher_is_its_own(tmp_path: Path) -> None:
    qcow2.create(tmp_path / "disk", SIZE, key=b"secret", iter_time=1)
    with qcow2.open(tmp_path / "disk", "r+", key=b"secret") as disk:
        disk.write(0, b"x" * 100_000)
    with qcow2.open(tmp_path / "disk", key=b"secret") as disk:
        assert disk.read(0, 100_000) == b"x" * 100_000
        assert not disk._glance.fills(0, memoryview(bytearray(100_000)))


def test_it_is_for_disks_that_nobody_writes_to(tmp_path: Path) -> None:
    plain(tmp_path / "disk")
    with qcow2.open(tmp_path / "disk", "r+") as disk:
        disk.read(0, SIZE)
        assert not disk._glance.fills(0, memoryview(bytearray(512)))


def test_it_leaves_to_the_engine_what_takes_long(tmp_path: Path) -> None:
    with (tmp_path / "disk").open("wb") as file:
        file.truncate(2 * MOST)
    with qcow2.open(tmp_path / "disk", format="raw") as disk:
        assert disk._glance.fills(0, memoryview(bytearray(MOST)))
        assert not disk._glance.fills(0, memoryview(bytearray(MOST + 1)))
        assert disk.read(0, MOST + 1) == bytes(MOST + 1)


def test_an_error_of_the_host_is_the_engine_s_to_tell(tmp_path: Path) -> None:
    plain(tmp_path / "disk")
    with qcow2.open(tmp_path / "disk") as disk:
        expected = disk.read(0, SIZE)
        own, directory = os.dup(disk.files[0].fd), os.open(tmp_path, os.O_RDONLY)
        os.dup2(directory, disk.files[0].fd)
        try:
            with pytest.raises(IsADirectoryError) as raised:
                disk.read(0, SIZE)
            assert raised.value.filename == str(tmp_path / "disk")
        finally:
            os.dup2(own, disk.files[0].fd)
            os.close(own)
            os.close(directory)
        assert disk.read(0, SIZE) == expected


def test_a_child_cannot_read_even_if_a_read_was_under_way(tmp_path: Path) -> None:
    plain(tmp_path / "disk")
    with qcow2.open(tmp_path / "disk") as disk:
        disk.read(0, SIZE)

        def live() -> int:
            try:
                disk.read(0, 512)
            except OSError:
                return 7
            return 0

        with disk._thread._turn:
            child = fork(live)
        assert status_of(child) == 7


def test_threads_and_interrupts_leave_it_whole(tmp_path: Path) -> None:
    """An interrupt in the midst of a read gives the turn back, so that others go on."""
    plain(tmp_path / "disk")
    with qcow2.open(tmp_path / "disk") as disk:
        expected = disk.read(0, SIZE)
        wrong = []

        def read(seed: int) -> None:
            draw = random.Random(seed)
            for _ in range(500):
                offset = draw.randrange(SIZE - 5000)
                if disk.read(offset, 5000) != expected[offset : offset + 5000]:
                    wrong.append(offset)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        before = signal.signal(signal.SIGALRM, _interrupt)
        for number in range(100):
            with pytest.raises(Interrupted):
                _read_until(0.0003 + 0.00001 * number, disk, expected)
        signal.signal(signal.SIGALRM, before)
        for thread in threads:
            thread.join()
        assert not wrong
        assert disk.read(0, SIZE) == expected


def _read_until(seconds: float, disk: qcow2.Disk, expected: bytes) -> None:
    signal.setitimer(signal.ITIMER_REAL, seconds)
    while True:
        assert disk.read(0, 4096) == expected[:4096]


class Interrupted(Exception):
    """By the alarm."""


def _interrupt(*_: object) -> None:
    raise Interrupted
