"""What is said when an image cannot be opened."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from qcow2.error import ImageError, UnknownFeatures
from qcow2.lock import ImageLocked
from qcow2.tool.failure import Failure
from qcow2.tool.identity import is_qemu_img
from qcow2.tool.stdio import is_of_output

NO_QCOW2 = "not a qcow2 image"


@contextmanager
def opening(path: str) -> Iterator[None]:
    """What goes wrong in this block is said as `qemu-img` says that it cannot open the image at *path*, if we are that.

    Raises: Failure; else whatever it is.
    """
    if not is_qemu_img():
        yield
        return
    with in_qemus_words(path):
        yield


@contextmanager
def in_qemus_words(path: str) -> Iterator[None]:
    """What goes wrong in this block is said as QEMU says that it cannot open the image at *path*. Raises: Failure."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        if is_of_output(error):
            raise
        raise Failure(cannot_open(path, error)) from error
    except UnknownFeatures as error:
        rest = [f"Unknown incompatible feature: {error.nameless:x}"] if error.nameless else []
        raise Failure(
            f"Could not open '{path}': Unsupported qcow2 feature(s): {', '.join(error.names + rest)}"
        ) from error
    except ImageError as error:
        reason = str(error).removeprefix(f"{path}: ")
        if is_qemu_img():
            reason = _in_its_words(reason)
        raise Failure(f"Could not open '{path}': {reason}") from error


def _in_its_words(reason: str) -> str:
    """What is wrong with an image as `qemu-img` says it, where scripts are known to read that."""
    if reason.startswith(NO_QCOW2):
        return "Image is not in qcow2 format"
    if match := re.fullmatch(r"l1_size \d+, a disk of \d+ bytes needs (\d+)", reason):
        return "Image is too big" if int(match[1]) >= 1 << 31 else "L1 table is too small"
    return reason


def cannot_open(path: str, error: OSError) -> str:
    """As QEMU says it: the file of the image may be another one of the chain."""
    if not path:
        return f"'': {error.strerror}"
    if is_qemu_img() and isinstance(error, IsADirectoryError):
        return f"Could not open '{path}': 'file' driver requires '{error.filename or path}' to be a regular file"
    reason = f"Could not open '{error.filename or path}': {error.strerror or error}"
    return reason if isinstance(error, ImageLocked) else f"Could not open '{path}': {reason}"
