"""What a mirror finds at its target: an image not closed cleanly, its own copy after a pause, a host that fails."""

import errno
from pathlib import Path

import pytest

import qcow2
from qcow2.job.mirror import CHUNK
from tests import slowdisk
from tests.file.test_jobs import MIB, SHOWN, chain, content, control, start, top
from tests.file.test_mirror import until
from tests.frontend import FrontEnd
from tests.oracle import assert_clean, read_header
from tests.patience import TIMEOUT
from tests.realfault.host import SYNC, WRITE, Fault, Host
from tests.slowdisk import SlowDisk

__all__ = ["chain", "top"]  # fixtures


def make_dirty(path: Path) -> None:
    qcow2.create(path, len(SHOWN), lazy_refcounts=True, preallocation="metadata")
    with path.open("r+b") as file:  # the dirty bit
        file.seek(72)
        file.write((1).to_bytes(8, "big"))


def test_a_target_that_was_not_closed_cleanly_is_repaired_while_the_guest_restarts(top: Path, tmp_path: Path) -> None:
    backing, mount_point = tmp_path / "backing", tmp_path / "slow"
    backing.mkdir()
    mount_point.mkdir()
    make_dirty(backing / "copy")
    with SlowDisk(backing, mount_point) as disk, start(top) as daemon:
        with FrontEnd(daemon.socket_path) as guest, control(top) as client:
            with disk.holding(slowdisk.WRITE):
                job = client.mirror(str(mount_point / "copy"), existing=True).job
                disk.wait_for_one()
                guest.start_queue(guest.stop_queue())
                disk.let_go()
            until(client, job, "ready")
            client.cancel(job)
            client.wait(job)
        daemon.stop()
        assert daemon.process.stderr is not None
        said = daemon.process.stderr.read()
    assert f"{mount_point / 'copy'}: was not closed cleanly, repairing it" in said
    assert f"{top}: was not closed cleanly" not in said
    assert_clean(backing / "copy")
    assert content(backing / "copy") == SHOWN


def test_a_job_that_is_cancelled_does_not_repair_its_target_to_the_end(top: Path, tmp_path: Path) -> None:
    backing, mount_point = tmp_path / "backing", tmp_path / "slow"
    backing.mkdir()
    mount_point.mkdir()
    make_dirty(backing / "copy")
    with SlowDisk(backing, mount_point) as disk, start(top) as daemon:
        with FrontEnd(daemon.socket_path), control(top) as client:
            with disk.holding(slowdisk.WRITE):
                job = client.mirror(str(mount_point / "copy"), existing=True).job
                disk.wait_for_one()
                client.cancel(job)
                disk.let_go()
            assert client.wait(job).state == "cancelled"
        daemon.stop()
    assert read_header(backing / "copy").fields["incompatible_features"] == 1
    qcow2.open(backing / "copy", "r+").close()
    assert_clean(backing / "copy")


def test_the_copy_of_the_job_under_way_is_nobodys_left_over(top: Path, tmp_path: Path) -> None:
    (tmp_path / ".other.mirror").write_bytes(b"")
    with start(top) as daemon:
        with FrontEnd(daemon.socket_path) as guest, control(top) as client:
            job = client.mirror("copy").job
            until(client, job, "ready")
            guest.start_queue(guest.stop_queue())
            until(client, job, "ready")
        daemon.stop()
        assert daemon.process.stderr is not None
        said = daemon.process.stderr.read()
    assert ".other.mirror: was left" in said
    assert ".copy.mirror: was left" not in said


@pytest.mark.parametrize("failing", ["copy", "data"])
def test_a_copy_that_cannot_be_synced_is_not_the_guests_trouble(top: Path, tmp_path: Path, failing: str) -> None:
    qcow2.create(tmp_path / "copy", len(SHOWN), data_file="data")
    host = Host(tmp_path / failing, Fault(for_good=True), tmp_path / "told")
    with start(top, "--aio=threads", under=host.under) as daemon:
        with FrontEnd(daemon.socket_path) as guest, control(top) as client:
            job = client.mirror("copy", existing=True).job
            until(client, job, "ready")
            host.aim(2)  # a sync of a second descriptor, and its close, come first
            host.arm()
            client.complete(job)
            ended = client.wait(job)
            assert (ended.state, "no more writes after: sync failed: Input/output" in ended.error) == ("failed", True)
            assert host.hit == SYNC
            assert client.status()["failed"] is False
            guest.write(0, b"w" * 4096)
            guest.flush()
        daemon.stop()
    assert content(top)[:4096] == b"w" * 4096


def test_a_job_says_that_what_was_served_is_not_closed_cleanly(top: Path) -> None:
    host = Host(top, Fault(errno.ENOSPC, for_good=True), top.with_name("told"))
    with start(top, "--aio=threads", under=host.under) as daemon:
        with FrontEnd(daemon.socket_path) as guest, control(top) as client:
            job = client.mirror("copy").job
            until(client, job, "ready")
            guest.write(0, b"w" * 4096)
            host.aim(2)  # syncs of links that wait come first
            host.arm()
            client.complete(job)
            ended = client.wait(job)
            assert (ended.state, ended.error) == (
                "completed",
                f"{top}: what was served is not closed cleanly: No space left on device",
            )
            assert guest.read(0, 4096) == b"w" * 4096
        daemon.stop()
    assert top.samefile(top.with_name("copy"))
    assert_clean(top)


def test_what_the_copy_did_not_take_while_the_job_was_paused_is_no_news(top: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").write_bytes(bytes(len(SHOWN)))
    host = Host(tmp_path / "copy", Fault(for_good=True), tmp_path / "told")
    with start(top, under=host.under) as daemon, FrontEnd(daemon.socket_path) as guest, control(top) as client:
        job = client.mirror("copy", "raw", existing=True, on_error="stop").job
        until(client, job, "ready")
        host.aim(0)
        host.arm()
        guest.write(0, b"w" * 4096)
        until(client, job, "paused")
        guest.write(CHUNK, b"v" * 4096)
        assert host.hit == WRITE
        host.arm(False)
        client.resume(job)
        while client.job(job).state not in ("ready", "paused"):
            assert client.next_event(TIMEOUT) is not None
        assert client.job(job).state == "ready"
        client.cancel(job)
        assert client.wait(job).state == "cancelled"
        daemon.stop()
    assert (tmp_path / "copy").read_bytes() == content(top)
    assert content(top) == b"w" * 4096 + SHOWN[4096:CHUNK] + b"v" * 4096 + SHOWN[CHUNK + 4096 :]


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
@pytest.mark.parametrize("when", ["while it waits", "before it has begun anew"])
def test_what_was_there_grows_with_a_disk_that_has_grown_meanwhile(
    top: Path, tmp_path: Path, image_format: str, when: str
) -> None:
    if image_format == "raw":
        (tmp_path / "copy").write_bytes(b"o" * len(SHOWN))
    else:
        qcow2.create(tmp_path / "copy", len(SHOWN))
    with start(top) as daemon:
        with FrontEnd(daemon.socket_path) as guest, control(top) as client:
            job = client.mirror("copy", image_format, existing=True).job
            until(client, job, "ready")
            client.pause(job)
            queue = guest.stop_queue()
            if when == "while it waits":
                client.resize(len(SHOWN) + MIB)
                guest.start_queue(queue)
            else:
                guest.start_queue(queue)
                client.resize(len(SHOWN) + MIB)
            guest.write(len(SHOWN), b"g" * 512)
            client.resume(job)
            while (now := client.job(job)).state != "ready" or now.total < len(SHOWN) + MIB:
                assert now.state != "failed", now.error
                assert client.next_event(TIMEOUT) is not None
            guest.write(len(SHOWN) + 512, b"w" * 512)
            client.cancel(job)
            assert client.wait(job).left
        daemon.stop()
    grown = SHOWN + b"g" * 512 + b"w" * 512 + bytes(MIB - 1024)
    copy = tmp_path / "copy"
    assert (copy.read_bytes() if image_format == "raw" else content(copy)) == content(top) == grown
