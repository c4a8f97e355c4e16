"""What went wrong with the image or the host, on one line."""

from qcow2 import ImageError
from qcow2.error import no_memory


def describe(error: OSError | ImageError) -> str:
    """What is wrong with the image or the host, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
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
