"""`qcow2 rebase`: another backing file; what would show differently through it is copied first."""

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from qcow2.driver.file import run
from qcow2.engine.image import Image
from qcow2.error import ImageError
from qcow2.format.header import header_over
from qcow2.library.disk import Disk, open_disk
from qcow2.library.rebase import bring_over, change_header
from qcow2.node.formats import format_of
from qcow2.node.gate import backing_path
from qcow2.node.node import Node
from qcow2.tool.cache import CACHE_MODES
from qcow2.tool.failure import Failure, UsageError
from qcow2.tool.file import add_log_options, how_to_open, recovered
from qcow2.tool.identity import is_qemu_img
from qcow2.tool.named import Named, add_format_option, add_image_options, the_image
from qcow2.tool.opening import cannot_open, opening
from qcow2.tool.option import validate_backing, validate_backing_format
from qcow2.tool.progress import shown
from qcow2.tool.source import add_source_options, open_base
from qcow2.tool.target import refuse_source, warn_of_bitmaps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `qcow2 rebase`."""
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing")
    parser.add_argument("-p", "--progress", action="store_true", help="show how far it is")
    add_format_option(parser)
    add_image_options(parser)
    parser.add_argument(
        "-u",
        "--unsafe",
        "--backing-unsafe",
        action="store_true",
        help="change the header only, look at no backing file",
    )
    parser.add_argument("-b", "--backing", metavar="FILE", help='the new backing file, "" for none')
    parser.add_argument("-F", "-B", "--backing-format", metavar="FMT", help="its format")
    parser.add_argument("-c", "--compress", action="store_true", help="compress what is copied")
    parser.add_argument("-t", "--cache", choices=CACHE_MODES, help="accepted; the image is synced")
    add_source_options(parser, "--backing-cache")
    add_log_options(parser)
    parser.add_argument("filename")


def run_command(arguments: argparse.Namespace) -> int:
    """Copy what differs, then rewrite the header.

    Raises: UsageError, Failure, ValueError, OSError, ImageError; what the image shows is as before then.
    """
    if arguments.backing is None and not arguments.unsafe:
        raise UsageError("Must specify backing file (-b) or use unsafe mode (-u)")
    if arguments.backing_format is not None:
        validate_backing_format(arguments.backing_format)
    image = the_image(arguments)
    arguments.filename = image.path
    if not format_of(image.path, image.image_format).has_metadata:
        raise Failure(f"Could not change the backing file to '{arguments.backing or ''}': Operation not supported")
    name, backing_format = arguments.backing or None, arguments.backing_format
    if name is None:
        backing_format = None
    elif backing_format is None:
        text = "backing format must be specified" + ("" if is_qemu_img() else ", it is never guessed: -F FMT")
        raise Failure(f"Could not change the backing file to '{name}': {text}")
    else:
        validate_backing(name, backing_format)
    if arguments.unsafe:
        with opening(arguments.filename), recovered(arguments.filename, arguments) as file:
            run(change_header(file, name, backing_format))
    else:
        _rebase_safely(arguments, name, backing_format)
    return 0


def _rebase_safely(arguments: argparse.Namespace, name: str | None, backing_format: str | None) -> None:
    """The image stays locked from the first look to the new header."""
    with ExitStack() as stack:
        disk = stack.enter_context(_opened(arguments))
        image = disk.image
        assert isinstance(image, Image)
        image.refuse_snapshots()
        if arguments.compress:
            image.require_compressible()
        new = None
        if name is not None and backing_format is not None:
            new = stack.enter_context(_new_backing(arguments, name, backing_format))
            refuse_source(arguments.filename, [new])
        header_over(image.file, image.header, name, backing_format)  # refuse what does not fit
        pace = stack.enter_context(shown(is_wanted=arguments.progress and not arguments.quiet))
        bring_over(disk, image, new, pace, is_compressed=arguments.compress)
        run(change_header(image.file, name, backing_format))


@contextmanager
def _opened(arguments: argparse.Namespace) -> Iterator[Disk]:
    """The image, which is closed as ever if something fails."""
    path = arguments.filename
    try:
        disk = open_disk(path, writable=True, **how_to_open(arguments))
    except OSError as error:
        raise Failure(cannot_open(path, error)) from error
    except ImageError as error:
        raise Failure(f"Could not open '{path}': {error}") from error
    warn_of_bitmaps(disk)
    try:
        yield disk
    except BaseException:
        disk.close()
        raise
    disk.abandon()  # it is clean, and its header is not the one it was opened with


@contextmanager
def _new_backing(arguments: argparse.Namespace, name: str, backing_format: str) -> Iterator[Node]:
    path = backing_path(arguments.filename, name)
    with ExitStack() as stack:
        try:
            new = stack.enter_context(open_base(Named(path, backing_format), arguments))
        except Failure as failure:
            text = str(failure).removeprefix(f"Could not open '{path}': ")
            raise Failure(f"Could not open new backing file '{name}': {text}") from failure
        yield new
