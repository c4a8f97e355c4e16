"""Who carries out the worker's I/O."""

from enum import Enum


class Aio(Enum):
    """An io_uring, threads of ours, or threads only where no io_uring is to be had. The guarantees are the same.

    It may be forbidden (EPERM, EACCES), half of it (`enter` without `setup`), too old (EINVAL: before Linux 6.1),
    absent (ENOSYS), or over a limit (ENOMEM: of locked memory, before 5.12).
    """

    AUTO = "auto"
    IO_URING = "io_uring"
    THREADS = "threads"
