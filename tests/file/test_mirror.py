"""`ctl mirror`: the copy is in step, and is served, or left; and a death at any moment finds the disk or its copy."""

import errno
import json
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

import qcow2
from qcow2.driver.file import HostFile
from qcow2.node.pivot import Pivot
from tests import slowdisk
from tests.file.test_jobs import (
    BLOCK,
    MIB,
    SHOWN,
    SIZE,
    chain,
    content,
    control,
    ctl,
    make_chain,
    open_files,
    start,
    top,
)
from tests.frontend import BackendGone, FrontEnd
from tests.load import Load
from tests.oracle import assert_clean, assert_not_corrupt, backing_name, qemu_img
from tests.patience import TIMEOUT
from tests.program import Daemon, qcow2_tool_ok
from tests.realfault.death import dying_from_start
from tests.slowdisk import SlowDisk
from vhost import Control, ControlError

__all__ = ["chain", "top"]  # fixtures


def get_ready(client: Control, job: int, load: Load) -> None:
    """Write until all is copied."""
    while (state := client.job(job).state) != "ready":
        assert state in ("running", "waiting"), client.job(job)
        load.run(10)


def until(client: Control, job: int, state: str) -> None:
    """Wait until the job is so."""
    client.subscribe("job")
    while client.job(job).state != state:
        assert client.next_event(TIMEOUT) is not None


@pytest.mark.parametrize(
    ("mode", "options", "only_top", "target"),
    [
        ("--cache=writeback", "extended_l2=on", False, "elsewhere/copy"),
        ("--cache=writethrough", "lazy_refcounts=on", False, "elsewhere/copy"),
        ("--cache=none", "", True, "elsewhere/copy"),
        ("--aio=threads", "cluster_size=4k", True, "copy"),
        ("--sandbox", "compat=0.10", False, "copy"),
    ],
)
def test_the_copy_is_served_and_the_guest_goes_on(
    tmp_path: Path, mode: str, options: str, only_top: bool, target: str
) -> None:
    top = make_chain(tmp_path, options)
    (tmp_path / "elsewhere").mkdir()
    with start(top, mode) as daemon, FrontEnd(daemon.socket_path) as guest, control(top) as client:
        load = Load(guest, SIZE // BLOCK, zeroes=True, base=SHOWN)
        load.run(50)
        job = client.mirror(target, top=only_top).job
        get_ready(client, job, load)
        load.run(100)
        assert client.complete(job).state == "running"
        while not client.job(job).has_ended:
            load.run(10)
        assert client.job(job).state == "completed", client.job(job)
        assert not open_files(daemon) & {"top", "top.old"} or target == "copy"
        assert_clean(tmp_path / "top.old")
        load.run(100)
        load.drain()
        daemon.stop()
    assert (tmp_path / target).samefile(top)
    assert top.is_symlink() == (target != "copy")
    assert_clean(top)
    assert content(top) == load.expected()
    assert backing_name(top) == (
        os.path.realpath(tmp_path / "mid") if only_top and target != "copy" else "mid" if only_top else None
    )
    with start(top) as daemon, FrontEnd(daemon.socket_path) as guest:
        assert guest.read(0, BLOCK) == load.expected()[:BLOCK]


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_the_copy_is_left_as_of_that_moment(top: Path, tmp_path: Path, image_format: str) -> None:
    with start(top) as daemon, FrontEnd(daemon.socket_path) as guest, control(top) as client:
        load = Load(guest, SIZE // BLOCK, zeroes=True, base=SHOWN)
        job = client.mirror("copy", image_format).job
        get_ready(client, job, load)
        load.run(50)
        load.drain()
        assert not (tmp_path / "copy").exists()  # before it is whole
        if image_format == "raw":
            with pytest.raises(ControlError, match="it can be left only"):
                client.complete(job)
        then = load.expected()
        client.cancel(job)
        assert client.wait(job).state == "cancelled"
        assert client.cancel(job).state == client.job(job).state == "cancelled"
        with qcow2.open(tmp_path / "copy", format=image_format) as disk:  # which nobody uses
            assert disk.read(0, disk.size) == then
        load.run(50)
        load.drain()
        daemon.stop()
    assert content(top) == load.expected() != then
    assert backing_name(top) == "mid"
    assert sorted(os.listdir(tmp_path)) == ["base", "copy", "mid", "top"]


def test_a_raw_disk_moves_to_and_fro(tmp_path: Path) -> None:
    disk, there = tmp_path / "disk", tmp_path / "there"
    there.mkdir()
    disk.write_bytes(SHOWN)
    with start(disk, "--format=raw") as daemon, FrontEnd(daemon.socket_path) as guest, control(disk) as client:
        load = Load(guest, SIZE // BLOCK, zeroes=True, base=SHOWN)
        for target in (there / "disk", tmp_path / "back"):
            job = client.mirror(str(target)).job
            get_ready(client, job, load)
            client.complete(job)
            while not client.job(job).has_ended:
                load.run(10)
            assert disk.samefile(target)
        load.drain()
        daemon.stop()
    assert disk.read_bytes() == load.expected()
    assert (tmp_path / "disk.old").stat().st_size == (there / "disk").stat().st_size == SIZE


def test_what_is_there_is_written_over_if_it_is_said(top: Path, tmp_path: Path) -> None:
    qcow2_tool_ok("create", tmp_path / "other", str(SIZE))
    qcow2_tool_ok("create", tmp_path / "short", str(MIB))
    with qcow2.open(tmp_path / "other", writable=True) as disk:
        disk.write(SIZE - MIB, b"o" * MIB)
        disk.write(3 * MIB, b"o" * MIB)  # where the disk has zeros
    with start(top) as daemon, FrontEnd(daemon.socket_path) as guest, control(top) as client:
        with pytest.raises(ControlError, match="File exists"):
            client.mirror("other")
        with pytest.raises(ControlError, match="nowhere: No such file"):
            client.mirror("nowhere", existing=True)
        with pytest.raises(ControlError, match="nowhere: No such file"):
            client.mirror("nowhere/copy")
        with pytest.raises(ControlError, match="give a new name"):
            client.mirror("other", existing=True, top=True)
        with pytest.raises(ControlError, match="a copy is qcow2 or raw"):
            client.mirror("copy", "luks")
        with pytest.raises(ControlError, match=f"short: is {MIB} bytes long, the disk is {SIZE}"):
            client.mirror("short", existing=True)
        for own in ("top", "base"):
            with pytest.raises(ControlError, match=f"{own}: is a file of the disk that is served"):
                client.mirror(own, existing=True)
        with qcow2.open(tmp_path / "other"), pytest.raises(ControlError, match=r"other: .*another process"):
            client.mirror("other", existing=True)
        (tmp_path / ".copy.mirror").symlink_to("nowhere")
        with pytest.raises(ControlError, match=r"\.copy\.mirror: is in the way, and no file that we leave"):
            client.mirror("copy")
        (tmp_path / ".copy.mirror").unlink()
        assert client.jobs() == []
        job = client.mirror("other", existing=True).job
        assert client.wait(job).state == "ready"
        guest.write(0, b"w" * BLOCK)
        assert client.wait(client.complete(job).job).state == "completed"
        daemon.stop()
    assert content(top) == b"w" * BLOCK + SHOWN[BLOCK:]
    assert_clean(tmp_path / "other")


def test_a_mirror_grows_waits_and_begins_anew(top: Path, tmp_path: Path) -> None:
    with start(top) as daemon, FrontEnd(daemon.socket_path) as guest, control(top) as client:
        job = client.mirror("copy", rate=1).job
        with pytest.raises(ControlError, match=r"is (running|waiting), not ready"):
            client.complete(job)
        client.set_rate(job, 0)
        until(client, job, "ready")
        client.resize(SIZE + MIB)
        guest.write(SIZE, b"g" * BLOCK)
        with pytest.raises(ControlError, match=f"job {job} is under way: mirror"):
            client.snapshot("frozen")
        queue = guest.stop_queue()
        until(client, job, "waiting")
        assert_clean(top)  # which others may have now
        with qcow2.open(top, writable=True) as disk:
            disk.write(BLOCK, b"o" * BLOCK)
        guest.start_queue(queue)
        until(client, job, "ready")
        guest.write(0, b"w" * BLOCK)
        assert client.wait(client.complete(job).job).state == "completed"
        daemon.stop()
    assert content(top) == b"w" * BLOCK + b"o" * BLOCK + SHOWN[2 * BLOCK :] + b"g" * BLOCK + bytes(MIB - BLOCK)
    assert_clean(top)
    assert not (tmp_path / ".copy.mirror").exists()


@pytest.mark.parametrize("is_killed", [True, False])
def test_the_log_of_a_copy_goes_with_it(top: Path, tmp_path: Path, is_killed: bool) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    with start(top, f"--link-log={logs}") as daemon, FrontEnd(daemon.socket_path) as guest, control(top) as client:
        job = client.mirror("copy", top=True).job
        until(client, job, "ready")
        for block in range(0, SIZE // BLOCK, 4):
            guest.write(block * BLOCK, b"w" * 512)
        listed = json.loads(qcow2_tool_ok("link-logs", f"--link-log={logs}", "--output=json"))
        assert str(tmp_path / ".copy.mirror") in [each["image"] for each in listed]
        daemon.kill() if is_killed else daemon.stop()
    if is_killed:
        with start(top, f"--link-log={logs}") as daemon, FrontEnd(daemon.socket_path), control(top) as client:
            until(client, client.mirror("copy", top=True).job, "ready")
            daemon.stop()
    assert not (tmp_path / ".copy.mirror").exists()
    assert not list(logs.iterdir())


@pytest.mark.parametrize("kind", ["mirror", "backup"])
def test_a_raw_copy_that_a_death_left_is_made_anew(top: Path, tmp_path: Path, kind: str) -> None:
    """It begins as the guest wrote it, with a boot sector, say."""
    boot = b"\xebx\x90MSDOS".ljust(BLOCK, b"b")
    left = tmp_path / f".copy.{kind}"
    with start(top) as daemon, FrontEnd(daemon.socket_path) as guest, control(top) as client:
        guest.write(0, boot)
        if kind == "mirror":
            until(client, client.mirror("copy", "raw").job, "ready")
            daemon.kill()
        else:
            daemon.stop()
            left.write_bytes(boot)  # all is there, but its name
    assert left.read_bytes()[:BLOCK] == boot
    with start(top) as daemon, FrontEnd(daemon.socket_path), control(top) as client:
        with pytest.raises(ControlError, match="may be a copy of ours: move or remove it"):
            client.mirror("copy", "qcow2") if kind == "mirror" else client.backup("copy", format="qcow2")
        job = (client.mirror("copy", "raw") if kind == "mirror" else client.backup("copy", format="raw")).job
        if kind == "mirror":
            until(client, job, "ready")
            client.cancel(job)
        assert client.wait(job).error == ""
        daemon.stop()
    assert (tmp_path / "copy").read_bytes() == content(top)
    assert not left.exists()


def test_a_copy_that_fails_is_not_the_guests_trouble(top: Path, tmp_path: Path) -> None:
    limit = ["prlimit", f"--fsize={4 * MIB}:", "--"]
    with start(top, under=limit) as daemon, FrontEnd(daemon.socket_path) as guest, control(top) as client:
        failed = client.wait(client.mirror("copy").job)
        assert (failed.state, failed.error.endswith("File too large")) == ("failed", True)
        assert not (tmp_path / ".copy.mirror").exists()
        job = client.mirror("copy", on_error="stop").job
        until(client, job, "paused")
        guest.write(0, b"w" * BLOCK)
        subprocess.run(["prlimit", f"--pid={daemon.process.pid}", "--fsize=unlimited:"], check=True)
        client.resume(job)
        until(client, job, "ready")
        client.cancel(job)
        client.wait(job)
        daemon.stop()
    assert content(tmp_path / "copy") == content(top) == b"w" * BLOCK + SHOWN[BLOCK:]


@pytest.mark.parametrize("word", ["cancel", "complete"])
def test_guest_restarts_while_a_copy_is_made_stable(top: Path, tmp_path: Path, word: str) -> None:
    backing, mount_point = tmp_path / "backing", tmp_path / "slow"
    backing.mkdir()
    mount_point.mkdir()
    qcow2.create(backing / "copy", len(SHOWN))
    with SlowDisk(backing, mount_point) as disk, start(top) as daemon:
        with FrontEnd(daemon.socket_path) as guest, control(top) as client:
            job = client.mirror(str(mount_point / "copy"), existing=True).job
            until(client, job, "ready")
            with disk.holding(slowdisk.FSYNC):
                getattr(client, word)(job)
                disk.wait_for_one()
                queue = guest.stop_queue()
                disk.let_go()
            guest.start_queue(queue)
            if word == "cancel":
                ended = client.wait(job)
                assert (ended.state, "the image was let go" in ended.error) == ("failed", True), ended
            else:
                assert client.wait(job).state == "completed"  # after it was begun anew
            guest.write(0, b"w" * BLOCK)
        daemon.stop()


@pytest.mark.parametrize("word", ["cancel", "complete"])
def test_a_copy_that_is_not_stable_says_so_to_who_opens_it(top: Path, tmp_path: Path, word: str) -> None:
    backing, mount_point = tmp_path / "backing", tmp_path / "slow"
    backing.mkdir()
    mount_point.mkdir()
    qcow2.create(backing / "copy", len(SHOWN), preallocation="metadata")  # no reservation ahead syncs by itself
    with SlowDisk(backing, mount_point) as disk, start(top) as daemon:
        with FrontEnd(daemon.socket_path) as guest, control(top) as client:
            job = client.mirror(str(mount_point / "copy"), existing=True).job
            until(client, job, "ready")
            with disk.unsyncable(errno.EIO):
                getattr(client, word)(job)
                ended = client.wait(job)
            assert (ended.state, "no copy is left" in ended.error) == ("failed", True), ended
            guest.write(0, b"w" * BLOCK)
            guest.flush()
        daemon.stop()
    assert json.loads(qcow2_tool_ok("info", "--output=json", backing / "copy"))["dirty-flag"]


def test_a_copy_that_could_not_be_made_stable_is_made_anew(top: Path, tmp_path: Path) -> None:
    backing, mount_point = tmp_path / "backing", tmp_path / "slow"
    backing.mkdir()
    mount_point.mkdir()
    qcow2.create(backing / "copy", len(SHOWN))
    with SlowDisk(backing, mount_point) as disk, start(top) as daemon:
        with FrontEnd(daemon.socket_path), control(top) as client:
            client.subscribe("job")
            with disk.unsyncable(errno.EIO):
                job = client.mirror(str(mount_point / "copy"), existing=True, on_error="ignore").job
                while not client.job(job).error:
                    assert client.next_event(TIMEOUT) is not None
            until(client, job, "ready")
            client.cancel(job)
            assert client.wait(job).state == "cancelled"
        daemon.stop()
    assert content(backing / "copy") == SHOWN


def test_a_copy_has_no_name_while_it_cannot_be_served(top: Path, tmp_path: Path) -> None:
    in_the_way = top.with_name(f".{top.name}.pivot")
    in_the_way.mkdir()
    with start(top) as daemon, FrontEnd(daemon.socket_path) as guest, control(top) as client:
        job = client.mirror(str(tmp_path / "moved")).job
        until(client, job, "ready")
        client.complete(job)
        while "is in the way" not in client.job(job).error:
            assert client.next_event(TIMEOUT) is not None
        until(client, job, "ready")
        assert ((tmp_path / "moved").exists(), (tmp_path / ".moved.mirror").exists()) == (False, True)
        in_the_way.rmdir()
        guest.write(0, b"w" * BLOCK)
        client.complete(job)
        assert client.wait(job).state == "completed"
        daemon.stop()
    assert sorted(name for name in os.listdir(tmp_path) if name.startswith(".")) == []
    assert content(top) == content(tmp_path / "moved") == b"w" * BLOCK + SHOWN[BLOCK:]


def test_what_is_in_the_way_of_a_pivot_stays(tmp_path: Path) -> None:
    for name in ("served", "copy"):
        (tmp_path / name).touch()
    (tmp_path / ".served.pivot").mkdir()
    with HostFile.open(str(tmp_path / "served")) as top, HostFile.open(str(tmp_path / "copy")) as copy:
        pivot = Pivot(str(tmp_path / "served"), top, str(tmp_path / "copy"), copy)
        with pytest.raises(FileExistsError):
            pivot.prepare()
        pivot.discard()


def test_a_rename_that_was_done_is_done_whatever_it_says(tmp_path: Path) -> None:
    for name in ("served", "copy"):
        (tmp_path / name).write_text(name)
    with HostFile.open(str(tmp_path / "served")) as top, HostFile.open(str(tmp_path / "copy")) as copy:
        pivot = Pivot(str(tmp_path / "served"), top, str(tmp_path / "copy"), copy)
        pivot.prepare()
        (tmp_path / ".served.pivot").rename(tmp_path / "served")  # as a server does whose first answer is lost
        pivot.switch()
        pivot.sync()
        pivot.discard()
    assert ((tmp_path / "served").read_text(), (tmp_path / "served.old").read_text()) == ("copy", "served")


def test_a_write_that_the_copy_does_not_take_is_copied_later(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(SHOWN[: 2 * MIB])
    with start(disk, "--format=raw") as daemon, FrontEnd(daemon.socket_path) as guest, control(disk) as client:
        job = client.mirror("copy", "qcow2", on_error="stop").job
        until(client, job, "ready")
        pieces = json.loads(qemu_img("map", "-U", "--output=json", tmp_path / ".copy.mirror").stdout)
        far = next(piece for piece in pieces if piece["offset"] > piece["start"])
        subprocess.run(["prlimit", f"--pid={daemon.process.pid}", f"--fsize={far['offset']}:"], check=True)
        guest.write(far["start"], b"w" * BLOCK)
        until(client, job, "paused")
        assert client.job(job).error.endswith("File too large")
        guest.write(far["start"], b"v" * BLOCK)
        subprocess.run(["prlimit", f"--pid={daemon.process.pid}", "--fsize=unlimited:"], check=True)
        client.resume(job)
        until(client, job, "ready")
        client.cancel(job)
        client.wait(job)
        daemon.stop()
    assert content(tmp_path / "copy") == disk.read_bytes()
    assert disk.read_bytes()[far["start"] :][:BLOCK] == b"v" * BLOCK


@pytest.mark.sample(3)
@pytest.mark.parametrize("at", [3, 12, 21, 30, 40, *range(44, 62)])
def test_death_in_a_mirror_leaves_the_disk_or_its_copy(top: Path, tmp_path: Path, at: int) -> None:
    """Before the *at*-th call that changes a file; then the disk can be moved again."""
    written = 0
    with start(top, "--aio=threads", under=dying_from_start(at)) as daemon, FrontEnd(daemon.socket_path) as guest:
        with suppress(ControlError, BackendGone):
            with control(top) as client:
                job = client.mirror("copy").job
                if client.wait(job).state == "ready":
                    for written in (1, 2):
                        guest.write(0, bytes([written]) * BLOCK)
                    client.complete(job)
                    client.wait(job)
                    guest.write(0, b"\3" * BLOCK)
                    written = 3
            daemon.process.terminate()
        assert daemon.process.wait(TIMEOUT) in (-signal.SIGKILL, 0)
    with qcow2.open(top, writable=True) as disk:  # which also brings in what waits in its log
        shown = disk.read(0, SIZE)
    assert shown[BLOCK:] == SHOWN[BLOCK:]
    assert shown[0] in {0: (1,), 1: (1, 2), 2: (2, 3), 3: (3,)}[written]
    (tmp_path / "copy").unlink(missing_ok=True)
    with start(top) as daemon, FrontEnd(daemon.socket_path), control(top) as client:
        job = client.mirror("copy").job
        assert client.wait(job).state == "ready"
        assert client.wait(client.complete(job).job).state == "completed"
        daemon.stop()
    assert content(top) == shown
    assert_not_corrupt(top)


def test_ctl_moves_a_disk(top: Path, tmp_path: Path) -> None:
    with start(top) as daemon, FrontEnd(daemon.socket_path) as guest:
        ready = ctl(top, "mirror", "copy", "--wait")
        assert (ready.returncode, ready.stdout) == (0, "job 1: mirror, ready, 100.0 % of 8 MiB\n")
        guest.write(0, b"w" * BLOCK)
        done = ctl(top, "job", "complete", "1", "--json")
        assert (done.returncode, json.loads(done.stdout)["state"]) == (0, "completed")
        again = ctl(top, "job", "complete", "1")
        assert (again.returncode, again.stderr) == (1, "vhost-user-qcow2: ctl: job 1 has ended: completed\n")
    assert qemu_img("compare", "-U", top, tmp_path / "copy").returncode == 0


@pytest.mark.parametrize("option", ["--read-only", "--trace-io=trace"])
def test_daemon_that_may_not(top: Path, tmp_path: Path, option: str) -> None:
    with Daemon(top, f"--control={top}.control", option.replace("=trace", f"={tmp_path}/trace")) as daemon:
        with FrontEnd(daemon.socket_path), control(top) as client:
            with pytest.raises(ControlError, match=r"read-only|--trace-io"):
                client.mirror("copy")


def test_a_copy_that_others_have_moved_is_not_served(top: Path, tmp_path: Path) -> None:
    with start(top) as daemon, FrontEnd(daemon.socket_path) as guest, control(top) as client:
        job = client.mirror("copy").job
        assert client.wait(job).state == "ready"
        (tmp_path / ".copy.mirror").rename(tmp_path / "moved")
        client.complete(job)
        ended = client.wait(job)
        assert (ended.state, "moved or removed" in ended.error) == ("ready", True), ended
        client.cancel(job)
        assert client.wait(job).has_ended
        guest.write(0, b"w" * BLOCK)
        guest.flush()
        assert not top.is_symlink()
        daemon.stop()
    assert content(top)[:BLOCK] == b"w" * BLOCK


def test_a_copy_that_is_served_after_all_is_not_made_anew(top: Path, tmp_path: Path) -> None:
    with start(top) as daemon, FrontEnd(daemon.socket_path) as guest, control(top) as client:
        job = client.mirror("copy").job
        until(client, job, "ready")
        queue = guest.stop_queue()
        until(client, job, "waiting")
        top.unlink()
        top.symlink_to(".copy.mirror")  # as a rename leaves it that says it has failed
        guest.start_queue(queue)
        ended = client.wait(job)
        assert (ended.state, ended.error) == ("failed", f"{tmp_path}/copy: the path that is served leads to it"), ended
        guest.write(0, b"w" * BLOCK)
        daemon.stop()
    assert content(top) == b"w" * BLOCK + SHOWN[BLOCK:]


@pytest.mark.parametrize("name", ["base", "mid"])
def test_a_top_whose_backing_file_others_have_replaced_is_not_copied(top: Path, tmp_path: Path, name: str) -> None:
    with start(top) as daemon, FrontEnd(daemon.socket_path) as guest, control(top) as client:
        shown = [guest.read(offset, BLOCK) for offset in range(0, SIZE, MIB)]
        backing = ["-b", "base", "-F", "qcow2"] if name == "mid" else [str(SIZE)]
        (tmp_path / name).rename(tmp_path / "moved")
        qcow2_tool_ok("create", tmp_path / name, *backing)
        with pytest.raises(ControlError, match=f"{name}: another file has this name by now"):
            client.mirror("copy", top=True)
        assert not (tmp_path / "copy").exists()
        assert client.wait(client.mirror("whole").job).state == "ready"  # which needs no name
        client.complete(1)
        assert client.wait(1).state == "completed"
        assert [guest.read(offset, BLOCK) for offset in range(0, SIZE, MIB)] == shown
        daemon.stop()
