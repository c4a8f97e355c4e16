"""What may go wrong in a history, and how it ends."""

from dataclasses import dataclass


class Violation(AssertionError):
    """A promise is broken."""


class Dead(Exception):
    """The process was killed; nothing it does has an effect any more."""


@dataclass(frozen=True)
class Lost:
    """Journal: the operation *number*, in flight at a kill, took no effect."""

    number: int


@dataclass
class Trouble:
    """How often, of 1, things go wrong that need not end anything: short transfers, refusals for now, slowness."""

    short: float = 0.05
    passing: float = 0.03
    slow: float = 0.03  # takes many times as long as others
    stall: float = 0.01  # a transfer on the worker's thread makes it wait
    cold: float = 0.15  # a read of the page cache would wait
    failing: float = 0.0  # EIO, or ENOSPC where space is taken
    failing_sync: float = 0.0
    full: bool = False  # for a while, now and then, most writes find no space
    filled: bool = False  # from some moment on most blocks of files cannot be written, however kind the world is
    punches: bool = True
    far: bool = False  # files, or some of them, lie on a network, as it seems
