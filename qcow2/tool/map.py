"""`qcow2 map`: which image of a chain holds each part of the disk, and where."""

import argparse
import errno
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from qcow2.chain import Chain
from qcow2.driver.file import BlockingDriver, HostFile
from qcow2.format import FORMATS
from qcow2.image import Image, OpenOptions
from qcow2.l2cache import Kind
from qcow2.quantity import parse_size
from qcow2.raw import RawImage
from qcow2.tool.file import as_texts

MAX_STEP = 1 << 40  # bytes asked for at once


@dataclass(frozen=True, slots=True)
class Extent:
    """A stretch of the disk that is the same in every respect."""

    start: int
    length: int
    depth: int  # 0 is the image itself
    present: bool
    zero: bool
    data: bool
    offset: int | None  # in the file, where the bytes are there as they are
    path: str

    def joins(self, later: "Extent") -> bool:
        """Whether *later*, which follows, is more of the same."""
        offset = None if self.offset is None else self.offset + self.length
        return replace(self, start=later.start, length=later.length, offset=offset) == later


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `qcow2 map`."""
    parser.add_argument("-f", "--format", default="qcow2", choices=FORMATS, help="of the image; never guessed")
    parser.add_argument("--output", default="human", choices=["human", "json"])
    parser.add_argument("-s", "--start-offset", default="0", metavar="SIZE", help="where to begin")
    parser.add_argument("-l", "--max-length", metavar="SIZE", help="how much to map")
    parser.add_argument("-U", "--force-share", action="store_true", help="though others may be writing to it")
    parser.add_argument("filename")


def run_command(arguments: argparse.Namespace) -> int:
    """Print the map of the disk.

    Raises: OSError, ImageError, ValueError.
    """
    start = parse_size(arguments.start_offset)
    length = None if arguments.max_length is None else parse_size(arguments.max_length)
    with Chain(force_share=arguments.force_share) as chain:
        image = chain.open(arguments.filename, arguments.format, OpenOptions())
        end = image.size if length is None else min(image.size, start + length)
        extents = merged(walk(image, start, end))
        if arguments.output == "json":
            _print_json(extents)
        else:
            _print_table(arguments.filename, extents)
    return 0


def walk(image: Image | RawImage, start: int, end: int) -> Iterator[Extent]:
    """The extents of the disk from *start* to *end*, in small pieces."""
    driver = BlockingDriver()
    while start < end:
        extent = _look(driver, image, 0, start, min(end - start, MAX_STEP))
        yield extent
        start += extent.length


def _look(driver: BlockingDriver, image: Image | RawImage, depth: int, start: int, nbytes: int) -> Extent:
    """What is at *start*, as far as it goes without a change in *image* or under it."""
    if isinstance(image, RawImage):
        return _look_at_raw(image, depth, start, nbytes)
    found = driver.run(image.resolve(start, nbytes))
    length, path = min(found.nbytes, nbytes), image.file.path
    match found.kind:
        case Kind.DATA:
            return Extent(start, length, depth, True, False, True, found.host_offset, path)
        case Kind.COMPRESSED:
            return Extent(start, length, depth, True, False, True, None, path)
        case Kind.ZERO_ALLOCATED:
            return Extent(start, length, depth, True, True, False, found.host_offset, path)
        case Kind.ZERO_PLAIN:
            return Extent(start, length, depth, True, True, False, None, path)
    if image.backing is None or start >= image.backing.size:
        return Extent(start, length, depth, False, True, False, None, path)
    return _look(driver, image.backing, depth + 1, start, min(length, image.backing.size - start))


def _look_at_raw(image: RawImage, depth: int, start: int, nbytes: int) -> Extent:
    """Data and holes of a raw file, as the host's file system tells them."""
    assert isinstance(image.file, HostFile)
    data_start = _seek(image.file.fd, start, os.SEEK_DATA, start + nbytes)
    if data_start > start:
        length = min(nbytes, data_start - start)
        return Extent(start, length, depth, True, True, False, start, image.file.path)
    length = min(nbytes, _seek(image.file.fd, start, os.SEEK_HOLE, start + nbytes) - start)
    return Extent(start, length, depth, True, False, True, start, image.file.path)


def _seek(fd: int, offset: int, whence: int, otherwise: int) -> int:
    """Where the next data or hole begins; *otherwise* if there is none."""
    try:
        return os.lseek(fd, offset, whence)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return otherwise
        raise


def merged(extents: Iterator[Extent]) -> Iterator[Extent]:
    """The same map in as few extents as possible."""
    current: Extent | None = None
    for extent in extents:
        if current is None:
            current = extent
        elif current.joins(extent):
            current = replace(current, length=current.length + extent.length)
        else:
            yield current
            current = extent
    if current is not None:
        yield current


def _print_json(extents: Iterator[Extent]) -> None:
    """One line an extent, keys in qemu-img's order."""
    lead = "["
    for extent in extents:
        facts = {key: getattr(extent, key) for key in ("start", "length", "depth", "present", "zero", "data")}
        if extent.offset is not None:
            facts["offset"] = extent.offset
        words = ", ".join(f'"{key}": {json.dumps(as_texts(value))}' for key, value in facts.items())
        print(f"{lead}{{ {words}}}", end="")
        lead = ",\n"
    print("]" if lead != "[" else "[]")


def _print_table(path: str, extents: Iterator[Extent]) -> None:
    """Only what can be read from the file as it is.

    Raises: ValueError at a compressed cluster, which cannot.
    """
    print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
    for extent in extents:
        if not extent.data:
            continue
        if extent.offset is None:
            raise ValueError(
                f"{path}: compressed cluster at {extent.start:#x} has no place in the file; use --output=json"
            )
        print(f"{_hex(extent.start):<16}{_hex(extent.length):<16}{_hex(extent.offset):<16}{extent.path}")


def _hex(number: int) -> str:
    return f"{number:#x}" if number else "0"
