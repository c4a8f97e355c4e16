"""`qcow2 convert`: copy disks to a new image, or to one that is there."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from qcow2.driver.pool import PoolDriver
from qcow2.driver.uri import is_nbd
from qcow2.format.layout import MIN_CLUSTER_SIZE
from qcow2.job.blame import CopyFailed
from qcow2.job.content import SPARSE_UNIT
from qcow2.job.copy import Manner, copy
from qcow2.job.source import Source
from qcow2.job.target import LastStep, Target
from qcow2.library.hostfile import is_same_file
from qcow2.library.own_thread import undisturbed
from qcow2.node.formats import FORMATS
from qcow2.node.gate import backing_path
from qcow2.node.node import Node
from qcow2.tool.cache import CACHE_MODES, UNSAFE
from qcow2.tool.failure import Failure, reason_of
from qcow2.tool.identity import is_qemu_img, say
from qcow2.tool.named import Named, add_format_option, add_image_options, named, new_file, present_file
from qcow2.tool.option import asks_for_help, parse_options, print_help, split_options, validate_backing
from qcow2.tool.progress import shown
from qcow2.tool.quantity import size_of
from qcow2.tool.refused import NO_BACKING, once_it_has_begun, unreadable
from qcow2.tool.source import add_snapshot_option, add_source_options, open_base, open_source, wanted_snapshot
from qcow2.tool.target import Wish, new_target, present_target

CONCATENATED = "Having a backing file for the target makes no sense when concatenating multiple input images"
MAX_SPARSE = 16 << 20  # bytes
MAX_WIDTH = 16
MAX_THREADS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `qcow2 convert`."""
    add_format_option(parser, "-f", "--source-format", of="of the sources")
    add_image_options(parser)
    parser.add_argument("-O", "--target-format", metavar="FMT", help="of the target: raw (the default), qcow2 or luks")
    parser.add_argument(
        "--target-image-opts", action="store_true", help="with -n: the target's name is such a list, too"
    )
    parser.add_argument("-o", "--target-format-options", action="append", default=[], metavar="OPTIONS", help="or help")
    parser.add_argument("-n", "--no-create", action="store_true", help="write to an image that is there")
    parser.add_argument("-B", "-b", "--backing", metavar="FILE", help="share with it what the source has from below")
    parser.add_argument("-F", "--backing-format", metavar="FMT", help="its format")
    parser.add_argument("-S", "--sparse-size", metavar="SIZE", help="zeros from so many on are left out; 0: none are")
    parser.add_argument("--target-is-zero", action="store_true", help="with -n: all of it reads as zeros already")
    parser.add_argument("-m", "--parallel", metavar="N", default="8", help="windows at a time")
    parser.add_argument("-W", "--oob-writes", action="store_true", help="the target's file need not be in order")
    parser.add_argument(
        "-C",
        "--copy-range-offloading",
        action="store_true",
        help="let the host copy what it can, and look at none of it",
    )
    parser.add_argument("-r", "--rate-limit", metavar="RATE", help="bytes a second")
    parser.add_argument("-p", "--progress", action="store_true", help="show how far it is")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument("-t", "--target-cache", choices=CACHE_MODES, help="unsafe: what is written is not synced")
    parser.add_argument("-c", "--compress", action="store_true", help="compress what is written")
    parser.add_argument("--compression-level", metavar="N", help="zlib: 1 to 12 (4); zstd: 1 to 19 (3)")
    parser.add_argument("--bitmaps", action="store_true", help="copy the dirty bitmaps, too")
    parser.add_argument("--skip-broken-bitmaps", action="store_true", help="but for those that cannot be used")
    parser.add_argument("--salvage", action="store_true", help="what cannot be read is zeros, and said")
    add_source_options(parser)
    add_snapshot_option(parser)
    parser.add_argument("filenames", nargs="*", metavar="FILE", help="sources, one after the other on one disk; target")


def run_command(arguments: argparse.Namespace) -> int:
    """Copy.

    Raises: Failure, ValueError, OSError, ImageError.
    """
    luks_header = None
    if arguments.target_image_opts:
        luks_header = _name_target(arguments)
    elif arguments.target_format is None:
        arguments.target_format = "raw"
    if asks_for_help(arguments.target_format_options):
        print_help(_known_format(arguments.target_format))
        return 0
    manner = _manner(arguments)
    _validate(arguments)
    if is_qemu_img() and arguments.target_format in FORMATS:
        _refuse_unreadable(dict(split_options(arguments.target_format_options)), arguments.target_format)
    rate = 0 if arguments.rate_limit is None else size_of("rate limit", arguments.rate_limit)
    *paths, name = arguments.filenames
    path = _target_path(name, arguments)
    with ExitStack() as stack:
        snapshot = wanted_snapshot(arguments)
        images = [
            stack.enter_context(open_source(each, arguments, snapshot, needs_all=True))
            for each in (
                named(text, arguments.source_format, arguments.secrets, is_options=arguments.image_opts)
                for text in paths
            )
        ]
        size = sum(image.size for image in images)
        wish = Wish(
            path,
            _known_format(arguments.target_format),
            size,
            _given(arguments),
            arguments.compress,
            _level(arguments),
            arguments.secrets,
            luks_header,
        )
        if is_qemu_img() and wish.image_format == "qcow2" and not arguments.no_create:
            _refuse_in_its_words(wish)
        _validate_compression(wish, arguments)
        if wish.given.get("backing_file") and len(images) > 1:
            raise Failure(CONCATENATED)
        last_step = _bitmaps(wish, images, arguments) if arguments.bitmaps else None
        below = stack.enter_context(_base(wish, arguments))
        is_shared = below is not None and _is_backing_of(below, images[0])
        source = Source.of(*images, tells_below=is_shared, on_loss=_on_loss(arguments))
        target = stack.enter_context(_target(wish, images, below, arguments))
        target.last_step = last_step
        pace = stack.enter_context(shown(is_wanted=arguments.progress and not arguments.quiet, rate=rate))
        syncs = arguments.target_cache != UNSAFE
        driver = stack.enter_context(PoolDriver(min(manner.width, MAX_THREADS), syncs=syncs))
        try:
            undisturbed(lambda: driver.run(copy(source, target, pace, manner, None if is_shared else below)), pace)
        except CopyFailed as failure:
            raise Failure(f"{failure}: {reason_of(failure)}") from failure
    return 0


def _bitmaps(wish: Wish, images: list[Node], arguments: argparse.Namespace) -> LastStep:
    """What makes the bitmaps of the source again in the target, which has the disk. Raises: Failure, OSError."""
    from qcow2.tool.copybitmaps import bitmaps_to_copy, copy_bitmaps

    return partial(copy_bitmaps, bitmaps_to_copy(wish, images, arguments), is_new=not arguments.no_create)


def _name_target(arguments: argparse.Namespace) -> str | None:
    """Take the list of options that names the target apart. -> its LUKS header's file. Raises: Failure."""
    if not arguments.no_create:
        raise Failure("--target-image-opts requires use of -n flag")
    if not arguments.filenames:
        raise Failure("Must specify image file name")
    target = named(arguments.filenames[-1], arguments.target_format, arguments.secrets, is_options=True)
    arguments.filenames[-1], arguments.target_format = target.path, target.image_format
    return target.luks_header


def _target_path(name: str, arguments: argparse.Namespace) -> str:
    """The path that the target's *name* is, or its URI. Raises: Failure."""
    if arguments.target_image_opts or is_nbd(name):
        return name
    return present_file(name) if arguments.no_create else new_file(name)


def _on_loss(arguments: argparse.Namespace) -> Callable[[int, Exception], None] | None:
    """What hears of each sector that cannot be read; None: that is an error."""
    if not arguments.salvage:
        return None
    return (lambda offset, error: None) if arguments.quiet else _warn_of_loss


def _warn_of_loss(offset: int, error: Exception) -> None:
    say(f"warning: error while reading offset {offset}: {getattr(error, 'strerror', None) or error}")


def _known_format(image_format: str) -> str:
    if image_format not in FORMATS:
        raise Failure(f"Unknown file format '{image_format}'")
    return image_format


def _manner(arguments: argparse.Namespace) -> Manner:
    sparse = (
        SPARSE_UNIT
        if arguments.sparse_size is None
        else size_of("buffer size for sparse output", arguments.sparse_size)
    )
    if sparse % 512 or sparse > MAX_SPARSE:
        text = f"Valid sizes are multiples of 512 up to {MAX_SPARSE}. Select 0 to disable sparse detection"
        raise Failure(f"Invalid buffer size for sparse output specified. {text} (fully allocates output).")
    if sparse and arguments.compress:  # each cluster that is zeros is left out, whatever -S says, as in QEMU
        sparse = MIN_CLUSTER_SIZE
    width = int(arguments.parallel) if arguments.parallel.isascii() and arguments.parallel.isdigit() else 0
    if not 1 <= width <= MAX_WIDTH:
        raise Failure(f"Invalid number of coroutines. Allowed number of coroutines is between 1 and {MAX_WIDTH}")
    return Manner(sparse, width, keeps_order=not arguments.oob_writes, offloads=arguments.copy_range_offloading)


def _validate(arguments: argparse.Namespace) -> None:
    if not arguments.filenames:
        raise Failure("Must specify image file name")
    if len(arguments.filenames) < 2:
        raise Failure("Must specify image file name")
    if arguments.snapshot is not None and len(arguments.filenames) > 2:
        raise Failure("No support for concatenating multiple snapshot")
    if arguments.copy_range_offloading and arguments.compress:
        raise Failure("Cannot enable copy offloading when -c is used")
    if arguments.copy_range_offloading and arguments.sparse_size is not None:
        raise Failure("Cannot enable copy offloading when -S is used")
    if arguments.copy_range_offloading and arguments.salvage:
        raise Failure("Cannot use copy offloading in salvaging mode")
    if arguments.target_is_zero and not arguments.no_create:
        raise Failure("--target-is-zero requires use of -n flag")
    if arguments.backing is not None and len(arguments.filenames) > 2:
        raise Failure(CONCATENATED)
    if arguments.skip_broken_bitmaps and not arguments.bitmaps:
        raise Failure("Use of --skip-broken-bitmaps requires --bitmaps")
    if arguments.bitmaps and len(arguments.filenames) > 2:
        raise Failure("Copying bitmaps only possible with single source")
    if arguments.no_create and arguments.target_format_options:
        raise Failure("-o has no effect when skipping image creation")


def _refuse_unreadable(given: dict[str, str], image_format: str) -> None:
    """Raises: Failure for what `qemu-img` has its own words for."""
    if (text := unreadable(given, image_format)) is not None:
        first, _, hint = text.partition("\n")
        raise Failure(first, hint=hint)


def _refuse_in_its_words(wish: Wish) -> None:
    """Raises: Failure for what `qemu-img` has its own words for."""
    if (text := once_it_has_begun(wish.given, wish.size)) is not None:
        raise Failure(f"{wish.path}: error while converting qcow2: {text}")


def _validate_compression(wish: Wish, arguments: argparse.Namespace) -> None:
    if not wish.is_compressed:
        return
    if not FORMATS[wish.image_format].has_metadata:
        raise Failure("Compression not supported for this file format")
    if wish.given.get("preallocation", "off") != "off":
        raise Failure("Compression and preallocation not supported at the same time")


def _level(arguments: argparse.Namespace) -> int | None:
    text: str | None = arguments.compression_level
    if text is None:
        return None
    if not arguments.compress:
        raise Failure("--compression-level requires -c")
    if not (text.isascii() and text.isdigit()):
        raise Failure(f"Invalid compression level '{text}'")
    return int(text)


def _given(arguments: argparse.Namespace) -> dict[str, str]:
    """The options of creation, with what -B and -F say; the size is the source's."""
    given = parse_options(arguments.target_format_options, arguments.target_format)
    given.pop("size", None)
    if arguments.backing is not None:
        given["backing_file"] = arguments.backing
    if arguments.backing_format is not None:
        given["backing_fmt"] = arguments.backing_format
    return given


@contextmanager
def _base(wish: Wish, arguments: argparse.Namespace) -> Iterator[Node | None]:
    """The image that the target is to be over."""
    name, image_format = wish.given.get("backing_file"), wish.given.get("backing_fmt")
    if not name:
        if image_format and not FORMATS[wish.image_format].has_metadata:
            raise Failure(f"Backing file format not supported for file format '{wish.image_format}'")
        if image_format and not arguments.no_create:
            raise Failure(f"{wish.path}: error while converting {wish.image_format}: {NO_BACKING}")
        yield None
        return
    if not FORMATS[wish.image_format].has_metadata:
        raise Failure(f"Backing file not supported for file format '{wish.image_format}'")
    if arguments.no_create:  # what the target is over, and what it has itself, is not ours to say
        yield None
        return
    if not image_format:
        raise Failure("Use of backing file requires explicit backing format")
    validate_backing(name, image_format)
    with open_base(Named(backing_path(wish.path, name), image_format), arguments) as base:
        yield base


def _is_backing_of(base: Node, image: Node) -> bool:
    """Whether *image* is directly over the same file, of the same format."""
    below = image.backing
    return below is not None and type(below) is type(base) and is_same_file(below.file, base.file)


@contextmanager
def _target(wish: Wish, images: list[Node], base: Node | None, arguments: argparse.Namespace) -> Iterator[Target]:
    if arguments.no_create or is_nbd(wish.path):  # which nobody can make from here
        with present_target(wish, images, is_zero=arguments.target_is_zero) as target:
            yield target
        return
    read = [*images, base] if base is not None else images
    with new_target(wish, read, base) as target:
        yield target
