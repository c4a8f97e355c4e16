"""A backup of a disk that a guest writes to: it is the disk of the moment at which it was asked for."""

import errno
import json
import os
import resource
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

import pytest

import qcow2
from qcow2 import ImageError
from qcow2.engine.create import Options
from tests import slowdisk
from tests.file.test_jobs import control, ctl, open_files, start
from tests.file.test_mirror import until
from tests.frontend import BackendGone, FrontEnd
from tests.load import Load
from tests.oracle import assert_clean, assert_not_corrupt, assert_same_bytes
from tests.patience import TIMEOUT
from tests.program import qcow2_tool_ok
from tests.realfault.death import dying_from_start
from tests.realfault.host import WRITE, Fault, Host
from tests.slowdisk import SlowDisk
from vhost import Control, ControlError
from vhost.backup import Feed
from vhost.backuptarget import BackupFile
from vhost.clock import Clock
from vhost.frozen import MOST_BYTES, Saved
from vhost.policy import BitmapMode
from vhost.probe import Probe

KIB, MIB = 1 << 10, 1 << 20
SIZE = 8 * MIB + 12 * KIB  # ends in the midst of a chunk
BLOCK = 4096
OPTIONS = {"extended_l2": "extended_l2=on,cluster_size=128k", "data file": "data_file=data"}


def make(directory: Path, shape: str) -> tuple[Path, bytes]:
    """An image, and what its disk holds: data, zeros, and what comes from elsewhere."""
    image, held = directory / "disk", bytearray(SIZE)
    image_format = "raw" if shape == "raw" else "qcow2"
    if shape == "overlay":
        qcow2.create(directory / "base", SIZE)
        held[MIB : 3 * MIB] = b"b" * (2 * MIB)
        with qcow2.open(directory / "base", "r+") as disk:
            disk.write(MIB, held[MIB : 3 * MIB])
        qcow2.create(image, backing="base")
    elif shape in OPTIONS:
        qcow2_tool_ok("create", "-o", OPTIONS[shape], image, str(SIZE))
    else:
        small = {"cluster_size": 4096, "lazy_refcounts": True} if shape == "small clusters" else {}
        qcow2.create(image, SIZE, format=image_format, **small)
    with qcow2.open(image, "r+", format=image_format) as disk:
        for start, nbytes in ((0, 300 * KIB), (2 * MIB + 8 * KIB, MIB), (SIZE - 100 * KIB, 100 * KIB)):
            held[start : start + nbytes] = b"t" * nbytes
            disk.write(start, b"t" * nbytes)
        if shape in ("plain", "overlay"):
            disk.bitmaps.add("nightly")
    return image, bytes(held)


def read(path: Path, image_format: str = "qcow2") -> bytes:
    with qcow2.open(path, format=image_format) as disk:
        return disk.read(0, disk.size)


def written_while(load: Load, client: Control, job: int) -> None:
    while not client.job(job).has_ended:
        load.run(20)
    ended = client.job(job)
    assert (ended.state, ended.done, ended.error) == ("completed", ended.total, "")


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    ("shape", "mode", "image_format"),
    [
        ("plain", "--cache=writeback", "qcow2"),
        ("plain", "--sandbox", "raw"),
        ("overlay", "--cache=writethrough", "qcow2"),
        ("overlay", "--aio=threads", "raw"),
        ("extended_l2", "--cache=none", "qcow2"),
        ("small clusters", "--cache=unsafe", "raw"),
        ("data file", "--cache=none", "qcow2"),
        ("raw", "--cache=writeback", "qcow2"),
    ],
)
def test_backup_is_the_disk_of_its_moment(tmp_path: Path, shape: str, mode: str, image_format: str) -> None:
    image, held = make(tmp_path, shape)
    options = [mode, "--format=raw"] if shape == "raw" else [mode]
    with start(image, *options) as daemon, FrontEnd(daemon.socket_path) as guest, control(image) as client:
        load = Load(guest, SIZE // BLOCK, zeroes=True, base=held)
        load.run(60)
        load.drain()
        moment = load.expected()
        job = client.backup("copy", format=image_format, rate=4 * MIB).job
        load.run(150)  # while nearly all has to be saved before it is overwritten
        client.set_rate(job, 0)
        written_while(load, client, job)
        load.run(20)
        load.drain()
        assert open_files(daemon) & {"copy", ".copy.backup"} == set()
        daemon.stop()
    assert_same_bytes(read(tmp_path / "copy", image_format), moment)
    assert_same_bytes(read(image, "raw" if shape == "raw" else "qcow2"), load.expected())
    if image_format == "qcow2":
        assert_clean(tmp_path / "copy")
    if shape not in ("raw", "data file"):  # which QEMU 7.2 looks for in its own directory
        assert_clean(image)


def dirty(image: Path, name: str) -> list[tuple[int, int]]:
    with qcow2.open(image) as disk:
        return list(disk.bitmaps.dirty(name))


def test_incremental_backups_are_a_chain_of_what_has_changed(tmp_path: Path) -> None:
    image, held = make(tmp_path, "plain")
    moments = []
    with start(image) as daemon, FrontEnd(daemon.socket_path) as guest, control(image) as client:
        load = Load(guest, SIZE // BLOCK, zeroes=True, base=held)
        for night in range(3):
            load.run(40)
            load.drain()
            moments.append(load.expected())
            of = {"bitmap": "nightly", "backing": f"night{night - 1}"} if night else {}
            job = client.backup(f"night{night}", rate=MIB, **of).job
            load.run(30)  # which the next one has to copy
            client.set_rate(job, 0)
            written_while(load, client, job)
        load.drain()
        assert client.wait(client.backup("last", bitmap="nightly", backing="night2").job).state == "completed"
        guest.write(SIZE - BLOCK, b"l" * BLOCK)
        ended = client.wait(client.backup("tail", bitmap="nightly", backing="last").job)
        assert (ended.state, ended.done, ended.total) == ("completed", 12 * KIB, 12 * KIB)
        said = ctl(image, "backup", "same", "--bitmap=nightly", "--backing=tail", "--wait").stdout
        assert said.endswith(": backup, completed, nothing to do\n")
        guest.discard(4 * MIB, 64 * KIB)
        guest.write(0, b"n" * BLOCK)
        daemon.stop()
    for night, moment in enumerate(moments):
        assert_same_bytes(read(tmp_path / f"night{night}"), moment)
        assert_clean(tmp_path / f"night{night}")
    assert_same_bytes(read(tmp_path / "last"), load.expected())
    assert_same_bytes(read(tmp_path / "tail"), load.expected()[:-BLOCK] + b"l" * BLOCK)
    assert dirty(image, "nightly") == [(0, 64 * KIB), (4 * MIB, 64 * KIB)]


def test_backup_that_is_given_up_has_forgotten_nothing(tmp_path: Path) -> None:
    image, held = make(tmp_path, "plain")
    with qcow2.open(image, "r+") as disk:
        disk.bitmaps.remove("nightly")
        disk.bitmaps.add("nightly", 4096)
    shutil.copy(image, tmp_path / "before")
    with start(image) as daemon, FrontEnd(daemon.socket_path) as guest, control(image) as client:
        for written in (MIB, 3 * MIB, 5 * MIB):  # the walk may save one, and the guest one
            guest.write(written, b"w" * BLOCK)
        job = client.backup("copy", bitmap="nightly", backing="before", rate=1).job
        guest.write(3 * MIB, b"v" * BLOCK)
        client.cancel(job)
        assert client.wait(job).state == "cancelled"
        assert not (tmp_path / ".copy.backup").exists()
        assert not (tmp_path / "copy").exists()
        again = client.wait(client.backup("copy", bitmap="nightly", backing="before").job)
        assert (again.state, again.done, again.total) == ("completed", 192 * KIB, 192 * KIB)
        daemon.stop()
    wanted = bytearray(held)
    for written, content in ((MIB, b"w"), (3 * MIB, b"v"), (5 * MIB, b"w")):
        wanted[written : written + BLOCK] = content * BLOCK
    assert_same_bytes(read(tmp_path / "copy"), bytes(wanted))
    assert dirty(image, "nightly") == []


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_killed_backup_is_no_disk_and_may_be_begun_again(tmp_path: Path, image_format: str) -> None:
    image, held = make(tmp_path, "overlay")
    with start(image) as daemon, FrontEnd(daemon.socket_path) as guest, control(image) as client:
        load = Load(guest, SIZE // BLOCK, base=held)
        client.backup("copy", format=image_format, rate=1)
        load.run(40)
        daemon.kill()
        load.take_the_last()
    assert not (tmp_path / "copy").exists()
    left = (tmp_path / ".copy.backup").read_bytes()
    assert not any(left[: 64 * KIB])
    with qcow2.open(image, "r+") as disk:  # with what waits in its link log
        moment = disk.read(0, SIZE)
    with start(image) as daemon, FrontEnd(daemon.socket_path), control(image) as client:
        assert client.wait(client.backup("copy", format=image_format).job).state == "completed"
        of = {"bitmap": "nightly", "backing": "copy"} if image_format == "qcow2" else {}
        assert client.wait(client.backup("next", **of).job).state == "completed"
        daemon.stop()
    assert_same_bytes(read(tmp_path / "copy", image_format), moment)
    assert_same_bytes(read(tmp_path / "next"), moment)
    assert sorted(name for name in os.listdir(tmp_path) if name.startswith(".")) == []


def test_backup_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    image, held = make(tmp_path, "plain")
    (tmp_path / "there").write_bytes(b"t" * 2 * SIZE)
    with start(image) as daemon, FrontEnd(daemon.socket_path) as guest, control(image) as client:
        for options, why in (
            ({"target": "there"}, "File exists"),
            ({"target": "disk", "existing": True}, "disk: is a file of the disk that is served"),
            ({"target": "there", "existing": "yes"}, "existing is true or false"),
            ({"target": "nowhere/copy"}, "No such file"),
            ({"target": "copy", "format": "vmdk"}, "none of qcow2, raw"),
            ({"target": "copy", "bitmap": "weekly"}, "'weekly' not found"),
            ({"target": "copy", "bitmap": "nightly", "format": "raw"}, "cannot say what it lacks"),
            ({"target": "copy", "backing": "there"}, "needs none"),
            ({"target": "copy", "bitmap": "nightly", "backing": "there"}, "there"),
            ({"target": "copy", "bitmap": "nightly", "backing": "disk"}, "another process"),
        ):
            with pytest.raises(ControlError, match=why):
                client.backup(**options)
        assert not [name for name in os.listdir(tmp_path) if "copy" in name]
        assert client.jobs() == []
        guest.write(0, b"w" * BLOCK)
        said = ctl(image, "backup", "there", "--format=raw", "--existing", "--wait", "--json")
        assert (said.returncode, json.loads(said.stdout)["state"]) == (0, "completed"), said.stderr
        daemon.stop()
    assert_same_bytes((tmp_path / "there").read_bytes(), b"w" * BLOCK + held[BLOCK:])


@pytest.mark.parametrize("content", [b"t" * 2 * SIZE, b""], ids=["file", "image"])
def test_refused_backup_leaves_what_is_there(tmp_path: Path, content: bytes) -> None:
    image, _ = make(tmp_path, "plain")
    there = tmp_path / "there"
    there.write_bytes(content)
    if not content:
        qcow2.create(there, SIZE)
    before = there.read_bytes()
    with start(image) as daemon, FrontEnd(daemon.socket_path), control(image) as client:
        with pytest.raises(ControlError, match="'weekly' not found" if content else "holds an image"):
            client.backup("there", existing=True, bitmap="weekly")
        assert there.read_bytes() == before
        bitmap = "nightly" if content else None
        assert client.wait(client.backup("there", existing=True, bitmap=bitmap).job).state == "completed"
        daemon.stop()
    assert_clean(there)


def test_no_increment_replaces_one_of_before(tmp_path: Path) -> None:
    """The bitmap has forgotten what is in it, and what comes later lacks that, whatever is cleared after."""
    image, held = make(tmp_path, "plain")
    with start(image) as daemon, FrontEnd(daemon.socket_path) as guest, control(image) as client:
        assert client.wait(client.backup("whole").job).state == "completed"
        guest.write(MIB, b"w" * BLOCK)
        night = {"bitmap": "nightly", "backing": "whole", "existing": True}
        (tmp_path / "night").touch()
        assert client.wait(client.backup("night", **night).job).state == "completed"
        guest.write(3 * MIB, b"v" * BLOCK)
        for mode in BitmapMode:
            with pytest.raises(ControlError, match="/night: holds an image: an increment replaces none"):
                client.backup("night", **night, bitmap_mode=mode)
        daemon.stop()
    assert_same_bytes(read(tmp_path / "night"), held[:MIB] + b"w" * BLOCK + held[MIB + BLOCK :])


def test_a_backup_keeps_the_bitmap_if_that_is_said(tmp_path: Path) -> None:
    image, held = make(tmp_path, "plain")
    with start(image) as daemon, FrontEnd(daemon.socket_path) as guest, control(image) as client:
        assert client.wait(client.backup("whole").job).state == "completed"
        guest.write(MIB, b"w" * BLOCK)
        night = {"bitmap": "nightly", "backing": "whole"}
        job = client.wait(client.backup("one", **night, bitmap_mode="never").job)
        assert (job.state, job.about["bitmap-mode"]) == ("completed", "never")
        guest.write(3 * MIB, b"v" * BLOCK)
        said = ctl(image, "backup", "two", "--bitmap=nightly", "--backing=whole", "--keep-bitmap", "--wait")
        assert said.returncode == 0, said.stderr
        assert client.wait(client.backup("three", **night).job).done == 128 * KIB
        for options, why in (
            ({"bitmap_mode": "never"}, "bitmap-mode is for a backup by a bitmap"),
            ({**night, "bitmap_mode": "always"}, "'always' is none of on-success, never"),
        ):
            with pytest.raises(ControlError, match=why):
                client.backup("four", **options)
        daemon.stop()
    wanted = bytearray(held)
    wanted[MIB : MIB + BLOCK] = b"w" * BLOCK
    assert_same_bytes(read(tmp_path / "one"), bytes(wanted))
    wanted[3 * MIB : 3 * MIB + BLOCK] = b"v" * BLOCK
    assert_same_bytes(read(tmp_path / "two"), bytes(wanted))
    assert_same_bytes(read(tmp_path / "three"), bytes(wanted))
    assert dirty(image, "nightly") == []


def test_a_target_that_finds_no_memory_is_not_the_guests_trouble() -> None:
    stopped: SimpleQueue[Exception] = SimpleQueue()

    def put(saved: Saved) -> None:
        raise MemoryError

    feed = Feed(put, lambda nbytes: None, stopped.put)
    feed.give(Saved(0, BLOCK, None))
    feed.go_on()
    error = stopped.get(timeout=TIMEOUT)
    feed.close()
    assert isinstance(error, OSError)
    assert error.errno == errno.ENOMEM


def test_clock_ticks_until_it_is_closed() -> None:
    ticks: SimpleQueue[None] = SimpleQueue()
    clock = Clock(lambda: ticks.put(None), 0.001)
    for _ in range(3):
        ticks.get(timeout=TIMEOUT)
    clock.close()
    assert "clock" not in {thread.name for thread in threading.enumerate()}


def test_what_may_not_be_put_twice_is_not() -> None:
    puts: SimpleQueue[Saved] = SimpleQueue()
    stopped: SimpleQueue[Exception] = SimpleQueue()

    def put(saved: Saved) -> None:
        puts.put(saved)
        raise ImageError("copy", "No space left on device")

    feed = Feed(put, lambda nbytes: None, stopped.put)
    feed.give(Saved(0, 0, None))
    feed.go_on()
    stopped.get(timeout=TIMEOUT)
    feed.go_on()
    for thread in threading.enumerate():
        if thread.name == "backup":
            thread.join(TIMEOUT)
            assert not thread.is_alive()
    feed.close()
    assert puts.qsize() == 1


def test_backup_outlives_a_resize_and_no_stop_of_the_rings(tmp_path: Path) -> None:
    image, held = make(tmp_path, "plain")
    with start(image) as daemon, FrontEnd(daemon.socket_path) as guest, control(image) as client:
        job = client.backup("copy", rate=1).job
        client.resize(2 * SIZE - SIZE % MIB)
        for offset in (0, 64 * KIB, SIZE):
            guest.write(offset, b"w" * 64 * KIB)
        client.set_rate(job, 0)
        assert client.wait(job).state == "completed"
        job = client.backup("lost", bitmap="nightly", backing="copy", rate=1).job
        guest.start_queue(guest.stop_queue())
        ended = client.wait(job)
        assert (ended.state, ended.error) == (
            "failed",
            "the disk of that moment is lost: the image was let go meanwhile",
        )
        guest.write(0, b"v" * 64 * KIB)
        assert client.wait(client.backup("next", bitmap="nightly", backing="copy").job).state == "completed"
        client.backup("late", rate=1)
        daemon.stop()
    assert_same_bytes(read(tmp_path / "copy"), held)
    wanted = b"v" * 64 * KIB + b"w" * 64 * KIB + held[128 * KIB :] + b"w" * 64 * KIB
    assert_same_bytes(read(tmp_path / "next"), wanted.ljust(2 * SIZE - SIZE % MIB, b"\0"))
    assert sorted(os.listdir(tmp_path)) == ["copy", "disk", "next"]


@pytest.mark.parametrize(("policy", "is_paused"), [("report", False), ("stop", True)])
def test_backup_fails_as_the_image_is_let_go_for_good(tmp_path: Path, policy: str, is_paused: bool) -> None:
    image, _ = make(tmp_path, "plain")
    with start(image) as daemon, FrontEnd(daemon.socket_path) as guest, control(image) as client:
        job = client.backup("lost", rate=1, on_error=policy).job
        if is_paused:
            client.pause(job)
        guest.stop_queue()
        until(client, job, "failed")
        assert client.job(job).error == "the disk of that moment is lost: the image was let go meanwhile"
        assert not [name for name in os.listdir(tmp_path) if "lost" in name]


@pytest.mark.parametrize("held_by", ["an error", "a command", "a rate"])
def test_backup_whose_moment_is_lost_while_it_is_held_fails(tmp_path: Path, held_by: str) -> None:
    image, target = tmp_path / "disk", tmp_path / "copy"
    size = MOST_BYTES + MIB
    image.write_bytes(b"t" * size)
    target.touch()
    host = Host(target, Fault(for_good=True), tmp_path / "told")
    with start(image, "--format=raw", under=host.under) as daemon, FrontEnd(daemon.socket_path) as guest:
        with control(image) as client:
            job = client.backup("copy", format="raw", existing=True, rate=1, on_error="stop").job
            host.aim(0)
            host.arm()
            if held_by == "an error":
                client.set_rate(job, 0)
                until(client, job, "paused")
            elif held_by == "a command":
                client.pause(job)
            for chunk in range(0, size, 64 * KIB):
                guest.write(chunk, b"w" * BLOCK)
            ended = client.wait(job)
            assert (ended.state, "wait for a target that has failed" in ended.error) == ("failed", True)
            assert host.hit == WRITE
        daemon.stop()


def test_target_that_hangs_holds_up_no_guest(tmp_path: Path) -> None:
    image, held = make(tmp_path, "plain")
    backing, mount_point = tmp_path / "backing", tmp_path / "slow"
    backing.mkdir()
    mount_point.mkdir()
    (backing / "copy").write_bytes(b"o" * SIZE)
    with SlowDisk(backing, mount_point) as disk, start(image) as daemon:
        with FrontEnd(daemon.socket_path) as guest, control(image) as client:
            load = Load(guest, SIZE // BLOCK, base=held)
            with disk.holding(slowdisk.WRITE):
                job = client.backup(str(mount_point / "copy"), format="raw", existing=True).job
                disk.wait_for_one()
                load.run(100)
                client.resize(SIZE + MIB)  # which awaits all requests
                load.run(100)
                assert not client.job(job).has_ended
                disk.let_go()
            assert client.wait(job).state == "completed", client.job(job)
        daemon.stop()
    assert_same_bytes((backing / "copy").read_bytes(), held)


@pytest.mark.sample(2)
@pytest.mark.parametrize("at", [*range(1, 30, 2)])
def test_death_in_a_backup_leaves_none_or_all_of_it(tmp_path: Path, at: int) -> None:
    image, held = make(tmp_path, "plain")
    shutil.copy(image, tmp_path / "before")
    with qcow2.open(image, "r+") as disk:
        disk.write(MIB, b"w" * BLOCK)
    wanted = held[:MIB] + b"w" * BLOCK + held[MIB + BLOCK :]
    with start(image, "--aio=threads", under=dying_from_start(at)) as daemon, FrontEnd(daemon.socket_path):
        with suppress(ControlError, BackendGone), control(image) as client:
            assert client.wait(client.backup("copy", bitmap="nightly", backing="before").job).state == "completed"
        daemon.process.terminate()
        assert daemon.process.wait(TIMEOUT) in (-signal.SIGKILL, 0)
    if (tmp_path / "copy").exists():
        assert_same_bytes(read(tmp_path / "copy"), wanted)
        assert_clean(tmp_path / "copy")
        (tmp_path / "copy").rename(tmp_path / "first")
    else:
        assert dirty(image, "nightly") == [(MIB, 64 * KIB)]
    is_forgotten = not dirty(image, "nightly")
    backing = "first" if is_forgotten else "before"
    with start(image) as daemon, FrontEnd(daemon.socket_path), control(image) as client:
        assert client.wait(client.backup("copy", bitmap="nightly", backing=backing).job).state == "completed"
        daemon.stop()
    assert_same_bytes(read(tmp_path / "copy"), wanted)
    if backing == "before" and (tmp_path / "first").exists():
        assert_same_bytes(read(tmp_path / "first"), wanted)  # which another one to the same name has left alone
    assert_not_corrupt(image)


def test_zeros_of_a_large_disk_are_passed_by(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    qcow2.create(image, 64 << 30)
    with start(image) as daemon, FrontEnd(daemon.socket_path) as guest, control(image) as client:
        guest.write(40 << 30, b"w" * BLOCK)
        job = client.backup("copy", rate=1).job
        guest.write_zeroes(30 << 30, 16 << 20, unmap=True)
        guest.discard(40 << 30, 1 << 20)
        client.set_rate(job, 0)
        ended = client.wait(job)
        assert (ended.state, ended.done, ended.total) == ("completed", 64 << 30, 64 << 30)
        daemon.stop()
    with qcow2.open(tmp_path / "copy") as disk:
        assert disk.read(40 << 30, BLOCK) == b"w" * BLOCK
        assert [extent.nbytes for extent in disk.extents(0, disk.size) if extent.is_data] == [64 * KIB]
    assert_clean(tmp_path / "copy")


def test_a_backup_that_others_have_removed_is_not_the_guests_trouble(tmp_path: Path) -> None:
    image, _ = make(tmp_path, "plain")
    with start(image) as daemon, FrontEnd(daemon.socket_path) as guest, control(image) as client:
        job = client.backup("copy", rate=1).job
        (tmp_path / ".copy.backup").unlink()
        client.set_rate(job, 0)
        ended = client.wait(job)
        assert (ended.state, ".copy.backup" in ended.error) == ("failed", True), ended
        guest.write(0, b"w" * BLOCK)
        guest.flush()
        daemon.stop()
    assert read(image)[:BLOCK] == b"w" * BLOCK


def test_a_backup_whose_name_cannot_be_made_stable_has_none(tmp_path: Path) -> None:
    target = BackupFile(str(tmp_path / "copy"), Options(SIZE), "qcow2", exists=False, keys=None)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))  # the directory cannot be opened
    try:
        with pytest.raises(ImageError, match=r"\.copy\.backup: the backup is whole, .*: Too many open files"):
            target.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        target.close()
    assert os.listdir(tmp_path) == [".copy.backup"]


def test_storage_that_hangs_is_seen_before_anybody_waits_for_it(tmp_path: Path) -> None:
    backing, mount_point, probe = tmp_path / "backing", tmp_path / "slow", Probe()
    backing.mkdir()
    mount_point.mkdir()
    before = threading.active_count()
    with SlowDisk(backing, mount_point) as disk:
        with disk.holding(slowdisk.LOOKUP):
            for _ in range(2):
                with pytest.raises(OSError, match=r"does not answer within 0\.05 s"):
                    probe.require_answer(str(tmp_path / "disk"), "slow/copy", patience=0.05)
            assert threading.active_count() == before + 1
        probe.require_answer(str(tmp_path / "disk"), "slow/copy", patience=TIMEOUT)


@pytest.mark.parametrize(
    "options",
    [{"target": "slow/copy"}, {"target": "copy", "bitmap": "nightly", "backing": "slow/base"}],
    ids=["target", "backing"],
)
def test_guest_restarts_while_storage_is_asked(tmp_path: Path, options: dict[str, str]) -> None:
    image, _ = make(tmp_path, "plain")
    backing, mount_point = tmp_path / "backing", tmp_path / "slow"
    backing.mkdir()
    mount_point.mkdir()
    qcow2.create(backing / "base", SIZE)
    with SlowDisk(backing, mount_point) as disk, start(image) as daemon:
        with FrontEnd(daemon.socket_path) as guest, control(image) as client, ThreadPoolExecutor(1) as pool:
            with disk.holding(slowdisk.LOOKUP):
                asked = pool.submit(client.backup, **options)
                disk.wait_for_one()
                guest.start_queue(guest.stop_queue())
                guest.write(0, b"w" * BLOCK)
            assert client.wait(asked.result(TIMEOUT).job).has_ended
        daemon.stop()


def test_a_change_saves_its_neighbours_too(tmp_path: Path) -> None:
    """Where the disk is quick: what is read is in the page cache, but now and then somebody else runs meanwhile."""
    image, nwindows = tmp_path / "disk", 40
    qcow2.create(image, (nwindows + 1) << 19)
    with qcow2.open(image, "r+") as disk:
        disk.write(0, b"d" * disk.size)
    with start(image) as daemon, FrontEnd(daemon.socket_path) as guest, control(image) as client:
        job = client.backup("copy", rate=1).job  # the walk comes no further than the first window
        before = client.job(job).done
        for number in range(1, nwindows + 1):
            guest.write((number << 19) + 3 * 64 * KIB, b"w" * BLOCK)
        saved = client.job(job).done - before
        client.set_rate(job, 0)
        assert client.wait(job).state == "completed"
        daemon.stop()
    assert saved > 2 * nwindows * 64 * KIB
    assert_same_bytes(read(tmp_path / "copy"), b"d" * ((nwindows + 1) << 19))
