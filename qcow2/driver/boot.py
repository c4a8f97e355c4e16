"""Which boot of the host this is, as well as containers with a boot id or a clock of their own let one tell."""

import contextlib
import time
from typing import NamedTuple

UNIT = 4_000_000_000  # nanoseconds: a boot takes longer
UNITS = 1 << 12
NBYTES = 16  # of an id
TOLERANCE = 2_000_000_000  # nanoseconds, between two looks at two clocks


class Boot(NamedTuple):
    """One boot of the host."""

    began: int  # nanoseconds of real time
    id: bytes  # all zeros if it cannot be told

    @property
    def unit(self) -> int:
        """When it began, in units of four seconds, modulo 4096: all that a header has room for."""
        return self.began // UNIT % UNITS

    def is_other_unit(self, unit: int) -> bool:
        """Whether *unit* is of another boot; a clock that was set by more than 8 seconds meanwhile says so, too."""
        return (self.unit - unit + 1) % UNITS > 2

    def is_same(self, other: "Boot") -> bool:
        """Whether both are one, by either witness: a container may have an id of its own, a clock may be set."""
        has_same_id = self.id == other.id and any(self.id)
        return has_same_id or abs(self.began - other.began) <= TOLERANCE


def this_boot() -> Boot:
    """The boot that the host is in."""
    since = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - _offset()
    return Boot(time.time_ns() - since, _id())


def _offset() -> int:
    """What a time namespace adds to the clock."""
    with contextlib.suppress(OSError, ValueError):
        for line in _content("/proc/self/timens_offsets").splitlines():
            name, seconds, nanoseconds = line.split()
            if name in ("boottime", "7"):
                return int(seconds) * 1_000_000_000 + int(nanoseconds)
    return 0


def _id() -> bytes:
    with contextlib.suppress(OSError, ValueError):
        found = bytes.fromhex(_content("/proc/sys/kernel/random/boot_id").strip().replace("-", ""))
        if len(found) == NBYTES:
            return found
    return bytes(NBYTES)


def _content(path: str) -> str:
    with open(path) as file:
        return file.read()
