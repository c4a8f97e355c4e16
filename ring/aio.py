"""How a worker runs: who carries out its I/O, and how long it looks for more of it."""

from dataclasses import dataclass
from enum import Enum


class Aio(Enum):
    """An io_uring, threads of ours, or threads only where no io_uring is to be had. The guarantees are the same.

    It may be forbidden (EPERM, EACCES), half of it (`enter` without `setup`), too old (EINVAL: before Linux 6.1),
    absent (ENOSYS), or over a limit (ENOMEM: of locked memory, before 5.12).
    """

    AUTO = "auto"
    IO_URING = "io_uring"
    THREADS = "threads"


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """How a worker runs."""

    aio: Aio = Aio.AUTO
    poll_us: int = 0  # look at the rings for up to so long before the thread sleeps, as long as that pays off


PLAIN = WorkerOptions()
