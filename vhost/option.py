"""The daemon's options: parsed once into a record that cannot be wrong."""

import argparse
import os
import re
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, NoReturn

from ring.aio import Aio, WorkerOptions

PROGRAM = "vhost-user-qcow2"
QUEUES_MAX = 256  # a ring index has 8 bits on the wire
DEFAULT_POLL_US = 200  # a few wake-ups: a driver that sleeps, wakes and asks again finds us awake
POLL_US_MAX = 1000
DEFAULT_QUEUES = 128  # QEMU asks for one a vCPU
SERIAL_MAX = 20  # bytes of the answer to GET_ID
CACHE_SIZE_MIN, CACHE_SIZE_MAX = 1 << 20, 1 << 40
DEFAULT_CACHE_SIZE = 32 << 20
GROUP_MODE = 0o660
GROUP_LIMIT = (1 << 32) - 1  # which would mean: leave it
DEFAULT_LINK_LOG = "/dev/shm"
SUFFIXES = {"k": 10, "m": 20, "g": 30, "t": 40}
LAZY_REFCOUNTS = {"on": True, "off": False, "image": None}


class UsageError(Exception):
    """The command line asks for something impossible; one line says what."""


class CacheMode(Enum):
    """What a completed write means, named as in QEMU: (may be volatile, data past the page cache, syncs happen)."""

    WRITEBACK = (True, False, True)
    WRITETHROUGH = (False, False, True)
    NONE = (True, True, True)
    DIRECTSYNC = (False, True, True)
    UNSAFE = (True, False, False)

    @property
    def writeback(self) -> bool:
        return self.value[0]

    @property
    def direct(self) -> bool:
        return self.value[1]

    @property
    def sync(self) -> bool:
        return self.value[2]


@dataclass(frozen=True, slots=True)
class Options:
    """One daemon's command line. Exactly one of *socket_path* and *fd* is given."""

    blk_file: str
    socket_path: str | None = None
    fd: int | None = None
    socket_mode: int | None = None  # None: as the umask says
    socket_group: int | None = None
    format: str = "qcow2"
    read_only: bool = False
    cache: CacheMode = CacheMode.WRITEBACK
    num_queues: int = DEFAULT_QUEUES
    serial: str = ""
    lazy_refcounts: bool | None = None  # None: as the image says
    cache_size: int = DEFAULT_CACHE_SIZE
    link_log: str = DEFAULT_LINK_LOG
    discard_link_log: bool = False
    stats: bool = False
    trace_io: str | None = None
    incoming: bool = False
    aio: Aio = Aio.AUTO
    poll_us: int = DEFAULT_POLL_US
    control: str | None = None
    sandbox: bool = False
    key_fds: tuple[int, ...] = ()
    key_files: tuple[str, ...] = ()
    data_file: str | None = None  # what the image's data is in, whatever it says
    luks_header: str | None = None  # where the LUKS header of a luks image is; None: in front of the disk
    allow_files: tuple[str, ...] | None = None  # directories of what images may name; None: anywhere

    @property
    def worker(self) -> WorkerOptions:
        """How the worker runs."""
        return WorkerOptions(self.aio, self.poll_us)


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line of ours."""

    def print_help(self, file: Any = None) -> None:
        """Print it. Raises: OSError, which argparse may swallow."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse(arguments: list[str], *, activated_fd: int | None = None) -> Options:
    """The options; *activated_fd* is the socket of a command line that names none.

    Raises: UsageError naming the option, the value and the limit.
    """
    given = _parser().parse_args(arguments)
    if given.socket_path is None and given.fd is None:
        given.fd = activated_fd
    if (given.socket_path is None) == (given.fd is None):
        raise UsageError("give one of --socket-path=PATH and --fd=N")
    if given.socket_path is None and (given.socket_mode is not None or given.socket_group is not None):
        raise UsageError("--socket-mode and --socket-group are for a --socket-path=PATH")
    if given.socket_group is not None and given.socket_mode is None:
        given.socket_mode = GROUP_MODE
    if given.format != "qcow2" and given.lazy_refcounts != "image":
        raise UsageError(f"--lazy-refcounts={given.lazy_refcounts}: a {given.format} image has no refcounts")
    if given.format != "luks" and given.luks_header is not None:
        raise UsageError(f"--luks-header={given.luks_header}: a {given.format} image has no such file")
    if given.incoming and given.trace_io:
        raise UsageError("--incoming and --trace-io: a trace begins with the image")
    given.cache = CacheMode[given.cache.upper()]
    given.lazy_refcounts = LAZY_REFCOUNTS[given.lazy_refcounts]
    given.aio = Aio(given.aio)
    given.key_fds, given.key_files = tuple(given.key_fds), tuple(given.key_files)
    given.allow_files = _allowed(given.allow_files, given.blk_file, is_confined=given.sandbox)
    return Options(**{field.name: getattr(given, field.name) for field in fields(Options)})


def whole_parser() -> Parser:
    """Options and subcommands together, for manual and completion."""
    from vhost.controlclient import parser as ctl_parser  # which imports us

    parser = _parser()
    commands = parser.add_subparsers(metavar="COMMAND")
    ctl = ctl_parser()
    commands.add_parser("ctl", parents=[ctl], add_help=False, help=ctl.description, description=ctl.description)
    xml = "print what a libvirt domain says of the disk that these options serve"
    commands.add_parser("libvirt-xml", parents=[_parser()], add_help=False, help=xml, description=xml)
    return parser


def _parser() -> Parser:
    parser = Parser(prog=PROGRAM, allow_abbrev=False, description="Serve a disk image to a virtual machine.")
    add = parser.add_argument
    add("--socket-path", metavar="PATH", help="listen on this Unix socket")
    add("--socket-mode", metavar="MODE", type=_socket_mode, help="of the socket, octal; who may write may connect")
    add(
        "--socket-group",
        metavar="GROUP",
        type=_group,
        help="of the socket; sets --socket-mode=0660 if that is not given",
    )
    add("--fd", metavar="N", type=_fd, help="use this inherited Unix socket, listening or connected")
    add("--blk-file", metavar="IMAGE", type=_non_empty, required=True, help="the image file or block device")
    add("--data-file", metavar="PATH", type=_non_empty, help="the image's external data file, whatever it names itself")
    add("--luks-header", metavar="PATH", type=_non_empty, help="the LUKS header of a luks image that has it elsewhere")
    add(
        "--format",
        choices=["qcow2", "raw", "luks"],
        default="qcow2",
        help="of the image; never guessed (default: qcow2)",
    )
    add("--read-only", action="store_true", help="let the guest read only")
    add("--cache", choices=[mode.name.lower() for mode in CacheMode], default="writeback", help="default: writeback")
    add("--num-queues", metavar="N", type=_num_queues, default=DEFAULT_QUEUES, help=f"default: {DEFAULT_QUEUES}")
    add("--serial", metavar="TEXT", type=_serial, default="", help=f"what the guest sees, up to {SERIAL_MAX} bytes")
    add("--lazy-refcounts", choices=["on", "off", "image"], default="image", help="default: as the image says")
    add("--cache-size", metavar="SIZE", type=_cached_bytes, default=DEFAULT_CACHE_SIZE, help="L2 cache (default: 32M)")
    add("--incoming", action="store_true", help="a guest will migrate here: take the image when its rings start")
    add(
        "--poll-us",
        metavar="N",
        type=_pause,
        default=DEFAULT_POLL_US,
        help=f"default: {DEFAULT_POLL_US}; 0: never",
    )
    add("--control", metavar="PATH", type=_non_empty, help="listen for commands on this Unix socket; see ctl")
    add("--aio", choices=[aio.value for aio in Aio], default="auto", help="default: threads only without io_uring")
    add(
        "--link-log",
        metavar="DIR",
        type=_non_empty,
        default=DEFAULT_LINK_LOG,
        help=f"memory that outlives the daemon (default: {DEFAULT_LINK_LOG})",
    )
    add("--discard-link-log", action="store_true", help="lose the writes in a log that is missing or does not count")
    add(
        "--key-fd",
        dest="key_fds",
        metavar="N",
        type=_fd,
        action="append",
        default=[],
        help="read a key of encrypted images from this inherited descriptor, all of it; may be given again",
    )
    add(
        "--key-file",
        dest="key_files",
        metavar="PATH",
        type=_non_empty,
        action="append",
        default=[],
        help="read a key of encrypted images from this file, a newline at its end included; may be given again",
    )
    add("--sandbox", action="store_true", help="give up every right that serving this image does not need")
    add(
        "--allow-files",
        metavar="DIR",
        type=_non_empty,
        action="append",
        help="what an image names lies beneath it; repeatable (default: anywhere; with --sandbox the image's own)",
    )
    add("--stats", action="store_true", help="print the counters as one line of JSON at exit")
    add("--trace-io", metavar="FILE", type=_non_empty, help="record requests and I/O in this new file")
    add("--version", action="store_true", help="say which version this is, and exit")
    add("--print-capabilities", action="store_true", help="say what this program can do, as JSON, and exit")
    return parser


def _allowed(given: list[str] | None, blk_file: str, *, is_confined: bool) -> tuple[str, ...] | None:
    """The directories of what images may name: absolute, as they were meant when the daemon started."""
    if given is None and is_confined:
        given = [os.path.dirname(os.path.realpath(blk_file))]
    return None if given is None else tuple(map(os.path.abspath, given))


def _non_empty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return text


def _integer(text: str, noun: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not {noun}")
    return int(text)


def _fd(text: str) -> int:
    number = _integer(text, "a file descriptor")
    if number >= 1 << 31:
        raise argparse.ArgumentTypeError(f"{number} is not a file descriptor")
    return number


def _socket_mode(text: str) -> int:
    if not re.fullmatch("0?[0-7]{3}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an octal mode such as 0660")
    return int(text, 8)


def _group(text: str) -> int:
    import grp  # few ask for one

    if text.isascii() and text.isdigit() and int(text) < GROUP_LIMIT:
        return int(text)
    try:
        return grp.getgrnam(text).gr_gid
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"there is no group {text!r}") from None


def _pause(text: str) -> int:
    if not text.isdecimal() or int(text) > POLL_US_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of microseconds from 0 to {POLL_US_MAX}")
    return int(text)


def _num_queues(text: str) -> int:
    number = _integer(text, "a number of queues")
    if not 1 <= number <= QUEUES_MAX:
        raise argparse.ArgumentTypeError(f"{number} is not between 1 and {QUEUES_MAX}")
    return number


def _serial(text: str) -> str:
    length = len(text.encode(errors="surrogateescape"))
    if length > SERIAL_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} has {length} bytes, the limit is {SERIAL_MAX}")
    return text


def size_of(text: str, example: str) -> int:
    """Bytes of a size as people write it. Raises: ArgumentTypeError with the *example*."""
    shift = SUFFIXES.get(text[-1:].lower(), 0)
    digits = text[:-1] if shift else text
    if not (digits.isascii() and digits.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as {example}")
    return int(digits) << shift


def _cached_bytes(text: str) -> int:
    nbytes = size_of(text, "32M")
    if not CACHE_SIZE_MIN <= nbytes <= CACHE_SIZE_MAX:
        raise argparse.ArgumentTypeError(f"{nbytes} bytes are not between {CACHE_SIZE_MIN} and {CACHE_SIZE_MAX}")
    return nbytes
