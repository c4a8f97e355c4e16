"""Who carries out the worker's I/O."""

import errno
from enum import Enum

# How a kernel, a seccomp filter or a security module says that io_uring is not to be had (EINVAL: before Linux 6.1).
FORBIDDEN = frozenset({errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EINVAL})


class Aio(Enum):
    """An io_uring, threads of ours, or threads only where io_uring is forbidden. The guarantees are the same."""

    AUTO = "auto"
    IO_URING = "io_uring"
    THREADS = "threads"
