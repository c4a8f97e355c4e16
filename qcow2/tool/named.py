"""The image that a command line names: a path and a format; with --image-opts, or as json:{...}, all by their names."""

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from qcow2.driver.uri import is_nbd, protocol_of
from qcow2.node.formats import FORMATS
from qcow2.node.jsonname import HOST_DRIVERS, PATH_KEYS, PREFIX, is_tuning, options_of
from qcow2.tool.commas import split_commas
from qcow2.tool.failure import Failure
from qcow2.tool.identity import is_qemu_img
from qcow2.tool.opening import opening
from qcow2.tool.secret import Secrets, add_object_option

MAGICS = {b"QFI\xfb": "qcow2", b"LUKS": "luks"}
FILE = "file:"  # in front of a path that has a colon itself
HEADER = "header.filename"
KEY = "key-secret"
KEYS = (KEY, f"encrypt.{KEY}")  # of a luks image, of a qcow2 one
BELOW = "backing."  # of the options of the backing file
WARNING = """WARNING: Image format was not specified for '{}' and probing guessed raw.
         Automatically detecting the format is dangerous for raw images, write operations on block 0 will be restricted.
         Specify the 'raw' format explicitly to remove the restrictions."""


@dataclass(frozen=True, slots=True)
class Named:
    """Where an image is, and what was said of it."""

    path: str
    image_format: str
    options: dict[str, str] = field(default_factory=dict)  # what else was said, by dotted name: "encrypt.key-secret"

    @property
    def luks_header(self) -> str | None:
        """The file of its LUKS header, if it is not in front of the disk."""
        return self.options.get(HEADER)


def add_format_option(parser: argparse.ArgumentParser, *flags: str, of: str = "of the image") -> None:
    """Declare how the format of what is named is said."""
    parser.add_argument(*(flags or ("-f", "--format")), metavar="FMT", help=f"{of}: {' or '.join(FORMATS)}")


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Declare that names may be lists of options, and the objects that these may refer to."""
    parser.add_argument("--image-opts", action="store_true", help="a name is driver=FORMAT,file.filename=FILE,...")
    add_object_option(parser)


def named(
    text: str, image_format: str | None, secrets: Secrets, *, is_options: bool = False, writes: bool = False
) -> Named:
    """What *text*, a file's name, or a list of options, names; *image_format* as it was given with it.

    What is given takes precedence over what json:{...} says, as with QEMU.
    Which of the *secrets* opens it is chosen if it says so.

    Raises: Failure.
    """
    if is_options:
        if image_format is not None:
            raise Failure("--image-opts and --format are mutually exclusive")
        return _of_options(dict(_split(text)), text, secrets)
    if text.startswith(PREFIX):
        said = _parsed(text)
        return _of_options(said if image_format is None else {**said, "driver": image_format}, text, secrets)
    path = present_file(text)
    if image_format is None:
        return Named(path, guessed(path, writes=writes))
    if image_format not in FORMATS:
        raise Failure(f"Could not open '{text}': Unknown driver '{image_format}'")
    return Named(path, image_format)


def bare(name: str) -> str:
    """The path that *name* is, which may say that it is one: then what looks like a protocol in it is none."""
    path = name.removeprefix(FILE)
    return f"./{path}" if path != name and ":" in path.partition("/")[0] else path


def present_file(name: str) -> str:
    """The path that *name* is, or the URI. Raises: Failure if it is one of a protocol that is not spoken here."""
    if not is_nbd(name) and (protocol := protocol_of(name)) is not None:
        raise Failure(f"Could not open '{name}': Unknown protocol '{protocol}'; {_as_file(name)}")
    return bare(name)


def new_file(name: str) -> str:
    """The path that *name*, of a file to be made, is. Raises: Failure if it is one of a protocol."""
    if (protocol := protocol_of(name)) is not None:
        raise Failure(f"{name}: Protocol driver '{protocol}' does not support image creation; {_as_file(name)}")
    return bare(name)


def _as_file(name: str) -> str:
    return f"a file is ./{name} or {FILE}{name}"


def the_image(arguments: argparse.Namespace, *, writes: bool = False) -> Named:
    """What the one name of a command line names. Raises: Failure."""
    name, secrets = arguments.filename, arguments.secrets
    return named(name, arguments.format, secrets, is_options=arguments.image_opts, writes=writes)


def guessed(path: str, *, writes: bool = False) -> str:
    """The format of an image of which none was said: only `qemu-img` looks what is there."""
    if is_nbd(path):
        return "raw"
    if not is_qemu_img():
        return "qcow2"
    try:
        with open(path, "rb") as file:
            found = MAGICS.get(file.read(4), "raw")
    except OSError:  # who opens it next says why
        return "qcow2"
    if found == "raw" and writes:
        print(WARNING.format(path), file=sys.stderr)
    return found


def _split(text: str) -> Iterator[tuple[str, str]]:
    """`name=value,name=value`; a comma in a value is doubled."""
    for part in split_commas(text):
        name, equals, value = part.partition("=")
        if name:
            yield (name, value) if equals else ("driver", name)


def _parsed(text: str) -> dict[str, str]:
    try:
        return options_of(text)
    except ValueError as error:
        raise Failure(f"Could not open '{text}': {error}") from error


def _of_options(given: dict[str, str], text: str, secrets: Secrets) -> Named:
    driver = given.pop("driver", None)
    host_driver = given.get("file.driver", "file")
    path = next((given.pop(key) for key in PATH_KEYS if key in given), None)
    for key in [*filter(is_tuning, given)]:
        given.pop(key)
    if driver in HOST_DRIVERS:
        driver = "raw"
    if path is None and driver == text:
        raise Failure(f"Could not open '{text}': Cannot find device='{text}' nor node-name='{text}'")
    if driver is not None and driver not in FORMATS:
        raise Failure(f"Could not open '{text}': Unknown driver '{driver}'")
    if host_driver not in HOST_DRIVERS:
        raise Failure(f"Could not open '{text}': Unknown protocol '{host_driver}'")
    if path is None:
        raise Failure(f"Could not open '{text}': A block device must be specified for \"file\"")
    if driver is None:
        driver = guessed(path)
    below = {key.removeprefix(BELOW): given.pop(key) for key in [*given] if key.startswith(BELOW)}
    if below and not FORMATS[driver].has_metadata:
        raise Failure(f"Could not open '{text}': Driver doesn't support backing files")
    _require_backing(path, below, text, secrets)
    given.pop("header.driver", None) if HEADER in given else None
    unknown = [key for key in given if not _is_option_of(driver, key)]
    if unknown:
        raise Failure(f"Could not open '{text}': Block format '{driver}' does not support the option '{unknown[0]}'")
    for key in KEYS:
        if key in given:
            secrets.choose(given.get(HEADER, path), given[key])
    return Named(path, driver, given)


def _is_option_of(driver: str, key: str) -> bool:
    known = FORMATS[driver]
    return (known.has_metadata and key.startswith("encrypt.")) or (known.has_key_slots and key in (KEY, HEADER))


def _require_backing(path: str, given: dict[str, str], text: str, secrets: Secrets) -> None:
    """Return if *given*, said of the backing file of the image at *path*, names the one, and the format, that it names.

    Raises: Failure.
    """
    if not given:
        return
    from qcow2.driver.file import run
    from qcow2.format.header import read_header
    from qcow2.library.hostfile import opened
    from qcow2.node.gate import backing_path

    says_format = "driver" in given
    said = _of_options(given, text, secrets)
    with opening(path), opened(path, force_share=True) as file:
        header = run(read_header(file, trust_refcounts=False))
    name = header.backing_name
    if name is None or not os.path.exists(said.path) or not os.path.samefile(said.path, backing_path(path, name)):
        raise Failure(f"{path}: {said.path!r} is not its backing file; `rebase` changes which one that is")
    if says_format and said.image_format != header.backing_format:
        reason = f"is {header.backing_format}, not {said.image_format}; `rebase -u` changes what it is"
        raise Failure(f"{path}: its backing file {reason}")
