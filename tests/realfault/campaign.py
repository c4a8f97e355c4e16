"""Which lives are led: kinds of images, who does the I/O, how deep, when the host fails; and how each call may fail."""

import errno
import random
from collections.abc import Iterator
from pathlib import Path

from tests.kill.images import KINDS, make
from tests.realfault.host import NEEDS_SPACE, Fault
from tests.realfault.trial import PHASES, Setting, live

NBYTES = 4 << 20  # of a disk
OPTIONS = (
    ("--aio=auto",),
    ("--aio=threads",),
    ("--aio=auto", "--cache=writethrough"),
    ("--aio=threads", "--cache=none"),
    ("--aio=auto", "--cache=directsync"),
)
DEPTHS = (1, 8)


def settings(directory: Path, seed: int) -> Iterator[Setting]:
    """Every setting, on images of their own beneath *directory*."""
    for kind in KINDS:
        place = directory / kind
        place.mkdir()
        start = make(kind, place, random.Random(f"{seed} {kind}"), NBYTES)
        for options in OPTIONS:
            for depth in DEPTHS:
                for phase in PHASES:
                    yield Setting(kind, start, options, depth, phase, seed)


def calls_of(setting: Setting, directory: Path) -> list[int]:
    """The kinds of the calls that a life of *setting* makes while its host may fail."""
    _, host = live(setting, Fault(), directory)
    return host.seen


def faults(calls: list[int], at: int) -> Iterator[Fault]:
    """Each way in which call number *at*, of *calls*, can fail.

    With several requests at once another life need not make the same calls: then nothing may fail in it.
    """
    for code in (errno.EIO, errno.ENOSPC) if calls[at - 1] in NEEDS_SPACE else (errno.EIO,):
        for for_good in (False, True):
            yield Fault(code, at, for_good)
