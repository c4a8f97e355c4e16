"""What a copy could not do, and where."""

from collections.abc import Iterator
from contextlib import contextmanager

from qcow2.error import ImageError

WRITING = "writing at byte"


class CopyFailed(Exception):
    """What could not be done, and where on the disk, in qemu-img's words; the cause says why."""


@contextmanager
def blamed(what: str, offset: int) -> Iterator[None]:
    """Raises: CopyFailed for whatever goes wrong in the block."""
    try:
        yield
    except (OSError, ImageError) as error:
        raise CopyFailed(f"error while {what} {offset}") from error
