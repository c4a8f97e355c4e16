"""How a program ends that a signal interrupts: what it had begun is undone on the way, then it dies of the signal."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal came; no error of ours, and nobody's to catch but for cleaning up."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run_to_end(main: Callable[[], int]) -> int:
    """The status of *main*; by a signal this process dies, without a word, so that its parent sees what it was.

    SIGPIPE is one of them: Python has it ignored, and raises where nobody reads what is printed.
    """
    try:
        with _raised():
            status = main()
            _flush(has_failed=status != 0)
            return status
    except Interrupted as interrupted:
        number = interrupted.number
    except BrokenPipeError:
        return die_of_closed_pipe()
    _tell("qcow2.library.hostfile", "give_up_new")
    return _die(number)


def _flush(*, has_failed: bool) -> None:
    """Print what is left; where that fails, a command that *has_failed* has said why. Raises: OSError."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError:
        sys.stdout = None  # Python would try again at exit, and complain itself
        if not has_failed:
            raise


@contextmanager
def _raised() -> Iterator[None]:
    """Let the signals that end us raise; one that the parent has us ignore (nohup) stays ignored."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in ENDS:
            signal.signal(each, signal.SIG_IGN)  # a second one would break into the cleaning up
        _tell("qcow2.driver.far", "give_up_all")
        raise Interrupted(number)

    for number in ENDS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    yield


def _tell(module: str, name: str) -> None:
    """Call that function, unless the module is not even imported, or just being so: then it has nothing to do."""
    function = getattr(sys.modules.get(module), name, None)
    if function is not None:
        function()


def die_of_closed_pipe() -> int:
    """Nobody reads what we print: die of it without a word, as programs do that are not in Python."""
    return _die(signal.SIGPIPE)


def _die(number: int) -> int:
    """By the signal; a status for the shell if that is blocked."""
    sys.stdout = None  # what was not written is not wanted any more
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    return 128 + number
