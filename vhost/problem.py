"""What went wrong with an image or its host, on one line."""

from qcow2 import ImageError
from qcow2.error import no_memory
from vhost.held import describe


def problem_of(error: BaseException | None) -> str:
    """What went wrong, on one line; nothing if nothing did."""
    return "" if error is None else refusal_of(no_memory() if isinstance(error, MemoryError) else error)


def refusal_of(error: BaseException) -> str:
    """Why what was asked of the image was not done, on one line."""
    if isinstance(error, OSError | ImageError):
        return describe(error)
    if isinstance(error, ValueError):
        return str(error)
    raise error
