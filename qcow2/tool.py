"""The `qcow2` command, shaped like qemu-img: same options, same exit statuses, same JSON."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from qcow2 import tool_check, tool_create, tool_dump, tool_info, tool_map, tool_rebase, tool_resize
from qcow2.error import ImageError

COMMANDS = {
    "create": (tool_create, "make a new image"),
    "info": (tool_info, "say what an image is"),
    "check": (tool_check, "check an image, and repair it"),
    "map": (tool_map, "say where the disk's bytes are"),
    "rebase": (tool_rebase, "give an image another backing file"),
    "resize": (tool_resize, "make the disk of an image longer"),
    "dump-header": (tool_dump, "show the header with all its extensions"),
}


class UsageError(Exception):
    """The command line makes no sense; one line says what."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line of ours."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; the exit status."""
    try:
        given = build_parser().parse_args(arguments)
        command: Callable[[argparse.Namespace], int] = COMMANDS[given.command][0].run_command
        status = command(given)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        return _end_quietly()
    except OSError as error:
        return _complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (UsageError, ImageError, ValueError) as error:
        return _complain(str(error))


def build_parser() -> Parser:
    """The command line, for the program and its manual."""
    parser = Parser(prog="qcow2", allow_abbrev=False, description="Create, inspect and repair qcow2 images.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, (room, caption) in COMMANDS.items():
        room.add_arguments(commands.add_parser(name, help=caption, description=caption, allow_abbrev=False))
    return parser


def _complain(text: str) -> int:
    """Say what is wrong on one line."""
    line = " ".join(text.split())
    print(f"qcow2: {line.encode(errors='backslashreplace').decode()}", file=sys.stderr)
    return 1


def _end_quietly() -> int:
    """Whoever read our output has gone; nothing is left to be written at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
