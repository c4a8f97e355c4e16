"""Reads and entries through mappings of the image: what they return or leave, and what is left of them."""

import os
import resource
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

import qcow2
from tests.frontend import FLUSH, IN, IOERR, OK, WRITE_ZEROES, FrontEnd
from tests.program import Daemon, qcow2_tool_ok

CLUSTER = 64 << 10
NCLUSTERS = 16
PLACES = [(0, 4096), (512, 512), (3584, 1024), (CLUSTER - 512, 1024), (5 * CLUSTER + 8192, 32768)]
MUCH = 32 << 10  # bytes since the last sync: what is cleared then is stored, not written
TIMES = 3  # from the page cache, noted and mapped; then through the mapping


def content(guest_offset: int, nbytes: int) -> bytes:
    whole = b"".join(number.to_bytes(8, "big") for number in range(guest_offset // 8, -(-(guest_offset + nbytes) // 8)))
    return whole[guest_offset % 8 :][:nbytes]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qcow2_tool_ok("create", path, str(2 * NCLUSTERS * CLUSTER))
    with qcow2.open(str(path), writable=True) as disk:
        disk.write(0, content(0, NCLUSTERS * CLUSTER))
    return path


@pytest.fixture
def daemon(image: Path) -> Iterator[Daemon]:
    with Daemon(image) as daemon:
        yield daemon


def mappings(daemon: Daemon, image: Path) -> int:
    """Of the whole image, to be read."""
    lines = Path(f"/proc/{daemon.process.pid}/maps").read_text().splitlines()
    return sum(line.endswith(f" {image}") and " r--s " in line for line in lines)


def read_by_calls(daemon: Daemon) -> int:
    """Bytes so far."""
    return int(Path(f"/proc/{daemon.process.pid}/io").read_text().split()[1])


def calls_that_write(daemon: Daemon) -> int:
    """So far, signals of the queue included."""
    return int(Path(f"/proc/{daemon.process.pid}/io").read_text().split()[7])


def is_near(path: Path) -> bool:
    """Whether this host's disk holds it, as far as /proc/mounts says."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    where = max((place for place, _ in mounts if path.is_relative_to(place)), key=len)
    return dict(mounts)[where] in ("ext4", "xfs", "btrfs", "f2fs")


def read_all(guest: FrontEnd) -> None:
    for guest_offset, nbytes in PLACES:
        for _ in range(TIMES):
            assert guest.read(guest_offset, nbytes) == content(guest_offset, nbytes)


def test_reads_again_return_what_is_there(daemon: Daemon) -> None:
    with FrontEnd(daemon.socket_path) as guest:
        read_all(guest)


def test_what_changed_after_a_read_is_read(daemon: Daemon) -> None:
    with FrontEnd(daemon.socket_path) as guest:
        read_all(guest)
        guest.write(512, b"1" * 512)
        assert guest.read(0, 4096) == content(0, 512) + b"1" * 512 + content(1024, 3072)
        guest.discard(5 * CLUSTER, CLUSTER)
        assert guest.read(5 * CLUSTER + 8192, 4096) == bytes(4096)
        guest.flush()
        guest.write(5 * CLUSTER + 8192, b"2" * 512)
        for _ in range(TIMES):
            assert guest.read(5 * CLUSTER + 8192, 1024) == b"2" * 512 + bytes(512)


def test_what_the_image_grows_by_is_read(daemon: Daemon) -> None:
    with FrontEnd(daemon.socket_path) as guest:
        read_all(guest)
        for cluster in range(NCLUSTERS, 2 * NCLUSTERS):
            guest.write(cluster * CLUSTER, bytes([cluster]) * 4096)
            for _ in range(TIMES):
                assert guest.read(cluster * CLUSTER, 8192) == bytes([cluster]) * 4096 + bytes(4096)


def test_an_image_that_is_cut_off_meanwhile_ends_no_daemon(daemon: Daemon, image: Path) -> None:
    with FrontEnd(daemon.socket_path) as guest:
        read_all(guest)
        os.truncate(image, CLUSTER)
        for guest_offset, nbytes in PLACES:
            done = guest.do(IN, guest_offset, nbytes=nbytes)
            assert done.status != OK or done.data == bytes(nbytes)
        assert guest.read(NCLUSTERS * CLUSTER, 4096) == bytes(4096)


def test_what_lies_beside_two_reads_is_copied_without_a_call(daemon: Daemon, image: Path) -> None:
    if not is_near(image):
        pytest.skip(f"{image} is not on a disk of this host")
    pages = [page * 4096 for page in range(NCLUSTERS * CLUSTER // 4096)]
    with FrontEnd(daemon.socket_path) as guest:
        guest.flush()
        for guest_offset in pages[::8]:
            guest.read(guest_offset, 4096)
        before = read_by_calls(daemon)
        for guest_offset in pages:
            assert guest.read(guest_offset, 4096) == content(guest_offset, 4096)
        assert read_by_calls(daemon) - before < len(pages) * 4096 // 2


def test_each_image_is_mapped_once_and_let_go(daemon: Daemon, image: Path) -> None:
    if not is_near(image):
        pytest.skip(f"{image} is not on a disk of this host")
    for _ in range(3):
        with FrontEnd(daemon.socket_path) as guest:
            read_all(guest)
            assert mappings(daemon, image) == 1


def test_what_goes_past_the_page_cache_is_not_mapped(image: Path) -> None:
    with Daemon(image, "--cache=none") as daemon, FrontEnd(daemon.socket_path) as guest:
        read_all(guest)
        assert mappings(daemon, image) == 0


def test_an_entry_is_stored_without_a_call(daemon: Daemon, image: Path) -> None:
    if not is_near(image):
        pytest.skip(f"{image} is not on a disk of this host")
    with FrontEnd(daemon.socket_path) as guest:
        guest.write(CLUSTER, bytes(MUCH))
        guest.write_zeroes(0, CLUSTER, unmap=False)
        before = calls_that_write(daemon)
        for cluster in range(1, NCLUSTERS):
            guest.write_zeroes(cluster * CLUSTER, CLUSTER, unmap=False)
        assert calls_that_write(daemon) - before < 3 * NCLUSTERS // 2, "one signals the end"


def test_entries_outlive_the_daemon(daemon: Daemon, image: Path) -> None:
    with FrontEnd(daemon.socket_path) as guest:
        guest.write(CLUSTER, content(CLUSTER, MUCH))
        for cluster in range(0, NCLUSTERS, 2):
            guest.write_zeroes(cluster * CLUSTER, CLUSTER, unmap=False)
            guest.write((NCLUSTERS + cluster) * CLUSTER, b"n" * 512)
        daemon.kill()
    with qcow2.open(str(image)) as disk:
        for cluster in range(NCLUSTERS):
            old = content(cluster * CLUSTER, CLUSTER)
            assert disk.read(cluster * CLUSTER, CLUSTER) == (bytes(CLUSTER) if cluster % 2 == 0 else old)
            new = b"n" * 512 if cluster % 2 == 0 else bytes(512)
            assert disk.read((NCLUSTERS + cluster) * CLUSTER, 512) == new


def test_an_entry_that_is_gone_is_no_success(daemon: Daemon, image: Path) -> None:
    """Its page is cut off once it is mapped, and no write brings it back."""
    segment = struct.pack("<QII", CLUSTER // 512, CLUSTER // 512, 0)
    with FrontEnd(daemon.socket_path) as guest:
        guest.write(CLUSTER, bytes(MUCH))
        guest.write_zeroes(0, CLUSTER, unmap=False)
        os.truncate(image, 0)
        resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        assert guest.do(WRITE_ZEROES, 0, segment).status == IOERR
        assert guest.do(FLUSH).status == IOERR
        resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
