"""`qcow2 rebase -u`: another backing file in the header, and nothing else."""

import argparse

from qcow2.driver.file import run
from qcow2.header import clear_autoclear, pack_header, read_header, require_uncorrupted, rewrite_header
from qcow2.layout import Autoclear
from qcow2.operation import File
from qcow2.tool.file import add_log_options, recovered
from qcow2.tool.option import validate_backing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `qcow2 rebase`."""
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing")
    parser.add_argument("-f", "--format", default="qcow2", choices=["qcow2"], help="of the image")
    parser.add_argument("-u", "--unsafe", action="store_true", help="change the header only, which is all there is yet")
    parser.add_argument("-b", "--backing", metavar="FILE", required=True, help='the new backing file, "" for none')
    parser.add_argument("-F", "--backing-format", metavar="FMT", help="its format")
    add_log_options(parser)
    parser.add_argument("filename")


def run_command(arguments: argparse.Namespace) -> int:
    """Rewrite the header.

    Raises: ValueError, OSError, ImageError; the image is untouched then.
    """
    name, backing_format = arguments.backing or None, arguments.backing_format
    if not arguments.unsafe:
        raise ValueError(f"{arguments.filename}: rebase without -u, which would copy data, is not supported")
    if name is None:
        backing_format = None
    elif backing_format is None:
        raise ValueError(f"backing file {name!r} needs its format, which is never guessed: -F FMT")
    else:
        validate_backing(name, backing_format)
    with recovered(arguments.filename, arguments) as file:
        run(_rebase(file, name, backing_format))
    return 0


async def _rebase(file: File, name: str | None, backing_format: str | None) -> None:
    header = await read_header(file)
    require_uncorrupted(file, header)
    pack_header(file, header.with_backing(name, backing_format))  # refuse what does not fit before anything is written
    # Bitmaps stay true: no cluster changes. What else promises something, we cannot know.
    header = await clear_autoclear(file, header, maintained=Autoclear.BITMAPS)
    await rewrite_header(file, header.with_backing(name, backing_format))
