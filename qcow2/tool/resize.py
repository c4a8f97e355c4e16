"""`qcow2 resize`: a longer disk."""

import argparse

from qcow2.driver.file import run
from qcow2.engine.growth import grown_size
from qcow2.format.geometry import Geometry
from qcow2.format.header import Header, read_header, require_uncorrupted
from qcow2.library.disk import open_disk
from qcow2.tool.file import add_log_options, opened
from qcow2.tool.quantity import parse_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `qcow2 resize`."""
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing")
    parser.add_argument("-f", "--format", default="qcow2", choices=["qcow2"], help="of the image")
    parser.add_argument("--shrink", action="store_true", help="not supported: a disk can only grow")
    add_log_options(parser)
    parser.add_argument("filename")
    parser.add_argument(
        "size", metavar="[+]SIZE", help="of the disk, or with + how much longer: bytes, or k, M, G, ..."
    )


def run_command(arguments: argparse.Namespace) -> int:
    """Grow the disk.

    Raises: ValueError, OSError, ImageError; what cannot be done is refused before the image is touched.
    """
    path = arguments.filename
    if arguments.shrink or arguments.size.startswith("-"):
        raise ValueError(f"{path}: shrinking is not supported, a disk can only grow")
    with opened(path) as file:
        header = run(read_header(file, trust_refcounts=False))
        require_uncorrupted(file, header)
        size = grown_size(file, header, _wanted(arguments.size, header))
    log = {"log_directory": arguments.link_log, "discard_log": arguments.discard_link_log}
    with open_disk(path, writable=True, **log) as disk:
        disk.resize(size)
    if not arguments.quiet:
        print("Image resized.")
    return 0


def _wanted(text: str, header: Header) -> int:
    """The size that *text*, absolute or relative to now, names."""
    if text.startswith("+"):
        return Geometry.of(header.record).size + parse_size(text[1:])
    return parse_size(text)
