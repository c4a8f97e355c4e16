"""What went wrong with the image or the host, on one line."""

import errno

from qcow2 import ImageError
from qcow2.error import no_memory


def describe(error: OSError | ImageError) -> str:
    """What is wrong with the image or the host, on one line."""
    if isinstance(error, OSError) and error.strerror:
        is_of_second = error.errno == errno.EEXIST and error.filename2 is not None  # of a link, which is to have it
        name = error.filename2 if is_of_second else error.filename
        return error.strerror if name is None else f"{name}: {error.strerror}"
    return str(error)


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
