"""Jobs from Python that an interrupt meets: it breaks into none of their steps, and ends them soon."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import qcow2
from qcow2.job.pace import Pace
from tests.oracle import assert_clean, qemu_img, qemu_io
from tests.program import TIMEOUT

NBYTES = 40 << 20  # half of it is more than is under way at a time
JOBS: dict[str, Callable[..., None]] = {
    "commit": qcow2.commit,
    "convert": lambda path, **how: qcow2.convert(path, path.with_name("new"), **how),
    "rebase": lambda path, **how: qcow2.rebase(path, None, **how),
    "stream": qcow2.stream,
}
BROKEN_INTO = """
import signal, sys, qcow2, qcow2.library.jobs
places = []
def look(number, frame):  # a step is a coroutine's that a driver runs
    files = []
    while frame is not None:
        files.append(frame.f_code.co_filename)
        frame = frame.f_back
    if any("/qcow2/job/" in file for file in files) and any("/qcow2/driver/task.py" in file for file in files):
        places.append(files[0])
signal.signal(signal.SIGALRM, look)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
path, job = sys.argv[1:]
more = {"convert": [path + ".new"], "rebase": [None]}.get(job, [])
getattr(qcow2, job)(path, *more)
signal.setitimer(signal.ITIMER_REAL, 0)
print(*places)
"""


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    base, top = tmp_path / "base", tmp_path / "top"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=1k", base, str(NBYTES))
    qemu_io(base, f"write -q -P 1 0 {NBYTES}")
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=1k", "-b", base, "-F", "qcow2", top)
    qemu_io(top, f"write -q -P 2 0 {NBYTES // 2}")
    return top


@pytest.mark.parametrize("job", [*JOBS])
def test_a_signal_breaks_into_no_step_of_a_job(overlay: Path, job: str) -> None:
    command = [sys.executable, "-c", BROKEN_INTO, overlay, job]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


@pytest.mark.parametrize("job", [*JOBS])
def test_an_interrupted_job_ends_and_the_disk_is_as_it_was(
    overlay: Path, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []
    is_cancelled = threading.Event()
    cancel = Pace.cancel

    def interrupt(number: int, frame: FrameType | None) -> Any:
        raise KeyboardInterrupt

    def cancel_and_tell(pace: Pace) -> None:
        cancel(pace)
        is_cancelled.set()

    def progress(done: int, total: int) -> None:
        told.append((done, total))
        if len(told) == 2:
            os.kill(os.getpid(), signal.SIGUSR2)
            is_cancelled.wait(TIMEOUT)  # or it might have ended before its caller had a turn

    monkeypatch.setattr(Pace, "cancel", cancel_and_tell)
    before = signal.signal(signal.SIGUSR2, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            JOBS[job](overlay, progress=progress)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert told[-1][0] < told[-1][1], "it went on to its end"
    for path in (overlay, overlay.with_name("base")):
        assert_clean(path)
    assert not overlay.with_name("new").exists()
    with qcow2.open(overlay) as disk:
        assert len(disk.files) == 2
        assert disk.read(0, NBYTES) == bytes([2]) * (NBYTES // 2) + bytes([1]) * (NBYTES // 2)
