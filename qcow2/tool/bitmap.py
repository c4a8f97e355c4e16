"""`qcow2 bitmap`: the persistent dirty bitmaps of an image."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qcow2.engine.opened import OpenOptions
from qcow2.error import ImageError
from qcow2.library.bitmaps import Bitmaps
from qcow2.library.disk import Disk
from qcow2.node.chain import Chain
from qcow2.tool.failure import Failure
from qcow2.tool.file import add_log_options, log_of
from qcow2.tool.named import Named, add_format_option, add_image_options, named, the_image
from qcow2.tool.opening import opening
from qcow2.tool.quantity import size_of


class Also(argparse.Action):
    """Keeps the actions in the order in which they were given."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        """Add one, with its value if it has one."""
        namespace.actions = [*namespace.actions, (self.dest, values if isinstance(values, str) else None)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `qcow2 bitmap`."""
    parser.set_defaults(actions=[])
    for name, caption in {
        "add": "make the bitmap",
        "remove": "forget it, also if it cannot be used",
        "remove-all": "forget every bitmap; none is named",
        "clear": "let nothing in it be dirty",
        "enable": "record changes from now on",
        "disable": "record no more",
    }.items():
        parser.add_argument(f"--{name}", action=Also, nargs=0, dest=name, default=argparse.SUPPRESS, help=caption)
    parser.add_argument(
        "--merge",
        action=Also,
        dest="merge",
        default=argparse.SUPPRESS,
        metavar="SOURCE",
        help="add what SOURCE reports",
    )
    parser.add_argument("-g", "--granularity", metavar="SIZE", help="bytes a bit of a new one stands for")
    parser.add_argument("-b", "--source-file", metavar="FILE", help="the image that SOURCE is in")
    parser.add_argument("-F", "--source-format", metavar="FMT", help="of that image")
    add_format_option(parser)
    add_image_options(parser)
    add_log_options(parser)
    parser.add_argument("filename", nargs="?")
    parser.add_argument("bitmap", nargs="?")


def run_command(arguments: argparse.Namespace) -> int:
    """Do to the bitmap what is asked for, one after the other.

    Raises: Failure, ValueError, OSError, ImageError.
    """
    granularity = _validated(arguments)
    is_of_one = any(action != "remove-all" for action, _ in arguments.actions) or not arguments.actions
    if arguments.filename is None or (is_of_one and arguments.bitmap is None):
        raise Failure("Expecting filename and bitmap name")
    if not is_of_one and arguments.bitmap is not None:
        raise Failure("Expecting filename")
    image, name = the_image(arguments, writes=True), arguments.bitmap
    with opened_without_data(image, writable=True, **log_of(arguments)) as disk:
        for action, source in arguments.actions:
            try:
                _act(disk.bitmaps, name, action, source, granularity, arguments)
            except (OSError, ImageError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                raise Failure(f"Operation {action} on bitmap {name} failed: {reason}") from error
    return 0


def _validated(arguments: argparse.Namespace) -> int | None:
    """The granularity, if all options fit together. Raises: Failure."""
    granularity = None if arguments.granularity is None else size_of("granularity", arguments.granularity)
    actions = {action for action, _ in arguments.actions}
    if not actions:
        wanted = "--add, --remove, --remove-all, --clear, --enable, --disable, or --merge"
        raise Failure(f"Need at least one of {wanted}")
    if arguments.granularity is not None and "add" not in actions:
        raise Failure("granularity only supported with --add")
    if arguments.source_file is not None and "merge" not in actions:
        raise Failure("Merge bitmap source file only supported with --merge")
    if arguments.source_format is not None and arguments.source_file is None:
        raise Failure("-F only supported with -b")
    return granularity


@contextmanager
def opened_without_data(image: Named, *, writable: bool, **log: Any) -> Iterator[Disk]:
    """The image, whose data nobody looks at: it needs no key, and nothing under it.

    Raises: OSError, ImageError, Failure.
    """
    with opening(image.path):
        options = OpenOptions(writable=writable, has_data=False, has_below=False)
        disk = Disk.of(Chain(**log), image.path, image.image_format, options)
    with disk:
        yield disk


def _act(
    bitmaps: Bitmaps, name: str, action: str, source: str | None, granularity: int | None, given: argparse.Namespace
) -> None:
    match action:
        case "add":
            bitmaps.add(name, granularity)
        case "remove-all":
            for each in list(bitmaps):
                bitmaps.remove(each.name)
        case "merge" if given.source_file is not None:
            other = named(given.source_file, given.source_format, given.secrets, is_options=given.image_opts)
            with opened_without_data(other, writable=False) as disk:
                bitmaps.merge(name, str(source), disk)
        case "merge":
            bitmaps.merge(name, str(source))
        case _:
            getattr(bitmaps, action)(name)
