"""The `qcow2` command, shaped like qemu-img: same options, same exit statuses, same JSON."""

import argparse
import os
import re
import sys
from collections.abc import Collection
from importlib import import_module
from typing import Any, NoReturn

from qcow2.error import ImageError
from qcow2.sources import StaleExtension
from qcow2.tool.failure import Failure, UsageError
from qcow2.tool.identity import QEMU_IMG, SPOKEN, is_qemu_img, say
from qcow2.tool.secret import Secrets
from qcow2.tool.stdio import is_of_output, name_output, occupy

COMMANDS = {
    "create": ("create", "make a new image"),
    "info": ("info", "say what an image is"),
    "check": ("check", "check an image, and repair it"),
    "map": ("map", "say where the disk's bytes are"),
    "compare": ("compare", "say whether two images hold the same disk"),
    "measure": ("measure", "say how large a new image will be"),
    "convert": ("convert", "copy disks to another image"),
    "dd": ("dd", "copy a part of a disk to another image"),
    "rebase": ("rebase", "give an image another backing file"),
    "snapshot": ("snapshot", "list, make, go back to and delete internal snapshots"),
    "commit": ("commit", "bring what an overlay has into an image under it"),
    "bitmap": ("bitmap", "make, change, merge and remove dirty bitmaps"),
    "amend": ("amend", "change what an image is, not what its disk holds"),
    "bench": ("bench", "say how long requests over a disk take"),
    "resize": ("resize", "make the disk of an image longer or shorter"),
    "serve-nbd": ("servenbd", "offer a disk to NBD clients"),
    "link-logs": ("logs", "list what killed daemons left in memory"),
    "dump-header": ("dump", "show the header with all its extensions"),
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line of ours; options may stand between positional arguments."""

    _is_intermixing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As GNU getopt takes them, where there are no subcommands."""
        if self._subparsers is not None or self._is_intermixing:
            return super().parse_known_args(args, namespace)
        self._is_intermixing = True
        try:
            found, rest = self.parse_known_intermixed_args(_guarded(args), namespace)
        finally:
            self._is_intermixing = False
        for name, value in vars(found).items():
            setattr(found, name, _bare(value))
        return found, _bare(rest)

    def print_help(self, file: Any = None) -> None:
        """Print it. Raises: OSError, which argparse may swallow."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        if is_qemu_img():
            from qcow2.tool.usage import in_its_words

            raise in_its_words(message, 2 if self.prog.endswith(" compare") else 1)
        raise UsageError(message)


GUARD = "\0"  # at the front of a word after "--", which is no option whatever it looks like; no word can have it


def _guarded(words: list[str]) -> list[str]:
    if "--" not in words:
        return words
    end = words.index("--")
    return words[:end] + [GUARD + word for word in words[end + 1 :]]


def _bare(value: Any) -> Any:
    match value:
        case str():
            return value.removeprefix(GUARD)
        case list():
            return [_bare(each) for each in value]
        case _:
            return value


class Version(argparse.Action):
    """Says which version this is, which takes a while to find out."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print it and exit."""
        import qcow2

        own = f"qcow2 version {qcow2.__version__}"
        print(f"{QEMU_IMG} version {SPOKEN} ({own})" if is_qemu_img() else own)
        parser.exit()


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; the exit status.

    Raises: BrokenPipeError if nobody reads what it prints.
    """
    words = sys.argv[1:] if arguments is None else arguments
    try:
        occupy()
        name_output()
        status = _run(words)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        raise
    except OSError as error:
        if is_of_output(error):
            sys.stdout = None  # Python would try again at exit, and complain itself
        return _complain(_text_of(error))
    except Failure as failure:
        _complain(str(failure))
        if failure.hint:
            print(failure.hint, file=sys.stderr)
        return failure.status
    except UsageError as error:
        _complain(str(error))
        if is_qemu_img():
            print(f"Try '{QEMU_IMG} --help' for more information", file=sys.stderr)
        return 1
    except (ImageError, ValueError, StaleExtension) as error:
        return _complain(str(error))
    except MemoryError:
        return _complain("out of memory")


def _run(words: list[str]) -> int:
    try:
        given = build_parser(words[:1]).parse_args(words)
    except SystemExit:  # the parser has printed what was asked for
        return 0
    given.keys = None
    with Secrets(getattr(given, "object", [])) as given.secrets:
        if given.secrets:
            from qcow2.engine.encryption import Keyring
            from qcow2.plane.cipher import keep_secrets

            keep_secrets()
            given.keys = Keyring(given.secrets.keys)
        status: int = _room(given.command).run_command(given)
        return status


def _room(command: str) -> Any:
    """The module that serves *command*; none of the others is imported, which would take longer than most commands."""
    return import_module(f"qcow2.tool.{COMMANDS[command][0]}")


def build_parser(wanted: Collection[str] = tuple(COMMANDS)) -> Parser:
    """The command line, for the program and its manual; in full for the *wanted* commands only."""
    parser = Parser(prog="qcow2", allow_abbrev=False, description="Create, inspect and repair qcow2 images.")
    parser.add_argument("-V", "--version", action=Version, nargs=0, help="say which version this is")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, (_, caption) in COMMANDS.items():
        parser_of_command = commands.add_parser(name, help=caption, description=caption, allow_abbrev=False)
        if name in wanted:
            _room(name).add_arguments(parser_of_command)
    return parser


def _text_of(error: OSError) -> str:
    reason = error.strerror or str(error)
    return reason if error.filename is None else f"{os.fsdecode(error.filename) or repr('')}: {reason}"


def _complain(text: str) -> int:
    """Say what is wrong on one line, whatever the names in it hold."""
    line = re.sub(r"[\x00-\x1f\x7f]+", " ", text)
    say(line)
    return 1
