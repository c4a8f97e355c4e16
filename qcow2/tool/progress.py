"""How far a job is, as qemu-img tells it: with -p on a line of standard output, else when SIGUSR1 asks for it.

A signal that ends the program ends the job first, at its next piece: what it has open is left clean. For an export
nobody waits then.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from qcow2.driver.far import give_up_all
from qcow2.job.pace import Pace
from qcow2.tool.interruption import ENDS, Interrupted

STEP = 0.5  # per cent between two updates of the line


@contextmanager
def shown(*, is_wanted: bool, rate: int = 0) -> Iterator[Pace]:
    """The pace of one job, which ends with this; its line is ended if the job was.

    Raises: Interrupted once a job that a signal was to end has ended.
    """
    line = _Line(is_wanted=is_wanted)
    pace = Pace(line.update, rate)
    came: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        line.is_asked = True

    def end(number: int, frame: FrameType | None) -> None:
        came.append(number)
        pace.cancel()
        give_up_all()
        if len(came) > 1:  # whoever asks twice does not want to wait
            raise Interrupted(number)

    before = {number: signal.getsignal(number) for number in ENDS}
    asked_before = signal.signal(signal.SIGUSR1, ask)
    try:
        for number, handler in before.items():
            if callable(handler):  # neither ignored nor, as in a program that imports us, the default
                signal.signal(number, end)
        line.begin()
        yield pace
        line.end()
    except Exception:
        if came:  # the error is that nobody waited
            raise Interrupted(came[0]) from None
        raise
    finally:
        signal.signal(signal.SIGUSR1, asked_before)
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise Interrupted(came[0])


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
