"""L2 tables larger than the cache, in the page cache: requests find their slices without Python."""

import random
from pathlib import Path

import pytest

import qcow2
from tests.file.test_fresh_writes import stop
from tests.frontend import FrontEnd
from tests.oracle import assert_clean, qemu_img
from tests.program import Daemon

CLUSTER = 4096
SLICE = 512 * CLUSTER
NSLICES = 1000  # of which the smallest cache of a daemon holds 256
BLOCK = 4096
STRAY = 200  # requests that a busy host may send to Python: who makes the worker wait is not asked again at once


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A table, one slice long, for each 2 MiB, and one cluster of data in it."""
    path = tmp_path / "large.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={CLUSTER}", path, str(NSLICES * SLICE))
    with qcow2.open(str(path), writable=True) as disk:
        for number in range(NSLICES):
            disk.write(number * SLICE, block(number))
    return path


def block(number: int) -> bytes:
    return number.to_bytes(4, "big") * (BLOCK // 4)


def shuffled(seed: int) -> list[int]:
    return random.Random(seed).sample(range(NSLICES), NSLICES)


def test_few_reads_of_a_large_disk_enter_python(image: Path) -> None:
    with Daemon(image, "--stats", "--cache-size=1M") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            for number in shuffled(1):
                assert guest.read(number * SLICE, BLOCK) == block(number)
                assert guest.read(number * SLICE + CLUSTER, BLOCK) == bytes(BLOCK)
        told = stop(daemon)
    assert told["reads"] == 2 * NSLICES
    assert told["python_requests"] < STRAY


def test_few_writes_to_a_large_disk_enter_python(image: Path) -> None:
    with Daemon(image, "--stats", "--cache-size=1M") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            for number in shuffled(2):
                guest.write(number * SLICE, block(number + NSLICES))
                guest.write(number * SLICE + CLUSTER, block(number + 2 * NSLICES))
            for number in shuffled(3):
                assert guest.read(number * SLICE, 2 * BLOCK) == block(number + NSLICES) + block(number + 2 * NSLICES)
        told = stop(daemon)
    assert told["clusters_allocated"] == NSLICES
    assert told["python_requests"] < STRAY
    assert_clean(image)
    with qcow2.open(str(image)) as disk:
        for number in range(NSLICES):
            assert disk.read(number * SLICE, 2 * BLOCK) == block(number + NSLICES) + block(number + 2 * NSLICES)


def test_few_reads_through_to_a_large_backing_image_enter_python(image: Path, tmp_path: Path) -> None:
    top = tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", top)
    with Daemon(top, "--stats", "--cache-size=1M") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            for number in shuffled(4):
                assert guest.read(number * SLICE, BLOCK) == block(number)
        told = stop(daemon)
    assert told["python_requests"] < STRAY


def test_a_table_that_the_file_ends_within_reads_as_zeros_from_there(image: Path) -> None:
    """And not as whatever slice was read before."""
    with qcow2.open(str(image), writable=True) as disk:
        disk.write(SLICE + 200 * CLUSTER, block(1))
        l1_offset = disk.image.header.record.l1_table_offset
    with image.open("r+b") as file:
        file.seek(l1_offset)
        table = int.from_bytes(file.read(8), "big") & ((1 << 56) - 1)
        file.seek(table)
        front = file.read(512)
        end = file.seek(0, 2)
        assert end % CLUSTER == 0
        file.write(front)
        file.seek(l1_offset)
        file.write(end.to_bytes(8, "big"))
    with Daemon(image, "--read-only", "--cache-size=1M") as daemon, FrontEnd(daemon.socket_path) as guest:
        assert guest.read(SLICE + 200 * CLUSTER, BLOCK) == block(1)
        assert guest.read(200 * CLUSTER, BLOCK) == bytes(BLOCK)
        assert guest.read(0, BLOCK) == block(0)


def test_a_request_over_very_many_slices_is_the_engines(tmp_path: Path) -> None:
    """Loading them all would hold up everybody else: two slices in each of nine images."""
    small, slice_bytes = 512, 64 * 512
    path = tmp_path / "0"
    expected = bytearray(random.Random(8).randbytes(2 * slice_bytes))
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={small}", path, "1M")
    with qcow2.open(str(path), writable=True) as disk:
        disk.write(0, bytes(expected))
    for depth in range(1, 9):
        below, path = path, tmp_path / str(depth)
        qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={small}", "-b", below, "-F", "qcow2", path)
        with qcow2.open(str(path), writable=True) as disk:
            for last in (slice_bytes - small, 2 * slice_bytes - small):
                expected[last : last + small] = bytes([depth]) * small
                disk.write(last, bytes([depth]) * small)
    with Daemon(path, "--stats") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            assert guest.read(0, 2 * slice_bytes) == expected
        told = stop(daemon)
    assert told["python_requests"] == 1


def test_no_read_misses_a_link_that_waits(image: Path, tmp_path: Path) -> None:
    """Copies over a backing file: their links are not in the file when the cache has long given the slice up."""
    top = tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={CLUSTER}", "-b", image, "-F", "qcow2", top)
    with Daemon(top, "--cache-size=1M") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            for seed in (5, 6):
                for number in shuffled(seed):
                    guest.write(number * SLICE + seed * 512, block(number + NSLICES)[:512])
                for number in shuffled(seed + 2):
                    expected = bytearray(block(number))
                    for written in range(5, seed + 1):
                        expected[written * 512 : (written + 1) * 512] = block(number + NSLICES)[:512]
                    assert guest.read(number * SLICE, BLOCK) == expected
        daemon.stop()
    assert_clean(top)
