"""Bitmaps under a real daemon, whose data plane serves most requests: exact after a stop and after SIGKILL."""

import random
import subprocess
from pathlib import Path

import pytest

import qcow2
from tests.bitmapreader import bitmaps_of
from tests.frontend import FrontEnd
from tests.oracle import qemu_img, qemu_read
from tests.patience import TIMEOUT
from tests.program import DAEMON, Daemon
from vhost import Control

SIZE = 24 << 20
GRANULARITIES = {"fine": 512, "cluster": 65536, "coarse": 1 << 20}


def made(path: Path, *, over: Path | None) -> Path:
    backing = [] if over is None else ["-b", over, "-F", "raw"]
    qemu_img("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", *backing, path, str(SIZE))
    for name, granularity in GRANULARITIES.items():
        qemu_img("bitmap", "--add", "-g", str(granularity), path, name)
    return path


class Guest:
    """Random requests, and what the bitmaps should say of them."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.dirty: dict[str, set[int]] = {name: set() for name in GRANULARITIES}

    def work(self, front: FrontEnd, requests: int) -> None:
        for _ in range(requests):
            self._request(front)

    def _request(self, front: FrontEnd) -> None:
        place = self.draw.randrange(SIZE // 65536) * 65536
        kind = self.draw.choice(["write", "write", "write", "discard", "zeroes", "flush", "read"])
        offset, nbytes = place + self.draw.randrange(16) * 4096, 4096
        if kind == "write":
            front.write(offset, bytes([self.draw.randrange(1, 256)]) * nbytes)
        elif kind in ("discard", "zeroes"):
            offset, nbytes = place, 65536
            if kind == "discard":
                front.discard(offset, nbytes)
            else:
                front.write_zeroes(offset, nbytes, unmap=self.draw.random() < 0.5)
        elif kind == "flush":
            front.flush()
            return
        else:
            front.read(offset, nbytes)
            return
        for name, granularity in GRANULARITIES.items():
            self.dirty[name].update(range(offset // granularity, (offset + nbytes - 1) // granularity + 1))

    def judge(self, image: Path) -> None:
        found = bitmaps_of(image)
        assert {name: bitmap.dirty for name, bitmap in found.items()} == self.dirty
        assert all(bitmap.is_valid for bitmap in found.values())


@pytest.mark.sample(3)
@pytest.mark.parametrize("cache", ["writeback", "writethrough", "unsafe"])
@pytest.mark.parametrize("over", [False, True], ids=["alone", "overlay"])
def test_bitmaps_are_exact_after_a_stop_and_after_a_kill(tmp_path: Path, cache: str, over: bool) -> None:
    base = tmp_path / "base"
    base.write_bytes(b"old!" * (SIZE // 4))
    image = made(tmp_path / "disk", over=base if over else None)
    guest = Guest(7)
    options = (f"--cache={cache}", f"--link-log={tmp_path}")
    with Daemon(image, *options) as daemon, FrontEnd(daemon.socket_path) as front:
        guest.work(front, 60)
        daemon.stop()
    guest.judge(image)
    with Daemon(image, *options) as daemon, FrontEnd(daemon.socket_path) as front:
        guest.work(front, 200)
        daemon.kill()
    for name, bitmap in bitmaps_of(image).items():
        assert bitmap.dirty >= guest.dirty[name]
    qcow2.open(image, writable=True, log_directory=str(tmp_path)).close()
    guest.judge(image)
    assert not list(tmp_path.glob("qcow2-links-*"))


def test_bitmaps_are_exact_after_a_kill_though_a_stream_came_first(tmp_path: Path) -> None:
    """It changes nothing that a bitmap could know, and so has a link log before any bit is live."""
    base = tmp_path / "base"
    base.write_bytes(b"old!" * (SIZE // 4))
    image = made(tmp_path / "disk", over=base)
    guest = Guest(7)
    options = (f"--link-log={tmp_path}", f"--control={tmp_path}/control")
    with Daemon(image, *options) as daemon, FrontEnd(daemon.socket_path) as front:
        with Control(tmp_path / "control") as control:
            assert control.wait(control.stream().job).state == "completed"
        guest.work(front, 20)
        daemon.kill()
    qcow2.open(image, writable=True, log_directory=str(tmp_path)).close()
    guest.judge(image)


def test_a_copy_of_what_a_bitmap_reports_brings_an_old_copy_up_to_date(tmp_path: Path) -> None:
    """Incremental backup, with a daemon that is killed between the two."""
    image = made(tmp_path / "disk", over=None)
    backup = bytearray(qemu_read(image))
    guest = Guest(3)
    for _ in range(2):
        with Daemon(image, f"--link-log={tmp_path}") as daemon, FrontEnd(daemon.socket_path) as front:
            guest.work(front, 100)
            daemon.kill()
    qcow2.open(image, writable=True, log_directory=str(tmp_path)).close()
    now = qemu_read(image)
    assert now != bytes(backup)
    for name, bitmap in bitmaps_of(image).items():
        copy = bytearray(backup)
        for bit in bitmap.dirty:
            start = bit * bitmap.granularity
            copy[start : start + bitmap.granularity] = now[start : start + bitmap.granularity]
        assert bytes(copy) == now, name


def test_a_live_snapshot_freezes_the_bitmaps_with_the_disk(tmp_path: Path) -> None:
    image, frozen = made(tmp_path / "disk", over=None), tmp_path / "frozen"
    guest = Guest(5)
    control = f"{tmp_path}/control"
    with Daemon(image, f"--control={control}") as daemon, FrontEnd(daemon.socket_path) as front:
        guest.work(front, 60)
        subprocess.run([DAEMON, "ctl", f"--control={control}", "snapshot", frozen.name], check=True, timeout=TIMEOUT)
        Guest(6).work(front, 60)
        daemon.stop()
    guest.judge(frozen)
    assert not bitmaps_of(image)
