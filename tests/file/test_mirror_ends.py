"""How a mirror that was ready ends: whatever comes in between, a copy that is whole is left, or it is said why not."""

import errno
import logging
import os
import resource
import threading
from collections.abc import Coroutine
from logging import LogRecord
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

import qcow2
from qcow2.driver.file import HostFile
from qcow2.job.pace import Pace
from qcow2.node.pivot import Pivot
from tests import slowdisk
from tests.ctl import ctl
from tests.file.test_jobs import BLOCK, MIB, SHOWN, chain, content, control, start, top
from tests.file.test_mirror import until
from tests.frontend import OUT, FrontEnd
from tests.oracle import assert_clean
from tests.patience import TIMEOUT
from tests.served import serve
from tests.slowdisk import SlowDisk
from vhost import mirroring
from vhost.job import Report, Work
from vhost.jobcommands import JobCommands
from vhost.jobs import Jobs
from vhost.policy import ENDED, OnError

__all__ = ["chain", "top"]  # fixtures


class Said(logging.Handler):
    """Each line of the log, as it comes."""

    def __init__(self, lines: SimpleQueue[Any]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: LogRecord) -> None:
        self._lines.put(record.getMessage())


def test_a_copy_that_is_whole_waits_for_requests_that_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backing, mount_point = tmp_path / "backing", tmp_path / "slow"
    backing.mkdir()
    mount_point.mkdir()
    (backing / "disk").write_bytes(b"d" * MIB)
    told: SimpleQueue[Any] = SimpleQueue()
    monkeypatch.setattr(mirroring, "PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr(mirroring, "AGAIN_SECONDS", 0.01)
    said = Said(told)
    logging.getLogger("vhost").addHandler(said)
    try:
        with (
            SlowDisk(backing, mount_point) as disk,
            serve(mount_point / "disk", format="raw", beside=tmp_path) as served,
            FrontEnd(served.socket_path) as guest,
            Jobs(served.device, served.backend, told.put) as jobs,
        ):
            commands = JobCommands(served.device, served.backend, served.held, jobs)
            commands.mirror(str(tmp_path / "copy"))
            while getattr(told.get(timeout=TIMEOUT), "state", "") != "ready":
                pass
            with disk.holding(slowdisk.WRITE):
                guest.submit(OUT, 0, b"w" * BLOCK)
                disk.wait_for_one()
                commands.job_cancel(1)
                while not (isinstance(now := told.get(timeout=TIMEOUT), str) and "is not left yet" in now):
                    assert getattr(now, "state", "") not in ENDED, now
            while getattr(now := told.get(timeout=TIMEOUT), "state", "") not in ENDED:
                pass
            assert (now.state, now.error, now.left) == ("cancelled", "", True)
    finally:
        logging.getLogger("vhost").removeHandler(said)
    assert (tmp_path / "copy").read_bytes() == b"w" * BLOCK + b"d" * (MIB - BLOCK)


@pytest.mark.parametrize("word", ["cancel", "complete"])
def test_a_copy_that_is_whole_needs_no_descriptor_more(top: Path, tmp_path: Path, word: str) -> None:
    qcow2.create(tmp_path / "copy", len(SHOWN))
    with start(top) as daemon:
        with FrontEnd(daemon.socket_path), control(top) as client:
            job = client.mirror("copy", existing=True).job
            until(client, job, "ready")
            pid = daemon.process.pid
            limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))
            getattr(client, word)(job)
            now = client.wait(job)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
            if word == "cancel":
                assert (now.state, now.error, now.left) == ("cancelled", "", True)
            else:
                assert (now.state, now.error.endswith("Too many open files")) == ("ready", True), now
                assert client.wait(client.complete(job).job).state == "completed"
        daemon.stop()
    assert_clean(tmp_path / "copy")
    assert content(tmp_path / "copy") == SHOWN


@pytest.mark.parametrize("is_existing", [False, True])
def test_a_copy_that_is_whole_is_left_though_the_job_had_to_make_room(
    top: Path, tmp_path: Path, is_existing: bool
) -> None:
    if is_existing:
        qcow2.create(tmp_path / "copy", len(SHOWN))
    with start(top) as daemon:
        with FrontEnd(daemon.socket_path) as guest, control(top) as client:
            job = client.mirror("copy", existing=is_existing).job
            until(client, job, "ready")
            client.pause(job)
            client.bitmaps.change({"action": "add", "name": "since"})
            guest.write(0, b"w" * BLOCK)
            client.cancel(job)
            now = client.wait(job)
            assert (now.state, now.error, now.left) == ("cancelled", "", True)
        daemon.stop()
    assert_clean(tmp_path / "copy")
    assert content(tmp_path / "copy") == b"w" * BLOCK + SHOWN[BLOCK:]


def test_a_path_that_is_turned_needs_no_descriptor_to_be_stable(tmp_path: Path) -> None:
    for name in ("served", "copy"):
        (tmp_path / name).write_text(name)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with HostFile.open(str(tmp_path / "served")) as top, HostFile.open(str(tmp_path / "copy")) as copy:
        pivot = Pivot(str(tmp_path / "served"), top, str(tmp_path / "copy"), copy)
        pivot.prepare()
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            pivot.switch()
            pivot.sync()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert (tmp_path / "served").read_text() == "copy"


def test_ctl_waits_for_a_copy_that_is_left_with_success(top: Path, tmp_path: Path) -> None:
    with start(top) as daemon, FrontEnd(daemon.socket_path), control(top) as client:
        until(client, client.mirror("copy").job, "ready")
        assert ctl(top, "job", "cancel", "1").returncode == 0
        waited = ctl(top, "job", "wait", "1")
        assert (waited.returncode, waited.stderr) == (0, "")
        assert "mirror, cancelled, 100.0 % of 8 MiB, a whole copy is left" in waited.stdout
        client.cancel(client.mirror("other", rate=1).job)
        waited = ctl(top, "job", "wait", "2", "--json")
        assert (waited.returncode, '"left": false' in waited.stdout) == (1, True)
        assert os.listdir(tmp_path).count("other") == 0
        daemon.stop()
    assert content(tmp_path / "copy") == SHOWN


class Refused(Work):
    """Is cancelled while it finishes, which fails; *is_behind*: it can leave nothing whole either."""

    kind = "refused"
    awaits_word = True

    def __init__(self, is_behind: bool) -> None:
        self.about: dict[str, Any] = {}
        self.is_finishing, self.is_cancelled = threading.Event(), threading.Event()
        self.has_parted = False
        self._is_behind = is_behind

    def begin(self, pace: Pace) -> Coroutine[Any, Any, None]:
        return self._move()

    async def _move(self) -> None:
        pass

    def finish(self) -> None:
        self.is_finishing.set()
        assert self.is_cancelled.wait(TIMEOUT)
        if self._is_behind:
            self.on_behind()
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "there")

    def part(self) -> None:
        self.has_parted = True


@pytest.mark.parametrize("is_behind", [False, True])
def test_what_is_cancelled_while_it_finishes_says_what_that_met(tmp_path: Path, is_behind: bool) -> None:
    qcow2.create(tmp_path / "image", MIB)
    told: SimpleQueue[Report] = SimpleQueue()
    work = Refused(is_behind)
    with (
        serve(tmp_path / "image") as served,
        FrontEnd(served.socket_path),
        Jobs(served.device, served.backend, told.put) as jobs,
    ):
        jobs.start(lambda: work, rate=0, on_error=OnError.REPORT)
        while told.get(timeout=TIMEOUT).state != "ready":
            pass
        jobs.complete(1)
        assert work.is_finishing.wait(TIMEOUT)
        jobs.cancel(1)
        work.is_cancelled.set()
        while (ended := told.get(timeout=TIMEOUT)).state not in ENDED:
            pass
    assert ended.error.startswith("there: Read-only file system")
    assert (ended.state, ended.left, work.has_parted) == (
        ("failed", False, False) if is_behind else ("cancelled", True, True)
    )


@pytest.mark.parametrize("end", ["the daemon ends", "cancelled too early", "cancelled while it waits", "begun anew"])
def test_what_was_there_is_closed_cleanly_however_the_job_ends(top: Path, tmp_path: Path, end: str) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    qcow2.create(tmp_path / "copy", len(SHOWN), backing="base")
    with start(top, f"--link-log={logs}") as daemon:
        with FrontEnd(daemon.socket_path) as guest, control(top) as client:
            job = client.mirror("copy", existing=True).job
            until(client, job, "ready")
            for block in range(0, len(SHOWN) // BLOCK, 4):
                guest.write(block * BLOCK, b"w" * 512)
            match end:
                case "the daemon ends":
                    daemon.stop()
                case "cancelled too early":
                    client.cancel(job)
                    assert client.wait(job).left
                    job = client.mirror("copy", existing=True, rate=2 * MIB).job
                    while client.job(job).done < MIB:
                        assert client.next_event(0.01) is None or not client.job(job).has_ended
                    guest.write(0, b"v" * 512)
                    client.cancel(job)
                    assert client.wait(job).state == "cancelled"
                case "cancelled while it waits":
                    queue = guest.stop_queue()
                    until(client, job, "waiting")
                    client.cancel(job)
                    assert client.wait(job).state == "failed"
                    guest.start_queue(queue)
                case "begun anew":
                    guest.start_queue(guest.stop_queue())
                    until(client, job, "ready")
        if end != "the daemon ends":
            daemon.stop()
    assert_clean(tmp_path / "copy")
    assert not list(logs.iterdir())
