"""Fresh writes whose bytes take a while: by O_DIRECT, on a far file, or with old content that is not in memory.

The data plane serves them alone; whoever comes to the same cluster meanwhile waits, and nothing is lost.
"""

import errno
import json
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

import qcow2
from tests import slowdisk
from tests.builder import Recipe, build
from tests.builder.record import LAZY_REFCOUNTS
from tests.calm import assert_few_in_python, calm
from tests.frontend import FLUSH, IN, IOERR, OK, OUT, WRITE_ZEROES, Completion, FrontEnd
from tests.load import Load
from tests.oracle import assert_clean
from tests.program import Daemon, qcow2_tool_ok
from tests.slowdisk import SlowDisk

MIB = 1 << 20
SIZE = 64 * MIB
CLUSTER = 65536
BLOCK = 4096


def stop(daemon: Daemon) -> dict[str, int]:
    """End the daemon cleanly -> its counters."""
    daemon.stop()
    assert daemon.process.stdout is not None
    told: dict[str, int] = json.loads(daemon.process.stdout.read())
    return told


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SlowDisk]:
    """A file system that may hang, and `image` on it."""
    backing, mount_point = tmp_path / "backing", tmp_path / "slow"
    backing.mkdir()
    mount_point.mkdir()
    build(Recipe(size=SIZE, compatible=LAZY_REFCOUNTS), backing / "image")
    (tmp_path / "image").symlink_to(mount_point / "image")  # the sockets lie beside it
    with SlowDisk(backing, mount_point) as disk:
        yield disk


def answers(guest: FrontEnd, count: int) -> list[int]:
    """The statuses of what is under way."""
    statuses: list[int] = []
    while len(statuses) < count:
        statuses += [done.status for done in guest.wait()]
    return statuses


def answers_until(guest: FrontEnd, slot: int) -> list[Completion]:
    """What is answered until *slot* is, which comes last."""
    done: list[Completion] = []
    while all(one.slot != slot for one in done):
        done += guest.wait()
    return sorted(done, key=lambda one: one.slot == slot)


@pytest.mark.parametrize("cache", ["none", "writeback"])
@pytest.mark.parametrize("aio", ["auto", "threads"])
def test_few_fresh_writes_to_a_far_file_enter_python(disk: SlowDisk, tmp_path: Path, aio: str, cache: str) -> None:
    order = random.Random(3).sample(range(SIZE // CLUSTER), 300)
    with Daemon(tmp_path / "image", "--stats", f"--aio={aio}", f"--cache={cache}") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            for cluster in order:
                guest.write(cluster * CLUSTER + BLOCK, cluster.to_bytes(2, "big") * (BLOCK // 2))
        told = stop(daemon)
    assert told["python_requests"] < 60
    assert told["clusters_allocated"] == 300
    path = tmp_path / "backing" / "image"
    assert_clean(path)
    with qcow2.open(str(path)) as image:
        for cluster in order:
            expected = bytes(BLOCK) + cluster.to_bytes(2, "big") * (BLOCK // 2) + bytes(BLOCK)
            assert image.read(cluster * CLUSTER, 3 * BLOCK) == expected


def test_whoever_meets_a_place_that_is_held_waits_for_it(disk: SlowDisk, tmp_path: Path) -> None:
    """Writes to the same cluster, and zeros over all of another one, while the first write of each is under way."""
    zeros = struct.pack("<QII", 2 * CLUSTER // 512, CLUSTER // 512, 0)
    with Daemon(tmp_path / "image", "--stats") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            guest.write(0, b"first" * 512)  # there is a table, and a stock
            with disk.holding(slowdisk.WRITE):
                guest.submit(OUT, CLUSTER, b"a" * BLOCK)
                guest.submit(OUT, 2 * CLUSTER, b"b" * BLOCK)
                disk.wait_for_one()
                for block in range(1, 8):
                    guest.submit(OUT, CLUSTER + block * BLOCK, bytes([block]) * BLOCK)
                guest.submit(WRITE_ZEROES, 0, zeros)  # which show, so it may be answered at any time
                looked = guest.submit(IN, CLUSTER, nbytes=BLOCK)
                early = answers_until(guest, looked)
                assert early[-1].data == bytes(BLOCK), "what is under way is not seen"
                assert len(early) <= 2
            assert answers(guest, 11 - len(early)) == [OK] * (11 - len(early))
            assert guest.read(2 * CLUSTER, CLUSTER) in (bytes(CLUSTER), b"b" * BLOCK + bytes(CLUSTER - BLOCK))
        told = stop(daemon)
    assert told["clusters_allocated"] == 3, "each got one place"
    path = tmp_path / "backing" / "image"
    assert_clean(path)
    with qcow2.open(str(path)) as image:
        written = b"a" * BLOCK + b"".join(bytes([block]) * BLOCK for block in range(1, 8))
        assert image.read(CLUSTER, 9 * BLOCK) == written + bytes(BLOCK)


def entry_offset(path: Path, cluster: int) -> int:
    """Where the file has the L2 entry of *cluster*, one of the first table."""
    with path.open("rb") as file:
        (l1_offset,) = struct.unpack(">Q", os.pread(file.fileno(), 8, 40))
        (entry,) = struct.unpack(">Q", os.pread(file.fileno(), 8, l1_offset))
    return int(entry & ((1 << 56) - 512)) + 8 * cluster


def test_a_name_that_finds_no_space_does_not_undo_those_that_did(disk: SlowDisk, tmp_path: Path) -> None:
    """One request has two places: the first is named and stays, though there is no space for the second."""
    path = tmp_path / "backing" / "image"
    with Daemon(tmp_path / "image") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            guest.write(0, b"first" * 512)  # there is a table, and a stock
            with disk.failing(errno.ENOSPC, entry_offset(path, 5)):
                assert guest.do(OUT, 4 * CLUSTER, b"a" * 2 * CLUSTER).status == IOERR
            assert guest.read(4 * CLUSTER, CLUSTER) in (bytes(CLUSTER), b"a" * CLUSTER)
            guest.write(9 * CLUSTER, b"b" * CLUSTER)  # what was given up goes back meanwhile
            assert guest.do(FLUSH).status == OK
            seen = [guest.read(cluster * CLUSTER, CLUSTER) for cluster in range(10)]
        daemon.stop()
    assert_clean(path)
    with qcow2.open(str(path)) as image:
        assert image.read(0, 10 * CLUSTER) == b"".join(seen)


def test_who_says_not_now_for_ever_is_not_asked_for_ever(disk: SlowDisk, tmp_path: Path) -> None:
    with Daemon(tmp_path / "image") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            guest.write(0, b"first" * 512)
            for code in (errno.EAGAIN, errno.EINTR):
                with disk.failing(code):
                    assert guest.do(OUT, 0, b"again" * 512).status == IOERR
            guest.write(0, b"later" * 512)
            assert guest.do(FLUSH).status == OK
        daemon.stop()


def overlay(path: Path, base: Path, content: bytes) -> None:
    """An image at *path* over a raw *base* that holds *content*."""
    base.write_bytes(content)
    qcow2_tool_ok("create", "-o", "lazy_refcounts=on", "-b", base, "-F", "raw", path, str(len(content)))


def write_to_each_cluster(guest: FrontEnd, content: bytes, order: list[int]) -> bytes:
    """A block of each cluster in *order*, eight of them under way; the whole disk after that."""
    expected = bytearray(content)
    left = iter(order)
    under_way = 0
    while True:
        while under_way < 8 and (cluster := next(left, None)) is not None:
            start, data = cluster * CLUSTER + BLOCK, cluster.to_bytes(2, "big") * (BLOCK // 2)
            guest.submit(OUT, start, data)
            expected[start : start + BLOCK] = data
            under_way += 1
        if not under_way:
            return bytes(expected)
        done = guest.wait()
        assert {one.status for one in done} == {OK}
        under_way -= len(done)


@pytest.mark.parametrize("cache", ["none", "writeback", "writethrough"])
def test_few_copies_to_a_far_file_enter_python(tmp_path: Path, cache: str) -> None:
    """There is no log: each is named once a SYNC has made it stable."""
    content = random.Random(4).randbytes(MIB) * 64
    backing, mount_point = tmp_path / "backing", tmp_path / "slow"
    backing.mkdir()
    mount_point.mkdir()
    overlay(backing / "image", tmp_path / "base", content)
    (tmp_path / "image").symlink_to(mount_point / "image")
    with SlowDisk(backing, mount_point), Daemon(tmp_path / "image", "--stats", f"--cache={cache}") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            expected = write_to_each_cluster(guest, content, random.Random(5).sample(range(1024), 200))
        told = stop(daemon)
    assert told["python_requests"] < 100
    assert told["clusters_allocated"] == 200
    assert_clean(backing / "image")
    with qcow2.open(str(backing / "image")) as image:
        assert image.read(0, len(content)) == expected


@calm
def test_stable_copies_need_no_python(tmp_path: Path) -> None:
    content = random.Random(6).randbytes(MIB) * 64
    path = tmp_path / "image"
    overlay(path, tmp_path / "base", content)
    with Daemon(path, "--stats", "--cache=writethrough") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            expected = write_to_each_cluster(guest, content, random.Random(7).sample(range(1024), 200))
        told = stop(daemon)
    assert_few_in_python(told, 100)
    assert told["clusters_allocated"] == 200
    assert_clean(path)
    with qcow2.open(str(path)) as image:
        assert image.read(0, len(content)) == expected


@pytest.mark.parametrize("cache", ["none", "writeback"])
@calm
def test_few_copies_of_what_is_not_in_memory_enter_python(tmp_path: Path, cache: str) -> None:
    base, path = tmp_path / "base", tmp_path / "image"
    content = random.Random(1).randbytes(16 * MIB - 512)
    base.write_bytes(content)
    with base.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    qcow2_tool_ok("create", "-o", "lazy_refcounts=on", "-b", base, "-F", "raw", path, str(16 * MIB - 512))
    clusters = len(content) // CLUSTER + 1
    order = random.Random(2).sample(range(clusters), clusters)
    with Daemon(path, "--stats", f"--cache={cache}") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            for cluster in order:
                guest.submit(OUT, cluster * CLUSTER + BLOCK, cluster.to_bytes(2, "big") * (BLOCK // 2))
                assert answers(guest, 1) == [OK]
        told = stop(daemon)
    assert_few_in_python(told, clusters // 2)
    assert told["clusters_allocated"] == clusters
    expected = bytearray(content)
    for cluster in order:
        start = cluster * CLUSTER + BLOCK
        expected[start : start + BLOCK] = cluster.to_bytes(2, "big") * (BLOCK // 2)
    assert_clean(path)
    with qcow2.open(str(path)) as image:
        assert image.read(0, len(content)) == expected


@pytest.mark.parametrize("kind", ["plain", "overlay", "subclusters", "encrypted"])
def test_writes_by_o_direct_race_with_discards_and_zeroes(tmp_path: Path, kind: str) -> None:
    base, path = tmp_path / "base", tmp_path / "image"
    content = bytes(SIZE)
    options = ["-o", "lazy_refcounts=on" + (",extended_l2=on" if kind == "subclusters" else "")]
    if kind == "overlay":
        content = random.Random(1).randbytes(SIZE)
        base.write_bytes(content)
        options += ["-b", str(base), "-F", "raw"]
    daemon_options = ["--cache=none", "--num-queues=2"]
    if kind == "encrypted":
        (tmp_path / "key").write_bytes(b"key")
        options = [
            *("--object", f"secret,id=key,file={tmp_path / 'key'}"),
            *("-o", "lazy_refcounts=on,encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"),
        ]
        daemon_options.append(f"--key-file={tmp_path / 'key'}")
    qcow2_tool_ok("create", *options, path, str(SIZE))
    with Daemon(path, *daemon_options) as daemon:
        with FrontEnd(daemon.socket_path, queues=2) as guest:
            load = Load(guest, 128, seed=len(kind), depth=32, base=content, zeroes=True)
            load.run(2000)
            load.drain()
        daemon.stop()
    with qcow2.open(str(path), key=b"key" if kind == "encrypted" else None) as image:
        load.verify(image)
    qcow2_tool_ok("check", path)
