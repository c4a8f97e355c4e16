"""How far a job is, as qemu-img tells it: with -p on a line of standard output, else when SIGUSR1 asks for it."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from qcow2.job.pace import Pace

STEP = 0.5  # per cent between two updates of the line


@contextmanager
def shown(*, is_wanted: bool, rate: int = 0) -> Iterator[Pace]:
    """The pace of one job, which ends with this; its line is ended if the job was."""
    line = _Line(is_wanted=is_wanted)
    pace = Pace(line.update, rate)

    def ask(number: int, frame: FrameType | None) -> None:
        line.is_asked = True

    before = signal.signal(signal.SIGUSR1, ask)
    try:
        line.begin()
        yield pace
        line.end()
    finally:
        signal.signal(signal.SIGUSR1, before)


class _Line:
    def __init__(self, *, is_wanted: bool) -> None:
        self.is_asked = False
        self._is_wanted = is_wanted
        self._shown = 0.0

    def begin(self) -> None:
        self._show(0)

    def update(self, done: int, total: int) -> None:
        """Once every few, and when somebody asks."""
        percent = 100 * done / total if total else 100.0
        if self.is_asked:
            self.is_asked = False
            print(f"    ({percent:.2f}/100%)", file=sys.stderr, flush=True)
        if percent >= self._shown + STEP or percent == 100 > self._shown:
            self._show(percent)

    def end(self) -> None:
        if self._is_wanted:
            print(flush=True)

    def _show(self, percent: float) -> None:
        self._shown = percent
        if self._is_wanted:
            print(f"    ({percent:.2f}/100%)", end="\r", flush=True)
