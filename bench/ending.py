"""How a measurement that is told to end leaves nothing behind."""

import signal
import sys


def end_on_sigterm() -> None:
    """Everything is cleaned up then, as on Ctrl-C."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def ignore_signals() -> None:
    """From now on: another one would stop the removal of gigabytes half-way."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
