"""`qcow2 measure`: how large a new image will be."""

import argparse

from qcow2.driver.file import run
from qcow2.engine.create import Options, plan
from qcow2.format.layout import SECTOR_SIZE
from qcow2.format.snapshot import Choice
from qcow2.job.measure import Measures, size_of_copy, size_of_empty, size_of_raw
from qcow2.node.formats import FORMATS
from qcow2.tool.encryption import encryption_of
from qcow2.tool.failure import Failure
from qcow2.tool.file import print_json
from qcow2.tool.identity import is_qemu_img, program
from qcow2.tool.named import add_format_option, add_image_options, the_image
from qcow2.tool.option import asks_for_help, image_options, parse_options, print_help, split_options
from qcow2.tool.quantity import size_of
from qcow2.tool.refused import unmeasurable, unreadable
from qcow2.tool.source import add_snapshot_option, add_source_options, open_source, wanted_snapshot

UNMEASURABLE = ("file", "nbd", "parallels", "qcow", "qed", "vdi", "vhdx", "vmdk", "vpc")  # which qemu-img knows, too


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `qcow2 measure`."""
    add_format_option(parser, of="of the source")
    add_image_options(parser)
    parser.add_argument("-O", "--target-format", default="raw", metavar="FMT", help="of the new image: raw or qcow2")
    parser.add_argument("-o", "--options", action="append", default=[], metavar="OPTIONS", help="of the new image")
    parser.add_argument("-s", "--size", metavar="SIZE", help="of its disk, if there is no source")
    parser.add_argument("--output", default="human", choices=["human", "json"])
    add_source_options(parser)
    add_snapshot_option(parser)
    parser.add_argument("filename", nargs="*", metavar="FILE", help="the source")


def run_command(arguments: argparse.Namespace) -> int:
    """Print the sizes.

    Raises: Failure, ValueError, OSError, ImageError.
    """
    if any(not text.strip(",") for text in arguments.options):
        raise Failure(f"Invalid option list: {arguments.options[-1]}")
    snapshot = wanted_snapshot(arguments)
    if asks_for_help(arguments.options):
        print_help(arguments.target_format)
        return 0
    if len(arguments.filename) > 1:
        raise Failure("At most one filename argument is allowed.")
    arguments.filename = arguments.filename[0] if arguments.filename else None
    if arguments.filename is None and (arguments.image_opts or arguments.format or arguments.snapshot):
        raise Failure("--image-opts, -f, and -l require a filename argument.")
    if arguments.size is not None and arguments.filename is not None:
        raise Failure("--size N cannot be used together with a filename.")
    if arguments.size is None and arguments.filename is None:
        raise Failure("Either --size N or one filename must be specified.")
    if arguments.target_format in UNMEASURABLE:
        raise Failure(f"Block driver '{arguments.target_format}' does not support size measurement")
    if arguments.target_format not in FORMATS:
        raise Failure(f"Unknown file format '{arguments.target_format}'")
    measures = _measured(arguments, snapshot)
    if arguments.output == "json":
        facts = {} if measures.bitmaps is None else {"bitmaps": measures.bitmaps}
        print_json(facts | {"required": measures.required, "fully-allocated": measures.fully_allocated})
        return 0
    print(f"required size: {measures.required}")
    print(f"fully allocated size: {measures.fully_allocated}")
    if measures.bitmaps is not None:
        print(f"bitmaps size: {measures.bitmaps}")
    return 0


def _measured(arguments: argparse.Namespace, snapshot: str | Choice | None) -> Measures:
    if is_qemu_img() and (text := unreadable(dict(split_options(arguments.options)), arguments.target_format)):
        first, _, hint = text.partition("\n")
        rest = f"{program()}: Invalid options for file format '{arguments.target_format}'"
        raise Failure(first, hint=f"{hint}\n{rest}" if hint else rest)
    given = parse_options(arguments.options, arguments.target_format)
    if arguments.filename is None:
        size = size_of("image size", arguments.size)
        size += -size % SECTOR_SIZE
        if not FORMATS[arguments.target_format].has_metadata:
            return _of_unmapped(size, given, arguments)
        return size_of_empty(_options(given, size, arguments))
    image = the_image(arguments)
    with open_source(image, arguments, snapshot) as source:
        if not FORMATS[arguments.target_format].has_metadata:
            return _of_unmapped(source.size, given, arguments)
        return run(size_of_copy(_options(given, source.size, arguments), source))


def _options(given: dict[str, str], size: int, arguments: argparse.Namespace) -> Options:
    if is_qemu_img() and (text := unmeasurable(given, size)) is not None:
        raise Failure(text)
    options = image_options(given, size, secrets=arguments.secrets)
    if not is_qemu_img():  # which measures some that it refuses to create
        plan(options)
    return options


def _of_unmapped(size: int, given: dict[str, str], arguments: argparse.Namespace) -> Measures:
    encryption = encryption_of(given, arguments.secrets) if FORMATS[arguments.target_format].has_key_slots else None
    return size_of_raw(size + (0 if encryption is None else encryption.nbytes))
