"""`qcow2 resize`: a longer disk, or a shorter one."""

import argparse
import re

from qcow2.driver.file import HostFile, run
from qcow2.engine.growth import grown_size
from qcow2.engine.plain import Preallocation
from qcow2.engine.shedding import shrunk_size
from qcow2.format.header import read_header, require_uncorrupted
from qcow2.format.layout import SECTOR_SIZE
from qcow2.library.disk import open_disk
from qcow2.library.hostfile import opened
from qcow2.node.chain import outline
from qcow2.node.formats import format_of
from qcow2.tool.failure import Failure, UsageError
from qcow2.tool.file import add_log_options, how_to_open
from qcow2.tool.identity import is_qemu_img, say
from qcow2.tool.named import Named, add_format_option, add_image_options, the_image
from qcow2.tool.opening import opening
from qcow2.tool.option import PREALLOCATIONS
from qcow2.tool.quantity import parse_size
from qcow2.tool.refused import ANY_SIZE

LESS = re.compile(r"-\d[\d.]*[bkmgtpe]?$", re.ASCII | re.IGNORECASE)
WARNING = (
    "warning: Shrinking an image will delete all data beyond the shrunken image's end. "
    "Before performing such an operation, make sure there is no important data there."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `qcow2 resize`."""
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing")
    add_format_option(parser)
    add_image_options(parser)
    parser.add_argument("--shrink", action="store_true", help="let the disk become shorter: its end is lost")
    parser.add_argument("--preallocation", metavar="MODE", default="off", help="of what is new: off, metadata, ...")
    add_log_options(parser)
    parser._negative_number_matcher = LESS  # no option is like it
    parser.add_argument("filename", nargs="?")
    parser.add_argument(
        "size",
        nargs="?",
        metavar="[+|-]SIZE",
        help="of the disk, or with a sign how much more or less: bytes, k, M, ...",
    )


def run_command(arguments: argparse.Namespace) -> int:
    """Change the size of the disk.

    Raises: UsageError, Failure, ValueError, OSError, ImageError; what cannot be done is refused before the image is
    touched.
    """
    if arguments.filename is None or arguments.size is None:
        raise UsageError("Not enough arguments")
    if arguments.preallocation not in PREALLOCATIONS:
        raise Failure(f"Invalid preallocation mode '{arguments.preallocation}'")
    preallocation = PREALLOCATIONS[arguments.preallocation]
    image = the_image(arguments, writes=True)
    with opening(image.path):
        size = _validated(image, arguments, preallocation)
    how = {"format": image.image_format, "luks_header": image.luks_header, **how_to_open(arguments)}
    with open_disk(image.path, writable=True, **how) as disk:
        disk.resize(size, shrink=arguments.shrink, preallocation=preallocation)
    if not arguments.quiet:
        print("Image resized.")
    return 0


def _validated(image: Named, arguments: argparse.Namespace, preallocation: Preallocation) -> int:
    """The size to be; without a lock that lasts, so that the image can be repaired after."""
    with opened(image.path) as file:
        old = outline(image.path, image.image_format, image.luks_header).size
        size = _wanted(arguments.size, old)
        has_metadata = format_of(image.path, image.image_format).has_metadata
        if has_metadata:
            _require_fit_for_image(file, old, size)
        elif size < old and arguments.shrink and file.is_device:
            raise Failure("Cannot resize device files")
        elif size > old and preallocation is Preallocation.METADATA:
            raise Failure("Unsupported preallocation mode: metadata")
    if size <= old and preallocation is not Preallocation.OFF:
        raise Failure("Preallocation can only be used for growing images")
    if size < old and not arguments.shrink:
        say("Use the --shrink option to perform a shrink operation.")
        raise Failure(WARNING)
    if has_metadata and size % SECTOR_SIZE:
        raise Failure(f"The new size must be a multiple of {SECTOR_SIZE}")
    return size


def _require_fit_for_image(file: HostFile, old: int, size: int) -> None:
    header = run(read_header(file, trust_refcounts=False))
    require_uncorrupted(file, header)
    if is_qemu_img() and header.record.nb_snapshots and header.record.version < 3:
        raise Failure("Can't resize a v2 image which has snapshots")
    (shrunk_size if size < old else grown_size)(file, header, size)


def _wanted(text: str, old: int) -> int:
    """The size that *text*, absolute or relative to *old*, names."""
    try:
        change = parse_size(text[1:].removeprefix("+") if text[:1] in ("+", "-") else text)
    except ValueError as error:
        if not is_qemu_img():
            raise
        first, _, hint = ANY_SIZE.format("size").partition("\n")
        raise Failure(first, hint=hint) from error
    size = change if text[:1] not in ("+", "-") else old + change if text[0] == "+" else old - change
    if size <= 0:
        raise Failure("New image size must be positive")
    return size
