"""`qcow2 compare`: do two images hold the same disk."""

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from qcow2.driver.pool import PoolDriver
from qcow2.error import ImageError
from qcow2.job.compare import Difference, Found, ReadFailed, compare
from qcow2.job.pace import Pace
from qcow2.node.node import Node
from qcow2.tool.failure import Failure, UsageError
from qcow2.tool.named import add_format_option, add_image_options, named
from qcow2.tool.progress import shown
from qcow2.tool.source import add_source_options, open_source
from qcow2.tool.stdio import OUTPUT, is_of_output

DIFFERENT, CANNOT_OPEN, NO_STATUS, CANNOT_READ = 1, 2, 3, 4  # exit statuses; 0: identical


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `qcow2 compare`."""
    add_format_option(parser, "-f", "--a-format", of="of the first")
    add_format_option(parser, "-F", "--b-format", of="of the second")
    add_image_options(parser)
    parser.add_argument("-s", "--strict", action="store_true", help="compare sizes and kinds of extents, too")
    parser.add_argument("-p", "--progress", action="store_true", help="show how far it is")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    add_source_options(parser, "--cache")
    parser.add_argument("filenames", nargs="*", metavar="FILE")


def run_command(arguments: argparse.Namespace) -> int:
    """Compare; 0 the disks are identical, 1 they differ, above that it could not be told.

    Raises: UsageError, Failure.
    """
    if len(arguments.filenames) != 2:
        raise UsageError("Expecting two image file names")
    formats = arguments.a_format, arguments.b_format
    with ExitStack() as stack:
        try:
            one, other = (
                stack.enter_context(open_source(image, arguments, needs_all=True))
                for image in (
                    named(text, image_format, arguments.secrets, is_options=arguments.image_opts)
                    for text, image_format in zip(arguments.filenames, formats, strict=True)
                )
            )
        except Failure as failure:
            raise Failure(str(failure), CANNOT_OPEN) from failure
        with _output(), shown(is_wanted=arguments.progress and not arguments.quiet) as pace:
            lines, status = _compared(one, other, pace, is_strict=arguments.strict)
            if not arguments.quiet:
                print("\n".join(lines), flush=True)
    return status


@contextmanager
def _output() -> Iterator[None]:
    """Raises: Failure if what is printed in this block does not fit: 1 would say that the disks differ."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        if not is_of_output(error):
            raise
        raise Failure(f"{OUTPUT}: {error.strerror}", NO_STATUS) from error


def _compared(one: Node, other: Node, pace: Pace, *, is_strict: bool) -> tuple[list[str], int]:
    """What is to be said, and the status."""
    if one.size != other.size and is_strict:
        return ["Strict mode: Image size mismatch!"], DIFFERENT
    difference = _run(one, other, pace, is_strict=is_strict)
    end = min(one.size, other.size)
    lines = []
    if one.size != other.size and (difference is None or difference.guest_offset >= end):
        lines.append("Warning: Image size mismatch!")
    match difference:
        case None:
            return [*lines, "Images are identical."], 0
        case Difference(Found.STATUS, offset):
            return [*lines, f"Strict mode: Offset {offset} block status mismatch!"], DIFFERENT
        case Difference(_, offset):
            return [*lines, f"Content mismatch at offset {offset}!"], DIFFERENT


def _run(one: Node, other: Node, pace: Pace, *, is_strict: bool) -> Difference | None:
    with PoolDriver(nthreads=4) as driver:
        try:
            return driver.run(compare(one, other, pace, is_strict=is_strict))
        except ReadFailed as failure:
            reason = getattr(failure.__cause__, "strerror", failure.__cause__)
            text = f"Error while reading offset {failure.guest_offset} of {failure.path}: {reason}"
            raise Failure(text, CANNOT_READ) from failure
        except (OSError, ImageError) as error:
            if is_of_output(error):
                raise
            raise Failure(str(error), NO_STATUS) from error
