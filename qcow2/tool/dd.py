"""`qcow2 dd`: copy a part of a disk to a new image."""

import argparse
import sys
from contextlib import ExitStack

from qcow2.driver.pool import PoolDriver
from qcow2.format.layout import SECTOR_SIZE
from qcow2.job.blame import CopyFailed
from qcow2.job.copy import Manner, copy
from qcow2.job.crew import WIDTH
from qcow2.job.pace import Pace
from qcow2.job.source import Part, Source
from qcow2.node.formats import FORMATS
from qcow2.tool.failure import Failure, reason_of
from qcow2.tool.identity import say
from qcow2.tool.named import add_format_option, add_image_options, named, new_file
from qcow2.tool.quantity import size_between
from qcow2.tool.source import add_source_options, open_source
from qcow2.tool.target import Wish, new_target

OPERANDS = ("if", "of", "bs", "count", "skip")
MAX_BLOCK, MAX_NUMBER = (1 << 31) - 1, sys.maxsize
DEFAULT_BLOCK = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `qcow2 dd`."""
    add_format_option(parser, of="of the source")
    add_image_options(parser)
    parser.add_argument(
        "-O", "--output-format", default="raw", metavar="FMT", help="of the target: raw (the default) or qcow2"
    )
    add_source_options(parser)
    parser.add_argument(
        "operands",
        nargs="*",
        metavar="OPERAND",
        help="if=FILE of=FILE, bs=SIZE of a block, count=N blocks from the start of the disk, less skip=N of them",
    )


def run_command(arguments: argparse.Namespace) -> int:
    """Copy.

    Raises: Failure, ValueError, OSError, ImageError.
    """
    given = _operands(arguments.operands)
    if "if" not in given or "of" not in given:
        raise Failure("Must specify both input and output files")
    if arguments.output_format not in FORMATS:
        raise Failure("Unknown file format")
    block = size_between("bs", given.get("bs", str(DEFAULT_BLOCK)), 1, MAX_BLOCK)
    count = size_between("count", given.get("count", str(MAX_NUMBER)), 0, MAX_NUMBER)
    skip = size_between("skip", given.get("skip", "0"), 0, MAX_NUMBER) * block
    with ExitStack() as stack:
        wanted = named(given["if"], arguments.format, arguments.secrets, is_options=arguments.image_opts)
        image = stack.enter_context(open_source(wanted, arguments, needs_all=True))
        end = min(image.size, count * block)
        if skip > end:
            say(f"{given['if']}: cannot skip to specified offset")
        nbytes = max(0, end - skip)
        path, size = new_file(given["of"]), nbytes + -nbytes % SECTOR_SIZE
        wish = Wish(path, arguments.output_format, size, {}, secrets=arguments.secrets)
        target = stack.enter_context(new_target(wish, [image], None))
        driver = stack.enter_context(PoolDriver(WIDTH))
        try:
            driver.run(copy(Source([Part(image, skip, nbytes)]), target, Pace(), Manner()))
        except CopyFailed as failure:
            what = "writing to output" if "writing" in str(failure) else "reading from input"
            raise Failure(f"error while {what} image file: {reason_of(failure)}") from failure
    return 0


def _operands(words: list[str]) -> dict[str, str]:
    given = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in OPERANDS:
            raise Failure(f"unrecognized operand {name}")
        given[name] = value
    return given
