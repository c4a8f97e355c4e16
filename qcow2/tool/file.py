"""Opening image files for the tool: locked, unless the user says that sharing is fine."""

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from qcow2.driver.file import HostFile
from qcow2.driver.lock import lock_image
from qcow2.driver.memory import DEFAULT_DIRECTORY
from qcow2.engine.recovery import recover


def add_log_options(parser: argparse.ArgumentParser) -> None:
    """Declare what a command that writes to an image needs to know of its link log."""
    parser.add_argument(
        "--link-log",
        metavar="DIR",
        default=DEFAULT_DIRECTORY,
        help=f"where a killed daemon left the log of what was not flushed (default: {DEFAULT_DIRECTORY})",
    )
    parser.add_argument(
        "--discard-link-log", action="store_true", help="lose what is in a log that is missing or does not count"
    )


@contextmanager
def recovered(path: str, arguments: argparse.Namespace) -> Iterator[HostFile]:
    """The image file at *path*, locked for writing, with what a killed daemon left in its link log brought in.

    Raises: OSError, ImageError.
    """
    with opened(path, writable=True) as file:
        recover(file, arguments.link_log, discard=arguments.discard_link_log)
        yield file


def print_json(facts: Any) -> None:
    """Print *facts* as JSON; what is no text in a name becomes U+FFFD there, as with qemu-img."""
    print(json.dumps(as_texts(facts), indent=4))


def as_texts(facts: Any) -> Any:
    """*facts* with names that JSON can hold."""
    match facts:
        case str():
            return facts.encode(errors="surrogateescape").decode(errors="replace")
        case list():
            return [as_texts(each) for each in facts]
        case dict():
            return {key: as_texts(each) for key, each in facts.items()}
        case _:
            return facts


@contextmanager
def opened(path: str, *, writable: bool = False, force_share: bool = False) -> Iterator[HostFile]:
    """The image file at *path*, locked as QEMU would; with *force_share* read it though others may write.

    Raises: OSError, ImageLocked.
    """
    with HostFile.open(path, writable=writable) as file:
        if not force_share:
            lock_image(file.fd, path, writable=writable)
        yield file


@contextmanager
def created(path: str) -> Iterator[HostFile]:
    """The file at *path*, made if there is none, locked, with its old content; after an error a new one is gone again.

    Raises: OSError, ImageLocked.
    """
    is_new = not os.path.lexists(path)
    try:
        if is_new:
            _make(path)
        with opened(path, writable=True) as file:
            yield file
    except _ElsewhereMade as error:
        raise error.cause from None
    except BaseException:
        if is_new:
            with suppress(FileNotFoundError):
                os.unlink(path)
        raise


class _ElsewhereMade(Exception):
    """Somebody else has made the file meanwhile: it is not ours to remove."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(cause)
        self.cause = cause


def _make(path: str) -> None:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))
    except FileExistsError as error:
        raise _ElsewhereMade(error) from error
