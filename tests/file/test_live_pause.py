"""What has all requests wait: for no FLUSH of the guest's, however many come, and not longer for a longer chain."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

import qcow2
from qcow2.engine.image import Image
from tests import slowdisk
from tests.frontend import FLUSH, IN, OUT, FrontEnd
from tests.served import Served, serve
from tests.slowdisk import SlowDisk
from vhost.overlaywish import OverlayWish
from vhost.snapshot import Pace, Snapshots

MIB = 1 << 20
BLOCK = 4096
ROUNDS = 30
MOST = 5  # fdatasyncs: of the FLUSH under way two, if links wait, and of our own; one more of a FLUSH between


def make(directory: Path) -> Path:
    """An overlay, whose links wait."""
    (directory / "base").write_bytes(b"b" * 8 * MIB)
    qcow2.create(directory / "disk", size=8 * MIB, backing=directory / "base", backing_format="raw")
    return directory / "disk"


def flush_without_end(guest: FrontEnd, stop: threading.Event) -> None:
    """Four at a time, and a write to a place of its own before each."""
    submitted = 0
    while not stop.is_set() or submitted:
        while submitted < 8 and not stop.is_set():
            guest.submit(OUT, submitted % 64 * 65536, b"w" * BLOCK)
            guest.submit(FLUSH)
            submitted += 2
        submitted -= len(guest.wait())


@pytest.mark.parametrize("writethrough", [False, True])
def test_flushes_without_end_keep_nobody_waiting(tmp_path: Path, writethrough: bool) -> None:
    """Counted are fdatasyncs from when requests shall wait until none is under way."""
    stop = threading.Event()
    with serve(make(tmp_path)) as served, FrontEnd(served.socket_path) as guest:
        guest.set_writeback(not writethrough)
        device, syncs = served.device, list[int]()
        device.on_alone = lambda: syncs.append(device.worker.counters.syncs)

        def begin(done: Callable[[str], None]) -> None:
            syncs.append(device.worker.counters.syncs)
            done("that was all")

        load = threading.Thread(target=flush_without_end, args=(guest, stop))
        load.start()
        try:
            for _ in range(ROUNDS):
                with device.keeping():
                    assert device.alone(begin) == "that was all"
        finally:
            stop.set()
            load.join()
    assert max(end - start for start, end in zip(syncs[::2], syncs[1::2], strict=False)) <= MOST


def test_requests_do_not_wait_for_a_flush_that_hangs(tmp_path: Path) -> None:
    backing, mount_point = tmp_path / "backing", tmp_path / "slow"
    backing.mkdir()
    mount_point.mkdir()
    make(backing)
    begun, ended = threading.Event(), list[str]()
    with SlowDisk(backing, mount_point) as disk, serve(mount_point / "disk", beside=tmp_path) as served:
        with FrontEnd(served.socket_path) as guest:
            guest.write(0, b"v" * BLOCK)
            served.device.on_alone = begun.set
            with disk.holding(slowdisk.FSYNC):
                guest.submit(FLUSH)
                disk.wait_for_one()
                waiting = threading.Thread(target=wait_alone, args=(served, ended))
                waiting.start()
                begun.wait()
                guest.submit(IN, 0, nbytes=BLOCK)  # a write waits for the kernel, which syncs that file
                assert [done.data for done in guest.wait()] == [b"v" * BLOCK]
                assert ended == []
                disk.let_go()
            waiting.join()
            assert ended == [""]
            assert len(guest.wait()) == 1  # the FLUSH


def wait_alone(served: Served, ended: list[str]) -> None:
    with served.device.keeping():
        ended.append(served.device.alone(lambda done: done("")))


def test_snapshot_takes_the_worker_as_long_over_any_chain(tmp_path: Path) -> None:
    """Counted are calls of Python on its thread."""
    with serve(make(tmp_path)) as served, FrontEnd(served.socket_path) as guest:
        snapshots = Snapshots(served.device, served.backend, served.held)
        counts = []
        for number in range(20):
            guest.write(0, bytes([number]) * BLOCK)
            with counted_calls(served) as calls:
                assert snapshots.take(f"s{number}", Pace(), OverlayWish()) == ""
            counts.append(len(calls))
    assert max(counts[15:]) <= max(counts[2:5]) * 1.1


def test_first_writes_after_a_snapshot_do_not_enter_python(tmp_path: Path) -> None:
    with serve(make(tmp_path)) as served, FrontEnd(served.socket_path) as guest:
        snapshots = Snapshots(served.device, served.backend, served.held)
        guest.write(0, b"w" * BLOCK)
        for number in range(3):
            assert snapshots.take(f"s{number}", Pace(), OverlayWish()) == ""
            before = served.device.worker.counters.python_requests
            for cluster in range(4):
                guest.write(cluster * 65536, bytes([number]) * BLOCK)
            assert served.device.worker.counters.python_requests == before


def test_overlay_has_tables_where_the_disk_was_used_since_the_last_snapshot(tmp_path: Path) -> None:
    qcow2.create(tmp_path / "disk", size=2 << 30)
    with serve(tmp_path / "disk") as served, FrontEnd(served.socket_path) as guest:
        snapshots, counts = Snapshots(served.device, served.backend, served.held), []
        for guest_offset in (0, 1 << 30):
            guest.write(guest_offset, b"w" * BLOCK)
        for number in range(3):
            assert snapshots.take(f"s{number}", Pace(), OverlayWish()) == ""
            assert served.held.disk is not None
            counts.append(served.held.disk.image.statistics.l2_tables)
            guest.write(0, b"w" * BLOCK)
        assert counts == [2, 1, 1]


@contextmanager
def counted_calls(served: Served) -> Iterator[list[str]]:
    """The functions that are called on the worker's thread meanwhile."""
    calls: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            calls.append(frame.f_code.co_name)

    served.device.worker.call(lambda: sys.setprofile(note))
    try:
        yield calls
    finally:
        served.device.worker.call(lambda: sys.setprofile(None))


def test_flush_after_an_exchange_knows_of_links_that_wait(tmp_path: Path) -> None:
    with serve(make(tmp_path)) as served, FrontEnd(served.socket_path) as guest:
        image = served.held.disk.image if served.held.disk is not None else None
        assert isinstance(image, Image)
        guest.write(0, b"w" * BLOCK)
        with served.device.keeping():
            assert served.device.exchange(lambda done: done(""), lambda: None, lambda: None) == ""
        assert served.device.worker.call(lambda: image.has_waiting_links)
        guest.flush()
        assert not served.device.worker.call(lambda: image.has_waiting_links)
