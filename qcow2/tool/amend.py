"""`qcow2 amend`: change what an image is, not what its disk holds."""

import argparse

from qcow2.driver.file import HostFile, run
from qcow2.format.layout import VERSIONS
from qcow2.library.amend import Amendment, CannotAmend, DataFileName, amend_image, name_data_file, renamed
from qcow2.library.facts import backing_of
from qcow2.library.hostfile import opened
from qcow2.node.formats import FORMATS, format_of
from qcow2.tool.cache import CACHE_MODES
from qcow2.tool.failure import Failure, UsageError
from qcow2.tool.file import add_log_options, how_to_open, recovered
from qcow2.tool.identity import program
from qcow2.tool.keyslots import SLOT_OPTIONS, amend_slots
from qcow2.tool.named import Named, add_format_option, add_image_options, the_image
from qcow2.tool.opening import opening
from qcow2.tool.option import OPTIONS, SWITCH, asks_for_help, split_options
from qcow2.tool.progress import shown
from qcow2.tool.quantity import parse_size

DATA_FILE = ("data_file", "data_file_raw")
AMENDABLE = ("backing_file", "backing_fmt", "compat", *DATA_FILE, "lazy_refcounts", "refcount_bits", "size")
SLOT = "encrypt."
ONLY_QEMUS = ("encryption", "extent_size_hint", "nocow")  # options of creation that we do not have
WIDTHS = {str(1 << order): order for order in range(7)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `qcow2 amend`."""
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument("-p", "--progress", action="store_true", help="show how far it is")
    add_format_option(parser)
    add_image_options(parser)
    parser.add_argument("-t", "--cache", choices=CACHE_MODES, help="accepted; the image is synced")
    parser.add_argument("--force", action="store_true", help="accepted; what would lose data is refused all the same")
    known = ", ".join(AMENDABLE)
    parser.add_argument("-o", "--options", action="append", default=[], metavar="OPTIONS", help=f"{known}; or help")
    add_log_options(parser)
    parser.add_argument("filename", nargs="?")


def run_command(arguments: argparse.Namespace) -> int:
    """Amend.

    Raises: UsageError, Failure, ValueError, OSError, ImageError; the disk is as before, but for its size.
    """
    if not arguments.options:
        raise UsageError("Must specify options (-o)")
    if asks_for_help(arguments.options):
        _print_help(arguments.format or "qcow2")
        return 0
    if arguments.filename is None:
        raise Failure("Expecting one image file name")
    image = the_image(arguments, writes=True)
    known = format_of(image.path, image.image_format)
    if known.has_key_slots:
        _amend_luks(image, arguments)
        return 0
    if not known.has_metadata:
        raise Failure(f"Format driver '{image.image_format}' does not support option amendment")
    given = _given(arguments.options)
    with opening(image.path):
        _require_backing(image.path, given)
        try:
            _amend(image.path, given, arguments)
        except CannotAmend as error:
            raise Failure(error.reason) from error
    return 0


def _amend(path: str, given: dict[str, str], arguments: argparse.Namespace) -> None:
    """Nothing is changed before all of *given* is looked at; then the key slots, what else there is, the data file.

    That file may be elsewhere by now, and no key be known: so the disk is opened only for what needs it.
    """
    slots = {name.removeprefix(SLOT): given.pop(name) for name in list(given) if name.startswith(SLOT)}
    named = _data_file(given)
    wanted = _amendment(given)

    def amend_first(file: HostFile) -> None:
        if slots:
            amend_slots(file, "qcow2", slots, arguments.secrets)

    if given or not (slots or named):
        with shown(is_wanted=arguments.progress and not arguments.quiet) as pace:
            amend_image(path, wanted, pace, named=named, first=amend_first, **how_to_open(arguments))
        return
    with recovered(path, arguments) as file:
        if named is not None:
            run(renamed(file, named))
        amend_first(file)
        if named is not None:
            run(name_data_file(file, named))


def _data_file(given: dict[str, str]) -> DataFileName | None:
    """What is said of it, which is taken out of *given*: the file holds what the old one did, says the user."""
    data = {name: given.pop(name) for name in DATA_FILE if name in given}
    raw = data.get("data_file_raw")
    if raw is not None and raw not in SWITCH:
        raise Failure("Parameter 'data_file_raw' expects 'on' or 'off'")
    return DataFileName(data.get("data_file"), None if raw is None else SWITCH[raw]) if data else None


def _amend_luks(image: Named, arguments: argparse.Namespace) -> None:
    """It has key slots to change, and nothing else."""
    given = dict(split_options(arguments.options))
    for name in given:
        if name not in SLOT_OPTIONS:
            raise _unknown(name, "luks")
    with opening(image.path), opened(image.luks_header or image.path, writable=True) as file:
        amend_slots(file, image.image_format, given, arguments.secrets, is_detached=image.luks_header is not None)


def _unknown(name: str, image_format: str) -> Failure:
    is_for_creation = name in (*OPTIONS[image_format], *ONLY_QEMUS)
    hint = "This option is only supported for image creation" if is_for_creation else ""
    return Failure(f"Invalid parameter '{name}'", hint=hint)


def _print_help(image_format: str) -> None:
    known = FORMATS.get(image_format)
    if known is None or not (known.has_metadata or known.has_key_slots):
        raise Failure(f"Format driver '{image_format}' does not support option amendment")
    print(f"Amend options for '{image_format}':")
    for name in AMENDABLE if known.has_metadata else ():
        print(f"  {name}={OPTIONS['qcow2'][name]}")
    for name, caption in SLOT_OPTIONS.items():
        print(f"  {SLOT if known.has_metadata else ''}{name}={caption}")


def _given(texts: list[str]) -> dict[str, str]:
    """The options. Raises: Failure for one that can be given to a new image only."""
    given = {}
    for name, value in split_options(texts):
        if name not in AMENDABLE and (not name.startswith(SLOT) or name.removeprefix(SLOT) not in SLOT_OPTIONS):
            raise _unknown(name, "qcow2")
        given[name] = value
    return given


def _require_backing(path: str, given: dict[str, str]) -> None:
    """Raises: Failure unless the backing file that was given is the one that is there."""
    if not {"backing_file", "backing_fmt"} & {*given}:
        return
    for name, value in zip(("backing_file", "backing_fmt"), backing_of(path), strict=True):
        if given.get(name, "") != (value or ""):
            raise Failure("Cannot amend the backing file", hint=f"You can use '{program()} rebase' instead.")


def _amendment(given: dict[str, str]) -> Amendment:
    compat, lazy, width = given.get("compat"), given.get("lazy_refcounts"), given.get("refcount_bits")
    if compat is not None and compat not in VERSIONS:
        raise Failure(f"Unknown compatibility level {compat}")
    if lazy is not None and lazy not in SWITCH:
        raise Failure("Parameter 'lazy_refcounts' expects 'on' or 'off'")
    if width is not None and width not in WIDTHS:
        raise Failure("Refcount width must be a power of two and may not exceed 64 bits")
    return Amendment(
        size=parse_size(given["size"]) if "size" in given else None,
        version=None if compat is None else VERSIONS[compat],
        lazy_refcounts=None if lazy is None else SWITCH[lazy],
        refcount_order=None if width is None else WIDTHS[width],
    )
