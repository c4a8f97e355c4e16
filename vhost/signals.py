"""What a daemon does at each signal: those that ask it to end end it cleanly, a stray one changes nothing."""

import contextlib
import os
import signal
from collections.abc import Iterator

from ring.native import lib

# A service manager, a terminal that closes, Ctrl-C, Ctrl-\, a container that shuts down, a limit of CPU time.
STOP = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGPWR, signal.SIGXCPU)

# Each ends or stops a process by default. Python ignores SIGPIPE and SIGXFSZ: the system call fails instead.
STRAY = (
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO, signal.SIGSTKFLT),
    *(signal.SIGTTIN, signal.SIGTTOU),  # a message to the terminal of another job: no disk may stop for it
    *(signal.SIGPIPE, signal.SIGXFSZ),
    *(number for number in signal.valid_signals() if number >= signal.SIGRTMIN),
)


@contextlib.contextmanager
def stop_signals(*, is_last: bool = False) -> Iterator[int]:
    """An eventfd that becomes readable at a signal that asks us to end. Main thread only.

    SIGHUP is left ignored if it is: nohup(1) says so. With *is_last* the process ends after this: those signals ask for
    no more than that, and are ignored from then on, so that its status says how it went.
    """
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STRAY}  # refused but to the main thread
    asking = [number for number in STOP if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN)]
    before |= {number: signal.getsignal(number) for number in asking}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        for number in asking:
            lib.tell_at_signal(number, stop_fd)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)  # whatever our parent thought
        yield stop_fd
    finally:
        if not is_last:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, previous in before.items():
            signal.signal(number, signal.SIG_IGN if is_last else previous)
        os.close(stop_fd)
