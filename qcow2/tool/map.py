"""`qcow2 map`: which image of a chain holds each part of the disk, and where."""

import argparse
from collections.abc import Iterable, Iterator
from itertools import chain

from qcow2.driver.file import BlockingDriver
from qcow2.engine.opened import OpenOptions
from qcow2.node.chain import Chain
from qcow2.node.extent import Extent, extents_of
from qcow2.tool.failure import Failure
from qcow2.tool.identity import is_qemu_img
from qcow2.tool.named import add_format_option, add_image_options, the_image
from qcow2.tool.opening import opening
from qcow2.tool.quantity import size_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `qcow2 map`."""
    add_format_option(parser)
    add_image_options(parser)
    parser.add_argument("--output", default="human", choices=["human", "json"])
    parser.add_argument("-s", "--start-offset", default="0", metavar="SIZE", help="where to begin")
    parser.add_argument("-l", "--max-length", metavar="SIZE", help="how much to map")
    parser.add_argument("-U", "--force-share", action="store_true", help="though others may be writing to it")
    parser.add_argument("filename")


def run_command(arguments: argparse.Namespace) -> int:
    """Print the map of the disk.

    Raises: OSError, ImageError, ValueError.
    """
    wanted = the_image(arguments)
    start = size_of("start offset", arguments.start_offset)
    length = None if arguments.max_length is None else size_of("max length", arguments.max_length)
    with Chain(force_share=arguments.force_share, luks_header=wanted.luks_header, reaches_exports=True) as files:
        with opening(wanted.path):
            image = files.open(wanted.path, wanted.image_format, OpenOptions(has_data=False))
        end = image.size if length is None else min(image.size, start + length)
        driver = BlockingDriver()
        extents = extents_of(image, start, end, lambda begin: driver.run(begin()))
        if arguments.output == "json":
            nothing = Extent(start, 0, 0, image.file, False, False, False, False, None)
            first = next(extents, nothing)
            _print_json(chain((first,), extents))
        else:
            _print_table(extents)
    return 0


WORDS = ("false", "true")  # of JSON


def _print_json(extents: Iterable[Extent]) -> None:
    """One line an extent, of which there is one at least; keys in qemu-img's order."""
    lead = "["
    for extent in extents:
        start, nbytes, depth, _, is_present, is_zero, is_data, is_compressed, host_offset = extent
        place = "" if host_offset is None else f', "offset": {host_offset}'
        print(
            f'{lead}{{ "start": {start}, "length": {nbytes}, "depth": {depth}, "present": {WORDS[is_present]}, '
            f'"zero": {WORDS[is_zero]}, "data": {WORDS[is_data]}, "compressed": {WORDS[is_compressed]}{place}}}',
            end="",
        )
        lead = ",\n"
    print("]")


def _print_table(extents: Iterator[Extent]) -> None:
    """Only what can be read from the file as it is. Raises: Failure at what cannot."""
    print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
    for extent in extents:
        if not extent.is_data or extent.is_zero:
            continue
        start, host_offset = extent.guest_offset, extent.host_offset
        if host_offset is None:
            hint = "" if is_qemu_img() else f"the first is at {start:#x}: use --output=json"
            raise Failure("File contains external, encrypted or compressed clusters.", hint=hint)
        print(f"{_hex(start):<16}{_hex(extent.nbytes):<16}{_hex(host_offset):<16}{extent.file.path}")


def _hex(number: int) -> str:
    return f"{number:#x}" if number else "0"
