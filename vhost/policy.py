"""What becomes of a job that an error stops."""

import errno
from enum import StrEnum


class OnError(StrEnum):
    """As QEMU's policies are called."""

    REPORT = "report"  # it fails
    STOP = "stop"  # it is paused, and begun again when it is told to go on
    ENOSPC = "enospc"  # stop where space ran out, else report
    IGNORE = "ignore"  # it is begun again, until it is cancelled


def is_final(policy: OnError, error: Exception) -> bool:
    """Whether a job with *policy* fails of *error*; what is no error of the host fails it in any case."""
    if not isinstance(error, OSError) or policy is OnError.REPORT:
        return True
    return policy is OnError.ENOSPC and error.errno not in (errno.ENOSPC, errno.EDQUOT)
