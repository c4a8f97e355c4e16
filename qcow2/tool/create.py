"""`qcow2 create`: a new image."""

import argparse
from dataclasses import dataclass

from qcow2.driver.file import run
from qcow2.engine.create import Options
from qcow2.engine.plain import Preallocation, write_raw
from qcow2.format.layout import SECTOR_SIZE
from qcow2.library.hostfile import created, opened, reserve
from qcow2.library.make import make_qcow2
from qcow2.library.newdata import KEEP, data_file_size
from qcow2.node.formats import FORMATS, format_of
from qcow2.node.gate import backing_path
from qcow2.tool.encryption import encryption_of
from qcow2.tool.failure import Failure, UsageError
from qcow2.tool.identity import default_format, is_qemu_img
from qcow2.tool.named import new_file
from qcow2.tool.option import (
    LEGACY,
    OPTIONS,
    asks_for_help,
    image_options,
    is_detached,
    luks_preallocation,
    parse_options,
    print_help,
    raw_preallocation,
    split_options,
    validate_backing,
)
from qcow2.tool.quantity import parse_size, size_of
from qcow2.tool.refused import announcement, before_it_begins, once_it_has_begun
from qcow2.tool.secret import add_object_option


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asks for; the size may have to be looked up."""

    name: str  # of the image, as it was typed
    path: str  # that this is
    given: dict[str, str]  # with what other options than -o say

    @property
    def backing_name(self) -> str | None:
        """As it is recorded."""
        return self.given.get("backing_file") or None

    @property
    def backing_format(self) -> str | None:
        """Of the backing file."""
        return self.given.get("backing_fmt") or None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `qcow2 create`."""
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing")
    parser.add_argument("-f", "--format", default=default_format(), metavar="FMT", help=" or ".join(FORMATS))
    parser.add_argument("-b", "--backing", metavar="FILE", help="the backing file, as it shall be recorded")
    parser.add_argument("-F", "-B", "--backing-format", metavar="FMT", help="its format")
    parser.add_argument("-u", "--unsafe", "--backing-unsafe", action="store_true", help="look at no backing file")
    known = ", ".join(OPTIONS["qcow2"])
    parser.add_argument("-o", "--options", action="append", default=[], metavar="OPTIONS", help=f"{known}; or help")
    add_object_option(parser)
    parser.add_argument("filename", nargs="?")
    parser.add_argument("size", nargs="?", help="of the disk: bytes, or with a suffix k, M, G, T, P, E")


def run_command(arguments: argparse.Namespace) -> int:
    """Create the image.

    Raises: UsageError, ValueError, OSError, ImageError; the file is as before, or gone if it was not there.
    """
    if arguments.format not in FORMATS:
        if is_qemu_img():
            lead = "" if asks_for_help(arguments.options) else f"{arguments.filename}: "
            raise Failure(f"{lead}Unknown file format '{arguments.format}'")
        raise ValueError(f"format {arguments.format!r} cannot be created, only {' and '.join(FORMATS)}")
    if asks_for_help(arguments.options):
        print_help(arguments.format)
        return 0
    if arguments.filename is None:
        raise UsageError("Expecting image file name")
    path = new_file(arguments.filename)
    if is_qemu_img():
        _refuse_in_its_words(arguments)
    request = _request(path, arguments)
    match arguments.format:
        case "raw":
            _create_raw(request, arguments)
        case "luks":
            _create_luks(request, arguments)
        case _:
            _create_qcow2(request, arguments)
    return 0


def _refuse_in_its_words(arguments: argparse.Namespace) -> None:
    """Raises: Failure for what `qemu-img` has its own words for."""
    path = arguments.filename
    given = dict(split_options(arguments.options))
    if arguments.size is not None:
        nbytes = size_of("image size", arguments.size)
        _refuse_second_size(path, given)
        given["size"] = str(nbytes)
    given |= {} if arguments.backing is None else {"backing_file": arguments.backing}
    given |= {} if arguments.backing_format is None else {"backing_fmt": arguments.backing_format}
    text = before_it_begins(path, given, arguments.format)
    if text is not None and not (arguments.unsafe and "backing" in text):
        first, _, hint = text.partition("\n")
        raise Failure(f"{path}: {first}", hint=hint)
    if arguments.format != "qcow2":
        return
    if "size" in given and (text := once_it_has_begun(given, size := parse_size(given["size"]))) is not None:
        if not arguments.quiet:
            print(announcement(path, given, size), flush=True)
        raise Failure(f"{path}: {text}")


def _create_qcow2(request: Request, arguments: argparse.Namespace) -> None:
    _validate_backing(request)
    size = _size(request, look=not arguments.unsafe)
    options = image_options(request.given, size, request.given.get("size"), arguments.secrets)

    def announce() -> None:
        if not arguments.quiet:
            print(_announcement(request, options, size), flush=True)

    use = request.given.get("data_file_use")
    make_qcow2(request.path, options, use, announce, looks_below=not arguments.unsafe)


def _create_raw(request: Request, arguments: argparse.Namespace) -> None:
    if request.backing_name is not None or request.backing_format is not None:
        raise ValueError(f"{request.path}: a raw image has no backing file")
    typed = _size(request, look=False)
    size = typed + -typed % SECTOR_SIZE
    preallocation = raw_preallocation(request.given)
    with created(request.path) as file:
        if not arguments.quiet:
            said = f" preallocation={preallocation.value}" if "preallocation" in request.given else ""
            print(f"Formatting {_quoted(request.name)}, fmt=raw size={typed}{said}", flush=True)
        run(write_raw(file, size, preallocation))
        if preallocation is Preallocation.FALLOC:
            reserve(file)


def _create_luks(request: Request, arguments: argparse.Namespace) -> None:
    from qcow2.node.luks import write_detached, write_luks

    if request.backing_name is not None or request.backing_format is not None:
        raise ValueError(f"{request.path}: a raw image has no backing file")
    encryption = encryption_of(request.given, arguments.secrets)
    assert encryption is not None  # there is no other such image
    is_header, preallocation = is_detached(request.given), luks_preallocation(request.given)
    typed = -1 if is_header and "size" not in request.given else _size(request, look=False)
    with created(request.path) as file:
        if not arguments.quiet:
            said = "".join(f" {name}={text}" for name, text in request.given.items() if name != "size")
            print(f"Formatting {_quoted(request.name)}, fmt=luks size={typed}{said}", flush=True)
        if is_header:
            run(write_detached(file, encryption))
        else:
            size = typed + -typed % SECTOR_SIZE
            run(write_luks(file, encryption, size, is_full=preallocation is Preallocation.FULL))
            if preallocation is Preallocation.FALLOC:
                reserve(file)


def _refuse_second_size(path: str, given: dict[str, str]) -> None:
    if "size" in given:
        raise Failure(f"{path}: The image size must be specified only once")


def _request(path: str, arguments: argparse.Namespace) -> Request:
    given = parse_options(arguments.options, arguments.format)
    if arguments.size is not None:
        _refuse_second_size(arguments.filename, given)
    typed = {"size": arguments.size, "backing_file": arguments.backing, "backing_fmt": arguments.backing_format}
    said = given | {name: text for name, text in typed.items() if text is not None}
    return Request(arguments.filename, path, said)


def _validate_backing(request: Request) -> None:
    name, backing_format = request.backing_name, request.backing_format
    if name is None:
        if backing_format is not None:
            raise ValueError(f"backing format {backing_format!r} is given without a backing file")
        return
    if backing_format is None:
        raise ValueError(f"backing file {name!r} needs its format, which is never guessed: -F {'|'.join(FORMATS)}")
    validate_backing(name, backing_format)


def _backing_size(request: Request) -> int:
    """Size of the disk in the backing file; also proof that it is there."""
    assert request.backing_name is not None
    path = backing_path(request.path, request.backing_name)
    with opened(path) as file:
        assert request.backing_format is not None  # `_validate_backing` has seen to it
        return format_of(path, request.backing_format).outline(file).size


def _size(request: Request, *, look: bool) -> int:
    """Of the disk, as it was typed; else as the backing file's, which is looked at in any case if *look*."""
    backing_size = _backing_size(request) if look and request.backing_name is not None else None
    typed = request.given.get("size")
    if typed is None and request.given.get("data_file_use") == KEEP and request.given.get("data_file"):
        return data_file_size(request.path, request.given["data_file"])
    if typed is not None:
        return parse_size(typed)
    if backing_size is None:
        raise ValueError(f"{request.path}: the size is missing, and there is no backing file to take it from")
    return backing_size


def _announcement(request: Request, options: Options, size: int) -> str:
    """One line like qemu-img's; the size as it was typed."""
    words = [f"Formatting {_quoted(request.name)}, fmt=qcow2"]
    words += [f"{name}={request.given[name]}" for name in (LEGACY,) if name in request.given]
    words += [f"{name}={text}" for name, text in request.given.items() if name.startswith("encrypt.")]
    words.append(f"cluster_size={options.cluster_size}")
    words.append(f"extended_l2={'on' if options.has_subclusters else 'off'}")
    if "preallocation" in request.given:
        words.append(f"preallocation={options.preallocation.value}")
    words.append(f"compression_type={options.compression.name.lower()}")
    words += [f"{name}={request.given[name]}" for name in ("keep_data_file",) if name in request.given]
    words.append(f"size={size}")
    if "compat" in request.given:
        words.append(f"compat={request.given['compat']}")
    if options.backing_name is not None:
        words += [f"backing_file={options.backing_name}", f"backing_fmt={options.backing_format}"]
    if options.data_file_name is not None:
        words.append(f"data_file={options.data_file_name}")
        if options.data_file_raw:
            words.append("data_file_raw=on")
    words.append(f"lazy_refcounts={'on' if options.lazy_refcounts else 'off'}")
    words.append(f"refcount_bits={1 << options.refcount_order}")
    return " ".join(words)


def _quoted(path: str) -> str:
    return f"'{path}'"
