"""A host that fails: one system call of the daemon on its image, counted from when it is armed, once or for good."""

import ctypes
import errno
import mmap
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

READ, WRITE, SYNC, PUNCH, RESERVE, RESIZE, AHEAD, CLOSE = range(1, 9)  # enum kind of host.c
NAMES = ("nothing", "read", "write", "sync", "punch", "reserve", "resize", "write ahead", "close")
NEEDS_SPACE = (WRITE, RESERVE, RESIZE)
KINDS_MAX = 65536
NEVER = 1 << 60


class Told(ctypes.Structure):
    """struct told of host.c."""

    _fields_ = (
        ("device", ctypes.c_uint64),
        ("inode", ctypes.c_uint64),
        ("at", ctypes.c_uint64),
        ("place", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("code", ctypes.c_int32),
        ("for_good", ctypes.c_int32),
        ("armed", ctypes.c_int32),
        ("hit", ctypes.c_int32),
        ("seen", ctypes.c_uint64),
        ("kinds", ctypes.c_uint8 * KINDS_MAX),
    )


@dataclass(frozen=True)
class Fault:
    """Call number *at* fails with *code*, and if *for_good* those of its kind after it."""

    code: int = errno.EIO
    at: int = NEVER
    for_good: bool = False

    def __str__(self) -> str:
        return f"{errno.errorcode[self.code]}{' for good' if self.for_good else ''} at call {self.at}"


@cache
def library() -> Path:
    """host.c, compiled."""
    built = Path(mkdtemp(prefix="realfault-")) / "host.so"
    source = Path(__file__).with_name("host.c")
    command = ["cc", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-o", built, source, "-ldl"]
    subprocess.run(command, check=True)
    return built


class Host:
    """Where a daemon under `under` works; a fault strikes while it is armed."""

    def __init__(self, image: Path, fault: Fault, told: Path) -> None:
        told.write_bytes(bytes(ctypes.sizeof(Told)))
        with told.open("r+b") as file:
            self._told = Told.from_buffer(mmap.mmap(file.fileno(), 0))
        status = image.stat()
        self._told.device, self._told.inode = status.st_dev, status.st_ino
        self._told.at, self._told.code, self._told.for_good = fault.at, fault.code, fault.for_good
        self.fault = fault
        self.under = ("env", f"LD_PRELOAD={library()}", f"FAILING_HOST={told}")

    def arm(self, armed: bool = True) -> None:
        self._told.armed = armed

    def aim(self, count: int) -> None:
        """Let the fault strike at the call after the next *count*, those that are not armed left out."""
        self._told.at = self._told.seen + count + 1
        self._told.hit = 0

    def aim_at(self, place: range) -> None:
        """Let the fault strike at the next write that begins at these bytes, whatever comes before it."""
        self._told.place, self._told.end = place.start, place.stop
        self._told.hit = 0

    @property
    def hit(self) -> int:
        """The kind of call that has failed; 0: none."""
        return int(self._told.hit)

    @property
    def seen(self) -> list[int]:
        """The kinds of all calls that could have failed, in order."""
        return list(self._told.kinds[: self._told.seen])
