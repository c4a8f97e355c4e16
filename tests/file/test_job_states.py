"""How it stands with a job is told with the answer, whatever its thread has come to."""

import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from qcow2.driver.operation import Compute
from qcow2.job.pace import Cancelled, Pace
from tests.frontend import FrontEnd
from tests.oracle import qemu_read
from tests.program import TIMEOUT, qcow2_tool_ok
from tests.served import serve
from vhost.job import Report, Work
from vhost.jobs import Jobs
from vhost.policy import ENDED, OnError, State


class Gated(Work):
    """Has moved all once it is let go."""

    kind = "gated"

    def __init__(self) -> None:
        self.about: dict[str, Any] = {}
        self.has_begun, self.gate, self.has_moved = (threading.Event() for _ in range(3))
        self.is_finished = False

    def begin(self, pace: Pace) -> Coroutine[Any, Any, None]:
        return self._move()

    async def _move(self) -> None:
        self.has_begun.set()
        await Compute(self.gate.wait)
        self.has_moved.set()

    def finish(self) -> None:
        self.is_finished = True


def test_every_answer_tells_how_it_stands(tmp_path: Path) -> None:
    qcow2_tool_ok("create", tmp_path / "image", "1M")
    told: SimpleQueue[State] = SimpleQueue()
    with serve(tmp_path / "image") as served:
        device = served.device
        with Jobs(device, device.backend, lambda report: told.put(report.state)) as jobs:

            def start() -> tuple[Gated, int]:
                work = Gated()
                report = jobs.start(lambda: work, rate=0, on_error=OnError.REPORT)
                assert report.state == "running"
                return work, report.job

            work, job = start()
            assert jobs.pause(job).state == jobs.pause(job).state == "paused"
            assert jobs.resume(job).state == "running"
            with FrontEnd(served.socket_path):
                assert work.has_begun.wait(TIMEOUT)
                assert jobs.pause(job).state == "paused"
                work.gate.set()
                assert work.has_moved.wait(TIMEOUT)
                assert not work.is_finished  # what is paused does not finish either
                assert jobs.resume(job).state == "running"
                while told.get(timeout=TIMEOUT) != "completed":
                    pass
                assert work.is_finished

                work, job = start()
                assert work.has_begun.wait(TIMEOUT)
                jobs.pause(job)
                work.gate.set()
                assert jobs.cancel(job).state == "paused"
                while told.get(timeout=TIMEOUT) != "cancelled":
                    pass
                assert not work.is_finished


class Parting(Gated):
    """Is cancelled in its last piece, right before it would be ready."""

    awaits_word = True

    def __init__(self, cancel: Callable[[], Report]) -> None:
        super().__init__()
        self._cancel = cancel
        self.has_parted = False

    async def _move(self) -> None:
        assert self._cancel().state == "running"

    def part(self) -> None:
        self.has_parted = True


def test_nothing_is_left_of_what_was_cancelled_before_it_was_ready(tmp_path: Path) -> None:
    qcow2_tool_ok("create", tmp_path / "image", "1M")
    told: SimpleQueue[State] = SimpleQueue()
    with serve(tmp_path / "image") as served, FrontEnd(served.socket_path):
        device = served.device
        with Jobs(device, device.backend, lambda report: told.put(report.state)) as jobs:
            work = Parting(lambda: jobs.cancel(1))
            jobs.start(lambda: work, rate=0, on_error=OnError.REPORT)
            while (state := told.get(timeout=TIMEOUT)) not in ENDED:
                pass
    assert (state, work.has_parted) == ("cancelled", False)


class Ready(Work):
    """Has nothing to move, each time it is begun; *on_begin(n)* is called then."""

    kind = "ready"
    awaits_word = True

    def __init__(self, on_begin: Callable[["Ready", int], object]) -> None:
        self.about: dict[str, Any] = {}
        self.nbegun = 0
        self.has_parted = False
        self._on_begin = on_begin

    def begin(self, pace: Pace) -> Coroutine[Any, Any, None]:
        self.nbegun += 1
        return self._move()

    async def _move(self) -> None:
        self._on_begin(self, self.nbegun)

    def finish(self) -> None:
        raise AssertionError("it was not told to")

    def part(self) -> None:
        self.has_parted = True


def test_ready_is_not_told_of_what_is_behind_already(tmp_path: Path) -> None:
    qcow2_tool_ok("create", tmp_path / "image", "1M")
    told: SimpleQueue[tuple[State, int]] = SimpleQueue()
    work = Ready(lambda work, n: work.on_behind() if n == 1 else None)
    with serve(tmp_path / "image") as served, FrontEnd(served.socket_path):
        device = served.device
        with Jobs(device, device.backend, lambda report: told.put((report.state, work.nbegun))) as jobs:
            jobs.start(lambda: work, rate=0, on_error=OnError.REPORT)
            while (now := told.get(timeout=TIMEOUT))[0] != "ready":
                pass
    assert now == ("ready", 2)


def test_what_has_fallen_behind_is_not_ready_from_then_on(tmp_path: Path) -> None:
    """Who resizes a disk and then waits for its mirror is not told that it was ready before."""
    qcow2_tool_ok("create", tmp_path / "image", "1M")
    told: SimpleQueue[State] = SimpleQueue()
    work = Ready(lambda work, n: None)
    with serve(tmp_path / "image") as served, FrontEnd(served.socket_path):
        device = served.device
        with Jobs(device, device.backend, lambda report: told.put(report.state)) as jobs:
            jobs.start(lambda: work, rate=0, on_error=OnError.REPORT)
            for _ in range(10):
                while told.get(timeout=TIMEOUT) != "ready":
                    pass
                work.on_behind()
                assert told.get_nowait() == "running"


def test_what_was_ready_and_leaves_nothing_has_failed(tmp_path: Path) -> None:
    qcow2_tool_ok("create", tmp_path / "image", "1M")
    told: SimpleQueue[Report] = SimpleQueue()
    with serve(tmp_path / "image") as served, FrontEnd(served.socket_path):
        device = served.device
        with Jobs(device, device.backend, told.put) as jobs:

            def be_cancelled(work: Ready, nbegun: int) -> None:
                if nbegun == 2:
                    jobs.cancel(1)
                    raise Cancelled

            work = Ready(be_cancelled)
            jobs.start(lambda: work, rate=0, on_error=OnError.REPORT)
            while told.get(timeout=TIMEOUT).state != "ready":
                pass
            work.on_behind()
            while (ended := told.get(timeout=TIMEOUT)).state not in ENDED:
                pass
    assert (ended.state, "no copy is left" in ended.error, work.has_parted) == ("failed", True, False)


def test_what_is_ready_begins_anew_though_room_came_back_before_it_looked(tmp_path: Path) -> None:
    qcow2_tool_ok("create", tmp_path / "image", "1M")
    told: SimpleQueue[tuple[State, int]] = SimpleQueue()
    work = Ready(lambda work, n: None)
    with serve(tmp_path / "image") as served, FrontEnd(served.socket_path):
        device = served.device
        with Jobs(device, device.backend, lambda report: told.put((report.state, work.nbegun))) as jobs:

            def blink() -> None:
                with jobs._changed:  # which the job's thread wants before it looks
                    device.on_alone()
                    device.on_shared()

            jobs.start(lambda: work, rate=0, on_error=OnError.REPORT)
            while told.get(timeout=TIMEOUT)[0] != "ready":
                pass
            device.worker.call(blink)
            while told.get(timeout=TIMEOUT) != ("ready", 2):
                pass


class Starved(Work):
    """Finds no memory at one of its steps."""

    kind = "starved"

    def __init__(self, step: str) -> None:
        self.about: dict[str, Any] = {}
        self._step = step

    def _reach(self, step: str) -> None:
        if step == self._step:
            raise MemoryError

    def prepare(self) -> None:
        self._reach("prepare")

    def begin(self, pace: Pace) -> Coroutine[Any, Any, None]:
        self._reach("begin")
        return self._move()

    async def _move(self) -> None:
        self._reach("move")

    def finish(self) -> None:
        self._reach("finish")

    def leave(self) -> None:
        self._reach("leave")


@pytest.mark.parametrize("step", ["prepare", "begin", "move", "finish", "leave"])
def test_a_job_that_finds_no_memory_fails_alone(tmp_path: Path, step: str) -> None:
    qcow2_tool_ok("create", tmp_path / "image", "1M")
    told: SimpleQueue[Report] = SimpleQueue()
    with serve(tmp_path / "image") as served, FrontEnd(served.socket_path) as guest:
        device = served.device
        with Jobs(device, device.backend, told.put) as jobs:
            jobs.start(lambda: Starved(step), rate=0, on_error=OnError.REPORT)
            while (report := told.get(timeout=TIMEOUT)).state not in ("failed", "completed"):
                pass
            assert (report.state == "completed") == (step == "leave")
            assert report.error == "Cannot allocate memory"
            guest.write(0, b"s" * 512)


class Hanging(Gated):
    """Its target hangs."""

    def finish(self) -> None:
        self.gate.wait()

    async def _move(self) -> None:
        self.has_begun.set()


def test_a_target_that_hangs_does_not_keep_a_daemon_that_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vhost.jobs.PATIENCE_SECONDS", 0.01)
    qcow2_tool_ok("create", tmp_path / "image", "1M")
    work = Hanging()
    told: SimpleQueue[State] = SimpleQueue()
    with serve(tmp_path / "image") as served:
        with FrontEnd(served.socket_path) as guest:
            device = served.device
            with Jobs(device, device.backend, lambda report: told.put(report.state)) as jobs:
                jobs.start(lambda: work, rate=0, on_error=OnError.REPORT)
                assert work.has_begun.wait(TIMEOUT)
                guest.write(0, b"w" * 512)
            assert told.get(timeout=TIMEOUT) not in ENDED
        work.gate.set()
        while told.get(timeout=TIMEOUT) not in ENDED:
            pass
    assert qemu_read(tmp_path / "image")[:512] == b"w" * 512
