"""What a job may be asked for, how it may stand with it, and what becomes of one that an error stops."""

import errno
from enum import StrEnum

COPY_FORMATS = ("qcow2", "raw")  # of backups and mirrors


class State(StrEnum):
    """How it stands with a job; the last three are for good."""

    RUNNING = "running"
    READY = "ready"  # all is done but what it is told to finish with
    PAUSED = "paused"  # until it is told to go on
    WAITING = "waiting"  # for the disk, which is not held, or not now
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED = (State.COMPLETED, State.FAILED, State.CANCELLED)


class OnError(StrEnum):
    """As QEMU's policies are called."""

    REPORT = "report"  # it fails
    STOP = "stop"  # it is paused, and begun again when it is told to go on
    ENOSPC = "enospc"  # stop where space ran out, else report
    IGNORE = "ignore"  # it is begun again, until it is cancelled


class BitmapMode(StrEnum):
    """What a bitmap forgets of what a backup has copied, as QEMU calls it."""

    ON_SUCCESS = "on-success"  # all of it, once the backup is whole
    NEVER = "never"  # nothing


def is_final(policy: OnError, error: Exception) -> bool:
    """Whether a job with *policy* fails of *error*; what is no error of the host fails it in any case."""
    if not isinstance(error, OSError) or policy is OnError.REPORT:
        return True
    return policy is OnError.ENOSPC and error.errno not in (errno.ENOSPC, errno.EDQUOT)
