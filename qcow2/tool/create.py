"""`qcow2 create`: a new image."""

import argparse
import os
import re
from dataclasses import dataclass
from typing import TypeVar

from qcow2.chain import backing_path
from qcow2.create import Options, Preallocation, max_size, plan, write_header, write_tables
from qcow2.driver.file import run
from qcow2.format import FORMATS
from qcow2.header import read_header
from qcow2.layout import MAX_BACKING_NAME_BYTES, SECTOR_SIZE, CompressionType
from qcow2.quantity import parse_size
from qcow2.tool.file import created, opened

T = TypeVar("T")

MAX_FORMAT_BYTES = 15  # QEMU opens no image that says more

OPTIONS = (
    "size",
    "compat",
    "backing_file",
    "backing_fmt",
    "cluster_size",
    "preallocation",
    "lazy_refcounts",
    "refcount_bits",
    "compression_type",
)
COMPATS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
SWITCH = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asks for; the size may have to be looked up."""

    path: str
    size_text: str | None
    given: dict[str, str]
    backing_name: str | None
    backing_format: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `qcow2 create`."""
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing")
    parser.add_argument("-f", "--format", default="qcow2", metavar="FMT", help="qcow2")
    parser.add_argument("-b", "--backing", metavar="FILE", help="the backing file, as it shall be recorded")
    parser.add_argument("-F", "--backing-format", metavar="FMT", help="its format")
    parser.add_argument("-u", "--unsafe", action="store_true", help="do not look at the backing file")
    parser.add_argument("-o", "--options", action="append", default=[], metavar="OPTIONS", help=", ".join(OPTIONS))
    parser.add_argument("filename")
    parser.add_argument("size", nargs="?", help="of the disk: bytes, or with a suffix k, M, G, T, P, E")


def run_command(arguments: argparse.Namespace) -> int:
    """Create the image.

    Raises: ValueError, OSError, ImageError; the file is as before, or gone if it was not there.
    """
    if arguments.format != "qcow2":
        raise ValueError(f"format {arguments.format!r} cannot be created, only qcow2")
    request = _request(arguments)
    options = _options(request, look=not arguments.unsafe)
    whole = plan(options)
    with created(request.path) as file:
        if not arguments.quiet:
            print(_announcement(request, options), flush=True)
        run(write_tables(file, whole))
        if options.preallocation is Preallocation.FALLOC:
            os.posix_fallocate(file.fd, 0, whole.end_offset)
        run(write_header(file, whole))
    return 0


def _request(arguments: argparse.Namespace) -> Request:
    given: dict[str, str] = {}
    for text in arguments.options:
        given.update(parse_options(text))
    backing = given.get("backing_file") if arguments.backing is None else arguments.backing
    backing_format = given.get("backing_fmt") if arguments.backing_format is None else arguments.backing_format
    size_text = given.get("size") if arguments.size is None else arguments.size
    return Request(arguments.filename, size_text, given, backing or None, backing_format or None)


def parse_options(text: str) -> dict[str, str]:
    """Split `name=value,name=value`; a comma in a value is doubled.

    Raises: ValueError naming what is not an option.
    """
    parsed = {}
    for part in re.split(r"(?<!,),(?!,)", text):
        name, equals, value = part.replace(",,", ",").partition("=")
        if name not in OPTIONS:
            raise ValueError(f"option {name!r} is unknown, known are {', '.join(OPTIONS)}")
        if not equals:
            raise ValueError(f"option {name!r} needs a value: {name}=VALUE")
        parsed[name] = value
    return parsed


def _options(request: Request, *, look: bool) -> Options:
    given = request.given
    _validate_backing(request)
    cluster_bits = _power(given, "cluster_size", "64k", 512, 2 << 20)
    backing_size = _backing_size(request) if request.backing_name is not None and look else None
    return Options(
        size=_size(request, backing_size, cluster_bits),
        version=_choice(given, "compat", "1.1", COMPATS),
        cluster_bits=cluster_bits,
        refcount_order=_power(given, "refcount_bits", "16", 1, 64),
        lazy_refcounts=_choice(given, "lazy_refcounts", "off", SWITCH),
        compression=_choice(given, "compression_type", "zlib", {kind.name.lower(): kind for kind in CompressionType}),
        backing_name=request.backing_name,
        backing_format=request.backing_format,
        preallocation=_choice(given, "preallocation", "off", {kind.value: kind for kind in Preallocation}),
    )


def _validate_backing(request: Request) -> None:
    name, backing_format = request.backing_name, request.backing_format
    if name is None:
        if backing_format is not None:
            raise ValueError(f"backing format {backing_format!r} is given without a backing file")
        return
    if backing_format is None:
        raise ValueError(f"backing file {name!r} needs its format, which is never guessed: -F {'|'.join(FORMATS)}")
    if backing_format not in FORMATS:
        raise ValueError(f"backing format {backing_format!r} is not supported, only {' and '.join(FORMATS)}")
    validate_backing(name, backing_format)
    path = backing_path(request.path, name)
    if os.path.exists(request.path) and os.path.exists(path) and os.path.samefile(request.path, path):
        raise ValueError(f"{request.path}: an image cannot be its own backing file")


def validate_backing(name: str, backing_format: str) -> None:
    """Raises: ValueError if a header cannot or should not say so."""
    if not re.fullmatch(rf"[\w-]{{1,{MAX_FORMAT_BYTES}}}", backing_format, re.ASCII):
        raise ValueError(f"backing format {backing_format!r} is no name of 1 to {MAX_FORMAT_BYTES} letters")
    if len(os.fsencode(name)) > MAX_BACKING_NAME_BYTES:
        nbytes = len(os.fsencode(name))
        raise ValueError(f"backing file name of {nbytes} bytes, limit {MAX_BACKING_NAME_BYTES}: {name[:40]!r}...")


def _backing_size(request: Request) -> int:
    """Size of the disk in the backing file; also proof that it is there."""
    assert request.backing_name is not None
    path = backing_path(request.path, request.backing_name)
    with opened(path) as file:
        return file.size() if request.backing_format == "raw" else run(read_header(file)).record.size


def _size(request: Request, backing_size: int | None, cluster_bits: int) -> int:
    if request.size_text is None and backing_size is None:
        raise ValueError(f"{request.path}: the size is missing, and there is no backing file to take it from")
    size = parse_size(request.size_text) if request.size_text is not None else (backing_size or 0)
    rounded = size + -size % SECTOR_SIZE
    if rounded > max_size(cluster_bits):
        text = request.size_text or f"{size} of the backing file"
        raise ValueError(
            f"size {text} is too large, limit {max_size(cluster_bits)} with cluster_size {1 << cluster_bits}"
        )
    return rounded


def _power(given: dict[str, str], name: str, default: str, low: int, high: int) -> int:
    """The exponent of an option that is a power of two in [low, high]."""
    text = given.get(name, default)
    try:
        value = parse_size(text)
    except ValueError as error:
        raise ValueError(f"{name}={text}: {error}") from error
    if value & (value - 1) or not low <= value <= high:
        raise ValueError(f"{name}={text} is not a power of two from {low} to {high}")
    return value.bit_length() - 1


def _choice(given: dict[str, str], name: str, default: str, choices: dict[str, T]) -> T:
    text = given.get(name, default)
    if text not in choices:
        raise ValueError(f"{name}={text} is not one of {', '.join(choices)}")
    return choices[text]


def _announcement(request: Request, options: Options) -> str:
    """One line like qemu-img's."""
    words = [f"Formatting {request.path!r}, fmt=qcow2", f"cluster_size={options.cluster_size}", "extended_l2=off"]
    if "preallocation" in request.given:
        words.append(f"preallocation={options.preallocation.value}")
    words += [f"compression_type={options.compression.name.lower()}", f"size={options.size}"]
    if "compat" in request.given:
        words.append(f"compat={request.given['compat']}")
    if options.backing_name is not None:
        words += [f"backing_file={options.backing_name}", f"backing_fmt={options.backing_format}"]
    words.append(f"lazy_refcounts={'on' if options.lazy_refcounts else 'off'}")
    words.append(f"refcount_bits={1 << options.refcount_order}")
    return " ".join(words)
