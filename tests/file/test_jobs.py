"""Long work on a disk that a guest uses: what it leaves, who may stop it, and what a death in it costs."""

import gc
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import qcow2
from qcow2.engine.image import Image
from tests.forge import popen
from tests.frontend import BackendGone, FrontEnd
from tests.load import Load
from tests.oracle import assert_clean, assert_not_corrupt, backing_name, qemu_img, qemu_io
from tests.program import DAEMON, TIMEOUT, Daemon, qcow2_tool_ok, run
from tests.realfault.death import dying_from_start
from tests.served import serve
from vhost import Control, ControlError
from vhost.client import Job
from vhost.jobcommands import JobCommands
from vhost.jobs import Jobs
from vhost.overlaybitmaps import OverlayBitmaps
from vhost.overlaywish import OverlayWish
from vhost.policy import ENDED
from vhost.snapshot import Pace, Snapshots

MIB = 1 << 20
SIZE = 8 * MIB
BLOCK = 4096
BASE, MID = bytes([1]) * SIZE, bytes([2]) * (2 * MIB)
SHOWN = bytes([1]) * MIB + MID + bytes(MIB) + bytes([1]) * (SIZE - 4 * MIB)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("chain")
    make_chain(directory)
    return directory


@pytest.fixture
def top(chain: Path, tmp_path: Path) -> Path:
    for file in chain.iterdir():
        shutil.copy(file, tmp_path)
    return tmp_path / "top"


def make_chain(directory: Path, options: str = "") -> Path:
    """An empty top over mid, which has data and zeros, over base, which is full."""
    more = ["-o", options] if options else []
    base, mid, top = (directory / name for name in ("base", "mid", "top"))
    qcow2_tool_ok("create", base, str(SIZE))
    qemu_io(base, f"write -P 1 0 {SIZE}")
    qcow2_tool_ok("create", "-b", "base", "-F", "qcow2", mid)
    qemu_io(mid, f"write -P 2 {MIB} {2 * MIB}")
    qemu_io(mid, f"write -z {3 * MIB} {MIB}")
    qcow2_tool_ok("create", "-b", "mid", "-F", "qcow2", *more, top)
    return top


def start(image: Path, *options: str, under: Sequence[str] = ()) -> Daemon:
    return Daemon(image, f"--control={image}.control", *options, under=under)


def control(image: Path) -> Control:
    return Control(f"{image}.control")


def ctl(image: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(DAEMON, "ctl", f"--control={image}.control", *arguments)


def content(image: Path) -> bytes:
    with qcow2.open(image) as disk:
        return disk.read(0, disk.size)


def await_state(client: Control, state: str) -> None:
    """Until an event tells of it."""
    while (event := client.next_event(TIMEOUT)) is not None and event.data["state"] != state:
        pass
    assert event is not None


def open_files(daemon: Daemon) -> set[str]:
    directory = f"/proc/{daemon.process.pid}/fd"
    return {os.path.basename(os.readlink(f"{directory}/{fd}")) for fd in os.listdir(directory)}


@pytest.mark.parametrize(
    ("mode", "options", "base"),
    [
        ("--cache=writeback", "extended_l2=on", "base"),
        ("--cache=writethrough", "lazy_refcounts=on", None),
        ("--cache=none", "", "base"),
        ("--aio=threads", "cluster_size=2M", None),
        ("--sandbox", "compat=0.10", "base"),
    ],
)
def test_stream_beside_a_guest_that_writes(tmp_path: Path, mode: str, options: str, base: str | None) -> None:
    top = make_chain(tmp_path, options)
    with start(top, mode) as daemon, FrontEnd(daemon.socket_path) as guest, control(top) as client:
        load = Load(guest, SIZE // BLOCK, zeroes=True, base=SHOWN)
        load.run(50)
        job = client.stream(base)
        while not client.job(job.job).has_ended:
            load.run(10)
        assert client.job(job.job).state == "completed", client.job(job.job)
        load.run(50)
        load.drain()
        assert open_files(daemon) & {"base", "mid", "top"} == {"top"} | ({base} if base else set())
        daemon.stop()
    assert backing_name(top) == base
    assert_clean(top)
    (tmp_path / "mid").unlink()
    assert content(top) == load.expected()


def test_only_one_job_at_a_time_and_what_else_is_refused(top: Path) -> None:
    with start(top) as daemon, FrontEnd(daemon.socket_path), control(top) as client:
        for base in ("nowhere", "top", "mid"):
            with pytest.raises(ControlError, match=base):
                client.stream(base)
        for begin in (client.stream, client.commit):
            with pytest.raises(ControlError, match="nbd://localhost/x: no disk that is served is over an export"):
                begin("nbd://localhost/x")
        with pytest.raises(ControlError, match="'hope' is none of report"):
            client.stream(on_error="hope")
        with pytest.raises(ControlError, match="there is no job 1"):
            client.cancel(1)
        job = client.stream(rate=1)
        with pytest.raises(ControlError, match="job 1 is under way: stream"):
            client.stream()
        with pytest.raises(ControlError, match="job 1 is under way: stream"):
            client.snapshot("frozen")
        client.cancel(job.job)
        assert client.wait(job.job).state == "cancelled"
        assert client.cancel(job.job).state == "cancelled"
        for refused in (client.pause, client.resume, lambda number: client.set_rate(number, 0)):
            with pytest.raises(ControlError, match="job 1 has ended: cancelled"):
                refused(job.job)
        assert client.wait(client.stream().job).state == "completed"
        with pytest.raises(ControlError, match="has no backing file"):
            client.stream()
        with pytest.raises(ControlError, match="job 2 has ended: completed"):
            client.cancel(2)
    assert backing_name(top) is None


def test_job_is_paused_slowed_and_goes_on(top: Path) -> None:
    with start(top) as daemon, FrontEnd(daemon.socket_path) as guest, control(top) as client:
        job = client.stream(rate=1).job
        assert client.pause(job).state == client.pause(job).state == "paused"
        guest.write(0, b"w" * BLOCK)  # a job that rests keeps nobody waiting
        assert guest.read(MIB, BLOCK) == SHOWN[MIB : MIB + BLOCK]
        assert client.set_rate(job, 0).rate == 0
        assert not client.job(job).has_ended
        client.resume(job)
        ended = client.wait(job)
        assert (ended.state, ended.done, ended.total, ended.error) == ("completed", SIZE, SIZE, "")
        daemon.stop()
    assert content(top) == b"w" * BLOCK + SHOWN[BLOCK:]
    assert_clean(top)


def test_job_makes_room_for_a_resize(top: Path) -> None:
    with start(top) as daemon, FrontEnd(daemon.socket_path) as guest, control(top) as client:
        job = client.stream(rate=1).job
        assert client.resize(2 * SIZE) == guest.size == 2 * SIZE
        assert client.job(job).state in ("waiting", "running")
        client.set_rate(job, 0)
        assert client.wait(job).state == "completed"
        daemon.stop()
    assert content(top) == SHOWN + bytes(SIZE)
    assert_clean(top)


def test_job_waits_while_the_image_is_let_go(top: Path) -> None:
    with start(top) as daemon:
        with FrontEnd(daemon.socket_path) as guest, control(top) as client:
            client.subscribe("job")
            job = client.stream(rate=1).job
            await_state(client, "running")
            base = guest.stop_queue()
            assert_clean(top)  # which others may have now
            await_state(client, "waiting")
            client.set_rate(job, 0)
            guest.start_queue(base)
            assert client.wait(job).state == "completed"
        daemon.stop()
    assert backing_name(top) is None
    assert content(top) == SHOWN


def test_daemon_that_ends_ends_its_job(top: Path) -> None:
    with start(top) as daemon, FrontEnd(daemon.socket_path) as guest, control(top) as client:
        client.stream(rate=1)
        guest.write(0, b"w" * BLOCK)
        daemon.stop()
        assert daemon.process.stderr is not None
        assert "job 1, stream, ends with the daemon" in daemon.process.stderr.read()
    assert backing_name(top) == "mid"
    assert content(top) == b"w" * BLOCK + SHOWN[BLOCK:]
    assert_clean(top)


def test_interrupted_wait_says_that_the_job_goes_on(top: Path) -> None:
    limit = ["prlimit", f"--fsize={2 * MIB}:", "--"]
    with start(top, under=limit) as daemon, FrontEnd(daemon.socket_path), control(top) as client:
        waits = (DAEMON, "ctl", f"--control={top}.control", "stream", "--on-error=stop", "--wait")
        waiting = popen(waits, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert waiting.stderr is not None
        assert "job 1 is paused" in waiting.stderr.readline()  # it waits by now
        waiting.send_signal(signal.SIGINT)
        assert waiting.communicate(timeout=TIMEOUT) == ("", "job 1 goes on; ctl job wait or cancel\n")
        assert waiting.returncode == -signal.SIGINT
        assert client.job(1).state == "paused"


def test_job_that_runs_out_of_space_stops_and_goes_on(top: Path) -> None:
    limit = ["prlimit", f"--fsize={2 * MIB}:", "--"]
    with start(top, under=limit) as daemon, FrontEnd(daemon.socket_path) as guest, control(top) as client:
        failed = client.wait(client.stream().job)
        assert (failed.state, failed.error) == ("failed", f"{top}: File too large")
        job = client.stream(on_error="stop").job
        client.subscribe("job")
        await_state(client, "paused")
        assert client.job(job).error == f"{top}: File too large"
        waits = ("ctl", f"--control={top}.control", "job", "wait", str(job))
        waiting = popen((DAEMON, *waits), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert waiting.stderr is not None
        why = f"job {job} is paused: {top}: File too large; ctl job resume or cancel\n"
        assert waiting.stderr.readline() == why
        assert guest.read(MIB, BLOCK) == SHOWN[MIB : MIB + BLOCK]
        subprocess.run(["prlimit", f"--pid={daemon.process.pid}", "--fsize=unlimited:"], check=True)
        client.resume(job)
        assert client.wait(job).state == "completed"
        assert waiting.communicate(timeout=TIMEOUT)[1] == ""
        assert waiting.returncode == 0
        daemon.stop()
        assert daemon.process.stderr is not None
        said = daemon.process.stderr.read()
        for number, state in ((1, "failed"), (2, "paused")):
            assert f"job {number}, stream, {state}: {top}: File too large\n" in said
    assert content(top) == SHOWN
    assert_clean(top)


@pytest.mark.sample(4)
@pytest.mark.parametrize("at", [2, 8, 10, 11, 12, 13, 15, 20])
def test_death_before_any_call_leaves_the_same_disk(top: Path, at: int) -> None:
    """Before the *at*-th call that changes a file; the next daemon can stream what is left."""
    with start(top, "--aio=threads", under=dying_from_start(at)) as daemon, FrontEnd(daemon.socket_path) as guest:
        try:
            guest.write(0, b"w" * BLOCK)
            with control(top) as client:
                assert client.wait(client.stream().job).state == "completed"
            daemon.process.terminate()
        except (ControlError, BackendGone):
            pass
        assert daemon.process.wait(TIMEOUT) in (-signal.SIGKILL, 0)
    with qcow2.open(top, writable=True) as disk:  # which also brings in what waits in its log
        shown = disk.read(0, SIZE)
    assert shown[:BLOCK] in (b"w" * BLOCK, SHOWN[:BLOCK])
    assert shown[BLOCK:] == SHOWN[BLOCK:]
    if backing_name(top) is not None:
        with start(top) as daemon, FrontEnd(daemon.socket_path), control(top) as client:
            assert client.wait(client.stream().job).state == "completed"
            daemon.stop()
    assert backing_name(top) is None
    assert content(top) == shown
    assert_not_corrupt(top)


@pytest.mark.parametrize("option", ["--read-only", "--trace-io=trace", "--format=raw"])
def test_daemon_that_may_not(top: Path, tmp_path: Path, option: str) -> None:
    with start(top, option.replace("=trace", f"={tmp_path}/trace")) as daemon, FrontEnd(daemon.socket_path):
        for command in ("stream", "commit"):
            with control(top) as client, pytest.raises(ControlError, match=r"read-only|--trace-io|a raw image"):
                client.ask(command)


def test_events_tell_of_jobs_and_snapshots(top: Path) -> None:
    with start(top) as daemon, FrontEnd(daemon.socket_path), control(top) as teller, control(top) as client:
        teller.subscribe("job", "snapshot", "bitmap", "snapshot-internal")
        job = client.wait(client.stream().job)
        client.snapshot("frozen")
        heard: list[Any] = []
        while len(heard) < 3:
            event = teller.next_event(TIMEOUT)
            assert event is not None
            heard.append((event.name, event.data.get("state", event.data.get("snapshot"))))
        assert heard == [("job", "running"), ("job", "completed"), ("snapshot", "frozen")]
        assert job == client.jobs()[0]
        actions = [{"action": "add", "name": "daily"}, {"action": "disable", "name": "daily"}]
        client.bitmaps.change(*actions)
        with pytest.raises(ControlError, match="daily"):
            client.bitmaps.add("daily")
        client.internal_snapshots.create("one")
        with pytest.raises(ControlError, match="there is a snapshot 'one'"):
            client.internal_snapshots.create("one")
        client.internal_snapshots.delete("one")
        told = [teller.next_event(TIMEOUT) for _ in range(3)]
        assert [(event.name, event.data) for event in told if event is not None] == [
            ("bitmap", {"actions": actions}),
            ("snapshot-internal", {"action": "create", "name": "one"}),
            ("snapshot-internal", {"action": "delete", "name": "one"}),
        ]
        with pytest.raises(ControlError, match="weather"):
            teller.ask("subscribe", events=["weather"])


def test_what_a_commit_freezes_is_a_snapshot_that_is_told_of(top: Path) -> None:
    with start(top) as daemon, FrontEnd(daemon.socket_path), control(top) as teller, control(top) as client:
        teller.subscribe("snapshot")
        assert client.wait(client.commit("base", active=True).job).state == "completed"
        event = teller.next_event(TIMEOUT)
        assert event is not None
        assert event.data == {"snapshot": "top.committing"}
        daemon.stop()


def test_events_end_with_the_daemon(top: Path) -> None:
    command = [DAEMON, "ctl", f"--control={top}.control", "events"]
    with start(top) as daemon, FrontEnd(daemon.socket_path), control(top) as client:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as events:
            assert events.stdout is not None
            while not select.select([events.stdout], [], [], 0)[0]:  # it has subscribed
                client.bitmaps.add("daily")
                client.bitmaps.remove("daily")
            client.subscribe("bitmap")
            client.bitmaps.add("daily")
            daemon.stop()
            assert [event.name for event in client.events()] == ["bitmap"]
            said, complaint = events.communicate(timeout=TIMEOUT)
        assert (events.returncode, complaint) == (0, "")
        assert {json.loads(line)["event"] for line in said.splitlines()} == {"bitmap"}


def test_who_waits_for_a_job_misses_no_other_event(top: Path) -> None:
    with start(top) as daemon, FrontEnd(daemon.socket_path), control(top) as client, control(top) as other:
        client.subscribe("bitmap")
        job = client.stream(rate=1).job

        def hurry(_: Job) -> None:
            if not list(other.bitmaps):
                other.bitmaps.add("daily")
                other.set_rate(job, 0)

        assert client.wait(job, hurry).state == "completed"
        event = client.next_event(TIMEOUT)
        assert event is not None
        assert event.name == "bitmap"
        assert client.next_event(0) is None


def test_ctl_shows_jobs_to_people_and_to_programs(top: Path) -> None:
    with start(top) as daemon, FrontEnd(daemon.socket_path):
        begun = ctl(top, "stream", "--rate=1", "--json")
        assert json.loads(begun.stdout)["job"] == 1
        assert ctl(top, "job", "list").stdout.startswith("job 1: stream, ")
        assert json.loads(ctl(top, "job", "list", "--json").stdout)[0]["on-error"] == "report"
        assert json.loads(ctl(top, "job", "set-rate", "1", "4G", "--json").stdout)["rate"] == 4 << 30
        done = ctl(top, "job", "wait", "1")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "job 1: stream, completed, 100.0 % of 8 MiB, at most 4 GiB/s\n"
        refused = ctl(top, "job", "cancel", "1")
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refused.stderr == "vhost-user-qcow2: ctl: job 1 has ended: completed\n"
        assert "required: ACTION, one of list, wait, pause" in ctl(top, "job").stderr


def test_ctl_draws_a_bar_on_a_terminal(top: Path) -> None:
    ours, theirs = pty.openpty()
    with start(top) as daemon, FrontEnd(daemon.socket_path):
        command = [str(DAEMON), "ctl", f"--control={top}.control", "stream", "--wait"]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=theirs, check=True, timeout=TIMEOUT)
    os.close(theirs)
    said = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert said.splitlines()[-1] == f"stream [{'#' * 30}] 100.0 % completed"


@pytest.mark.parametrize("mode", ["--cache=writeback", "--cache=none", "--aio=threads", "--sandbox"])
def test_commit_beside_a_guest_that_writes(top: Path, tmp_path: Path, mode: str) -> None:
    with start(top, mode) as daemon, FrontEnd(daemon.socket_path) as guest, control(top) as client:
        load = Load(guest, SIZE // BLOCK, zeroes=True, base=SHOWN)
        load.run(50)
        job = client.commit()
        while not client.job(job.job).has_ended:
            load.run(10)
        assert client.job(job.job).state == "completed", client.job(job.job)
        assert open_files(daemon) & {"base", "mid", "top"} == {"top", "base"}
        assert_clean(tmp_path / "base")  # which others may read
        load.run(50)
        load.drain()
        with pytest.raises(ControlError, match="nothing is between"):
            client.commit("base")
        daemon.stop()
    assert backing_name(top) == "base"
    (tmp_path / "mid").unlink()
    assert content(top) == load.expected()
    assert content(tmp_path / "base") == SHOWN
    assert_clean(top)


@pytest.mark.parametrize("base_format", ["raw", "qcow2"])
def test_snapshots_are_committed_one_after_the_other(tmp_path: Path, base_format: str) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    qcow2_tool_ok("create", "-f", base_format, base, "1M")  # shorter than what comes over it
    qcow2_tool_ok("create", "-b", "base", "-F", base_format, top, str(SIZE))
    with start(top) as daemon, FrontEnd(daemon.socket_path) as guest, control(top) as client:
        load = Load(guest, SIZE // BLOCK, base=bytes(SIZE))
        for name in ("monday", "tuesday"):
            load.run(60)
            load.drain()
            client.snapshot(name)
            load.run(10)
            assert client.wait(client.commit().job).state == "completed"
            assert open_files(daemon) & {"base", "monday", "tuesday", "top"} == {"top", "base"}
        load.drain()
        daemon.stop()
    assert backing_name(top) == "base"
    assert content(top) == load.expected()


def test_commit_that_does_not_say_where_is_taken_if_only_one_file_can_be_meant(top: Path, tmp_path: Path) -> None:
    """Given again and again it would merge one more file each time, and the disk itself at last."""
    with start(top) as daemon, FrontEnd(daemon.socket_path) as guest, control(top) as client:
        guest.write(0, b"w" * BLOCK)
        client.snapshot("frozen")
        with pytest.raises(ControlError, match=r"/top and .*/base are .*/frozen, .*/mid: say --base"):
            client.commit()
        assert client.wait(client.commit("mid").job).state == "completed"
        assert client.wait(client.commit().job).state == "completed"
        with pytest.raises(ControlError, match=r"/base: nothing is between; --active commits the disk itself"):
            client.commit()
        said = ctl(top, "commit", "--wait")
        assert (said.returncode, "--active commits the disk itself" in said.stderr) == (1, True)
        daemon.stop()
    assert sorted(os.listdir(tmp_path)) == ["base", "frozen", "mid", "top"]
    assert backing_name(top) == "base"
    assert content(top) == content(tmp_path / "base") == b"w" * BLOCK + SHOWN[BLOCK:]


def test_one_frozen_disk_is_committed_to_another_past_the_page_cache(top: Path, tmp_path: Path) -> None:
    with start(top, "--cache=none") as daemon, FrontEnd(daemon.socket_path) as guest, control(top) as client:
        for name in ("monday", "tuesday"):
            guest.write(0, name.encode().ljust(BLOCK))
            client.snapshot(name)
        assert_clean(tmp_path / "monday")  # which others may read
        assert client.wait(client.commit("monday").job).state == "completed"
        guest.write(BLOCK, b"wednesday".ljust(BLOCK))
        assert guest.read(0, BLOCK) == b"tuesday".ljust(BLOCK)
        daemon.stop()
    assert backing_name(top) == "monday"
    assert content(top) == b"tuesday".ljust(BLOCK) + b"wednesday".ljust(BLOCK) + SHOWN[2 * BLOCK :]


def test_commit_that_is_given_up_leaves_the_chain_as_it_was(top: Path, tmp_path: Path) -> None:
    with start(top) as daemon, FrontEnd(daemon.socket_path) as guest, control(top) as client:
        job = client.commit(rate=1).job
        queue = guest.stop_queue()
        assert_clean(tmp_path / "base")  # let go, and closed
        guest.start_queue(queue)
        assert client.cancel(job).job == job
        assert client.wait(job).state == "cancelled"
        assert_clean(tmp_path / "base")
        assert open_files(daemon) & {"base", "mid", "top"} == {"base", "mid", "top"}
        assert guest.read(MIB, BLOCK) == SHOWN[MIB : MIB + BLOCK]
        assert client.wait(client.commit().job).state == "completed"
        daemon.stop()
    assert backing_name(top) == "base"
    assert content(top) == SHOWN


def test_commit_to_what_others_use_is_refused(top: Path, tmp_path: Path) -> None:
    with start(top) as daemon, FrontEnd(daemon.socket_path) as guest, control(top) as client:
        with qcow2.open(tmp_path / "base"):
            with pytest.raises(ControlError, match="is another process using the image"):
                client.commit()
            assert guest.read(MIB, BLOCK) == SHOWN[MIB : MIB + BLOCK]
        with pytest.raises(OSError, match="write"):
            qcow2.open(tmp_path / "base", writable=True)  # it is read, as before
    assert backing_name(top) == "mid"


def test_commit_never_shows_what_was_hidden(tmp_path: Path) -> None:
    for name, words in (("base", ["8M"]), ("mid", ["-b", "base", "-F", "qcow2", "4M"]), ("top", ["-b", "mid", "8M"])):
        more = ["-F", "qcow2"] if name == "top" else []
        qcow2_tool_ok("create", *words[:-1], *more, tmp_path / name, words[-1])
    with start(tmp_path / "top") as daemon, FrontEnd(daemon.socket_path), control(tmp_path / "top") as client:
        with pytest.raises(ControlError, match="is shorter than"):
            client.commit()


@pytest.mark.sample(4)
@pytest.mark.parametrize("at", [2, 5, 7, 8, 9, 10, 11, 12, 13, 14])
def test_death_in_a_commit_leaves_the_same_disk(top: Path, tmp_path: Path, at: int) -> None:
    with start(top, "--aio=threads", under=dying_from_start(at)) as daemon, FrontEnd(daemon.socket_path):
        with suppress(ControlError, BackendGone), control(top) as client:
            assert client.wait(client.commit().job).state == "completed"
        daemon.process.terminate()
        assert daemon.process.wait(TIMEOUT) in (-signal.SIGKILL, 0)
    assert content(top) == SHOWN
    assert_not_corrupt(tmp_path / "base")
    if backing_name(top) == "mid":
        with start(top) as daemon, FrontEnd(daemon.socket_path), control(top) as client:
            assert client.wait(client.commit().job).state == "completed"
            daemon.stop()
    assert backing_name(top) == "base"
    assert content(top) == content(tmp_path / "base") == SHOWN
    assert_not_corrupt(top)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("mode", "options", "base"),
    [
        ("--cache=writeback", "extended_l2=on", None),
        ("--cache=none", "", "base"),
        ("--cache=writethrough", "lazy_refcounts=on", "base"),
        ("--sandbox", "cluster_size=4k", None),
    ],
)
def test_what_the_image_holds_is_committed_beside_a_guest_that_writes(
    tmp_path: Path, mode: str, options: str, base: str | None
) -> None:
    top = make_chain(tmp_path, options)
    with start(top, mode) as daemon, FrontEnd(daemon.socket_path) as guest, control(top) as client:
        load = Load(guest, SIZE // BLOCK, zeroes=True, base=SHOWN)
        load.run(200)
        load.drain()
        before = load.expected()
        held = dict(load.held)
        job = client.commit(base, active=True).job
        while not client.job(job).has_ended:
            load.run(10)
        assert client.job(job).state == "completed", client.job(job)
        load.drain()
        daemon.stop()
    assert backing_name(top) == (base or "mid")
    assert content(top) == load.expected()
    committed = content(tmp_path / (base or "mid"))
    for block in held:
        place = slice(block * BLOCK, (block + 1) * BLOCK)
        if load.expected()[place] == before[place] != bytes(BLOCK):  # not written since: no two writes are alike
            assert committed[place] == before[place]
    assert sorted(name for name in os.listdir(tmp_path) if name.startswith("top")) == ["top"]
    assert_clean(top)


def test_commit_of_a_disk_that_lies_right_over_its_base(tmp_path: Path) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    qcow2_tool_ok("create", base, str(SIZE))
    qcow2_tool_ok("create", "-b", "base", "-F", "qcow2", top)
    with start(top) as daemon, FrontEnd(daemon.socket_path) as guest, control(top) as client:
        for text in (b"one", b"two"):
            guest.write(MIB, text.ljust(BLOCK) * 32)
            assert client.wait(client.commit(active=True).job).state == "completed"
            assert_clean(base)
            assert content(base)[MIB : MIB + 3] == text
            assert guest.read(MIB, BLOCK) == text.ljust(BLOCK)
        daemon.stop()
    assert top.stat().st_size < MIB
    assert sorted(os.listdir(tmp_path)) == ["base", "top"]
    assert_clean(top)


@pytest.mark.parametrize("is_replaced", [False, True])
def test_name_of_what_was_frozen_may_be_gone_before_the_end(top: Path, tmp_path: Path, is_replaced: bool) -> None:
    frozen = tmp_path / "top.committing"
    with start(top) as daemon, FrontEnd(daemon.socket_path) as guest, control(top) as client:
        guest.write(0, b"w" * BLOCK)
        job = client.commit("base", active=True, rate=1).job
        while backing_name(top) != frozen.name:
            assert not client.job(job).has_ended
        frozen.unlink()
        if is_replaced:
            frozen.write_bytes(b"somebody's")
        client.set_rate(job, 0)
        assert client.wait(job).state == "completed"
        daemon.stop()
        assert daemon.process.stderr is not None
        assert daemon.process.stderr.read() == ""
    assert content(top) == b"w" * BLOCK + SHOWN[BLOCK:]
    assert not is_replaced or frozen.read_bytes() == b"somebody's"


@pytest.mark.parametrize("number", ["", "9"])
def test_nothing_is_called_like_what_a_commit_removes(top: Path, tmp_path: Path, number: str) -> None:
    name = f"top.committing{number}"
    with start(top) as daemon, FrontEnd(daemon.socket_path), control(top) as client:
        for make in (client.snapshot, client.mirror, client.backup):
            with pytest.raises(ControlError, match=f"{name}': .* what a commit has frozen, and removed"):
                make(name)
        daemon.stop()
    assert not (tmp_path / name).exists()


def test_bitmaps_stay_with_the_image_that_is_committed(top: Path) -> None:
    qemu_img("bitmap", "--add", top, "changes")
    with start(top) as daemon, FrontEnd(daemon.socket_path) as guest, control(top) as client:
        guest.write(MIB, b"w" * BLOCK)
        assert client.wait(client.commit("base", active=True).job).state == "completed"
        assert [(bitmap.name, bitmap.dirty) for bitmap in client.bitmaps] == [("changes", 65536)]
        daemon.stop()
    with qcow2.open(top) as disk:
        assert [bitmap.name for bitmap in disk.bitmaps] == ["changes"]


@pytest.mark.sample(4)
@pytest.mark.parametrize("at", [*range(3, 80, 4)])
def test_death_in_a_commit_of_what_the_image_holds(top: Path, tmp_path: Path, at: int) -> None:
    with qcow2.open(top, writable=True) as disk:
        disk.write(0, b"t" * BLOCK)
    shown = b"t" * BLOCK + SHOWN[BLOCK:]
    with start(top, "--aio=threads", under=dying_from_start(at)) as daemon, FrontEnd(daemon.socket_path):
        with suppress(ControlError, BackendGone), control(top) as client:
            assert client.wait(client.commit("base", active=True).job).state == "completed"
        daemon.process.terminate()
        assert daemon.process.wait(TIMEOUT) in (-signal.SIGKILL, 0)
    assert content(top) == shown
    assert_not_corrupt(tmp_path / "base")
    with start(top) as daemon, FrontEnd(daemon.socket_path), control(top) as client:
        assert client.wait(client.commit("base", active=True).job).state == "completed"
        daemon.stop()
    assert backing_name(top) == "base"
    assert content(top) == content(tmp_path / "base") == shown
    assert_not_corrupt(top)


def images_alive() -> list[Image]:
    """Of the whole process: tests before this one may have left some."""
    gc.collect()
    return [each for each in gc.get_objects() if type(each) is Image]


def test_images_that_are_not_served_any_more_are_forgotten(tmp_path: Path) -> None:
    """Each has a cache of its own, so a daemon that takes a snapshot a day must not keep those of all days."""
    image, of_others = tmp_path / "disk", images_alive()
    qcow2_tool_ok("create", image, str(SIZE))
    with serve(image) as served, FrontEnd(served.socket_path) as guest:
        guest.write(0, b"a" * BLOCK)
        ended = threading.Event()
        with Jobs(served.device, served.backend, lambda report: report.state in ENDED and ended.set()) as jobs:
            on_jobs = JobCommands(served.device, served.backend, served.held, jobs)
            for number in range(3):
                snapshots = Snapshots(served.device, served.backend, served.held)
                assert snapshots.take(f"day{number}", Pace(), OverlayWish(OverlayBitmaps())) == ""
                on_jobs.stream()
                assert ended.wait(TIMEOUT)
                ended.clear()
            assert len(images_alive()) == len(of_others) + 1
