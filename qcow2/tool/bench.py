"""`qcow2 bench`: how long requests over a disk take."""

import argparse
import time

from qcow2.driver.pool import PoolDriver
from qcow2.engine.opened import OpenOptions
from qcow2.error import ImageError
from qcow2.job.bench import Load, bench
from qcow2.library.disk import Disk
from qcow2.library.own_thread import undisturbed
from qcow2.node.chain import Chain
from qcow2.tool.cache import CACHE_MODES
from qcow2.tool.failure import Failure, UsageError
from qcow2.tool.file import add_log_options, log_of
from qcow2.tool.named import Named, add_format_option, add_image_options, the_image
from qcow2.tool.opening import in_qemus_words
from qcow2.tool.progress import shown
from qcow2.tool.quantity import parse_size

MAX_COUNT = (1 << 31) - 1
MAX_DEPTH = 1024
MAX_BYTES = 1 << 30  # of buffers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `qcow2 bench`."""
    parser.add_argument("-c", "--count", default="75000", metavar="N", help="requests (75000)")
    parser.add_argument("-d", "--depth", default="64", metavar="N", help="of them at a time (64)")
    add_format_option(parser)
    add_image_options(parser)
    parser.add_argument("-s", "--buffer-size", default="4096", metavar="SIZE", help="of a request (4096)")
    parser.add_argument("-S", "--step-size", metavar="SIZE", help="from one to the next (as its size)")
    parser.add_argument("-o", "--offset", default="0", metavar="SIZE", help="of the first")
    parser.add_argument("-w", "--write", action="store_true", help="write, which destroys what is there")
    parser.add_argument("--pattern", default="0", metavar="BYTE", help="what is written")
    parser.add_argument("--flush-interval", default="0", metavar="N", help="flush after so many writes")
    parser.add_argument("--no-drain", action="store_true", help="do not wait for all requests before a flush")
    parser.add_argument("-i", "--aio", choices=["threads", "native", "io_uring"], help="accepted; threads are used")
    parser.add_argument("-n", "--native", action="store_true", help="accepted, as -i native")
    parser.add_argument("-t", "--cache", choices=CACHE_MODES, help="accepted; the page cache is used")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument("-U", "--force-share", action="store_true", help="read though others may be writing to it")
    add_log_options(parser)
    parser.add_argument("filename", nargs="?")


def run_command(arguments: argparse.Namespace) -> int:
    """Measure.

    Raises: UsageError, Failure, ValueError, OSError, ImageError.
    """
    if arguments.filename is None:
        raise UsageError("Expecting one image file name")
    load = _load(arguments)
    image = the_image(arguments, writes=load.writes)
    if load.writes and arguments.force_share:
        raise Failure(f"Could not open '{image.path}': force-share=on can only be used with read-only images")
    with in_qemus_words(image.path):
        disk = _opened(image, arguments, writable=load.writes)
    with disk:
        if not arguments.quiet:
            print("\n".join(_announced(load)), flush=True)
        with shown(is_wanted=False) as pace, PoolDriver(min(load.depth, 8)) as driver:
            started = time.monotonic()
            try:
                undisturbed(lambda: driver.run(bench(disk.image, load, pace)), pace)
            except (OSError, ImageError) as error:
                raise Failure(f"Failed request: {getattr(error, 'strerror', None) or error}") from error
            took = time.monotonic() - started
    if not arguments.quiet:
        print(f"Run completed in {took:3.3f} seconds.")
    return 0


def _opened(image: Named, arguments: argparse.Namespace, *, writable: bool) -> Disk:
    """Raises: OSError, ImageError."""
    how = {"force_share": arguments.force_share, "luks_header": image.luks_header, **log_of(arguments)}
    options = OpenOptions(writable, keys=arguments.keys)
    return Disk.of(Chain(**how, reaches_exports=True), image.path, image.image_format, options)


def _announced(load: Load) -> list[str]:
    verb = "write" if load.writes else "read"
    lines = [
        f"Sending {load.count} {verb} requests, {load.nbytes} bytes each, {load.depth} in parallel "
        f"(starting at offset {load.offset}, step size {load.step})"
    ]
    return lines + ([f"Sending flush every {load.flush_interval} requests"] if load.flush_interval else [])


def _load(arguments: argparse.Namespace) -> Load:
    count = _number(arguments.count, 1, MAX_COUNT, "Invalid request count specified")
    depth = _number(arguments.depth, 1, MAX_DEPTH, "Invalid queue depth specified")
    nbytes = parse_size(arguments.buffer_size)
    if not 1 <= nbytes <= MAX_BYTES // depth:
        raise Failure(f"Invalid buffer size specified: {nbytes}, limit {MAX_BYTES // depth} with depth {depth}")
    interval = _number(arguments.flush_interval, 0, 1 << 31, "Invalid flush interval specified")
    if interval and not arguments.write:
        raise Failure("--flush-interval is only available in write tests")
    if interval and interval < depth:
        raise Failure("Flush interval can't be smaller than depth")
    return Load(
        count=count,
        depth=depth,
        nbytes=nbytes,
        step=nbytes if arguments.step_size is None else parse_size(arguments.step_size),
        offset=parse_size(arguments.offset),
        writes=arguments.write,
        pattern=_number(arguments.pattern, 0, 0xFF, "Invalid pattern byte specified"),
        flush_interval=interval,
        drains=not arguments.no_drain,
    )


def _number(text: str, low: int, high: int, complaint: str) -> int:
    try:
        number = int(text, 0)
    except ValueError as error:
        raise Failure(complaint) from error
    if not low <= number <= high:
        raise Failure(complaint)
    return number
