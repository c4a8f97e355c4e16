"""What a word of a command line may be: types for argparse, each of which refuses in one line."""

import argparse
import re
from typing import Any, NoReturn

from qcow2.tool.quantity import parse_size
from ring.virtqueue import QUEUES_MAX
from virtio.config import SERIAL_MAX

POLL_US_MAX = 1000
CACHE_SIZE_MIN, CACHE_SIZE_MAX = 1 << 20, 1 << 40
GROUP_LIMIT = (1 << 32) - 1  # which would mean: leave it


class UsageError(Exception):
    """The command line asks for something impossible; one line says what."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line of ours."""

    def print_help(self, file: Any = None) -> None:
        """Print it. Raises: OSError, which argparse may swallow."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        lacking = message.removeprefix("the following arguments are required: ")
        choices = [each.choices for each in self._actions if each.metavar == lacking != message and each.choices]
        raise UsageError(message + "".join(f", one of {', '.join(each)}" for each in choices))


def path_of(text: str) -> str:
    """A path, which is something."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return text


def fd_of(text: str) -> int:
    """A file descriptor."""
    number = _integer(text, "a file descriptor")
    if number >= 1 << 31:
        raise argparse.ArgumentTypeError(f"{number} is not a file descriptor")
    return number


def mode_of(text: str) -> int:
    """Rights of a file, in octal."""
    if not re.fullmatch("0?[0-7]{3}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an octal mode such as 0660")
    return int(text, 8)


def group_of(text: str) -> int:
    """A group, by name or number."""
    import grp  # few ask for one

    if text.isascii() and text.isdigit() and int(text) < GROUP_LIMIT:
        return int(text)
    try:
        return grp.getgrnam(text).gr_gid
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"there is no group {text!r}") from None


def pause_of(text: str) -> int:
    """Microseconds of looking at the rings."""
    if not text.isdecimal() or int(text) > POLL_US_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of microseconds from 0 to {POLL_US_MAX}")
    return int(text)


def queues_of(text: str) -> int:
    """A number of queues."""
    number = _integer(text, "a number of queues")
    if not 1 <= number <= QUEUES_MAX:
        raise argparse.ArgumentTypeError(f"{number} is not between 1 and {QUEUES_MAX}")
    return number


def serial_of(text: str) -> str:
    """What the guest sees as the disk's serial number."""
    length = len(text.encode(errors="surrogateescape"))
    if length > SERIAL_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} has {length} bytes, the limit is {SERIAL_MAX}")
    return text


def size_of(text: str, example: str) -> int:
    """Bytes of a size as the tool takes it. Raises: ArgumentTypeError with the *example*."""
    try:
        return parse_size(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as {example}") from None


def cache_size_of(text: str) -> int:
    """Bytes of a cache."""
    nbytes = size_of(text, "32M")
    if not CACHE_SIZE_MIN <= nbytes <= CACHE_SIZE_MAX:
        raise argparse.ArgumentTypeError(f"{nbytes} bytes are not between {CACHE_SIZE_MIN} and {CACHE_SIZE_MAX}")
    return nbytes


def _integer(text: str, noun: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not {noun}")
    return int(text)


def options_of(texts: list[str]) -> dict[str, str]:
    """What each `NAME=VALUE,...` says, by its names, as the tool takes it. Raises: UsageError."""
    from qcow2.tool.option import split_options  # which few need

    try:
        return dict(split_options(texts))
    except ValueError as error:
        raise UsageError(str(error)) from error
