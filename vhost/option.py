"""The daemon's options: parsed once into a record that cannot be wrong.

Whoever adds one adds a field of `Options`, which says all that the command line, its help, the manual page and the
completion want to know, and a line of README's table.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any

from ring.aio import Aio, WorkerOptions
from vhost import PROGRAM
from vhost.argument import (
    Parser,
    UsageError,
    cache_size_of,
    fd_of,
    group_of,
    mode_of,
    path_of,
    pause_of,
    queues_of,
    serial_of,
)
from virtio.config import SERIAL_MAX

DEFAULT_POLL_US = 200  # a few wake-ups: a driver that sleeps, wakes and asks again finds us awake
DEFAULT_QUEUES = 128  # QEMU asks for one a vCPU
DEFAULT_LINK_LOG = "/dev/shm"
GROUP_MODE = 0o660
LAZY_REFCOUNTS = {"on": True, "off": False, "image": None}


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


def said(
    metavar: str | None, text: str, *, flag: str = "", into: Callable[[Any], Any] = lambda value: value, **words: Any
) -> dict[str, Any]:
    """How a field of `Options` is said: its *flag*, or that of its name, and argparse's *words*.

    The field becomes *into* of what argparse makes of it.
    """
    if metavar is not None:
        words["metavar"] = metavar
    return {"flag": flag, "into": into, "words": {"help": text, **words}}


def switch(text: str) -> dict[str, Any]:
    """The same of one that is there or not."""
    return said(None, text, action="store_true")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One daemon's command line. Exactly one of *socket_path* and *fd* is given."""

    socket_path: str | None = field(default=None, metadata=said("PATH", "listen on this Unix socket"))
    socket_mode: int | None = field(  # None: as the umask says
        default=None, metadata=said("MODE", "of the socket, octal; who may write may connect", type=mode_of)
    )
    socket_group: int | None = field(
        default=None,
        metadata=said("GROUP", "of the socket; sets --socket-mode=0660 if that is not given", type=group_of),
    )
    fd: int | None = field(
        default=None, metadata=said("N", "use this inherited Unix socket, listening or connected", type=fd_of)
    )
    blk_file: str = field(metadata=said("IMAGE", "the image file or block device", type=path_of, required=True))
    data_file: str | None = field(  # what the image's data is in, whatever it says
        default=None, metadata=said("PATH", "the image's external data file, whatever it names itself", type=path_of)
    )
    luks_header: str | None = field(  # where the LUKS header of a luks image is; None: in front of the disk
        default=None, metadata=said("PATH", "the LUKS header of a luks image that has it elsewhere", type=path_of)
    )
    format: str = field(
        default="qcow2",
        metadata=said(None, "of the image; never guessed (default: qcow2)", choices=["qcow2", "raw", "luks"]),
    )
    read_only: bool = field(default=False, metadata=switch("let the guest read only"))
    cache: CacheMode = field(
        default=CacheMode.WRITEBACK,
        metadata=said(
            None,
            "default: writeback",
            choices=[mode.name.lower() for mode in CacheMode],
            into=lambda name: CacheMode[name.upper()],
        ),
    )
    num_queues: int = field(default=DEFAULT_QUEUES, metadata=said("N", f"default: {DEFAULT_QUEUES}", type=queues_of))
    serial: str = field(
        default="", metadata=said("TEXT", f"what the guest sees, up to {SERIAL_MAX} bytes", type=serial_of)
    )
    lazy_refcounts: bool | None = field(  # None: as the image says
        default=None,
        metadata=said(
            None, "default: as the image says", choices=list(LAZY_REFCOUNTS), into=lambda word: LAZY_REFCOUNTS[word]
        ),
    )
    cache_size: int = field(default=32 << 20, metadata=said("SIZE", "L2 cache (default: 32M)", type=cache_size_of))
    incoming: bool = field(
        default=False, metadata=switch("a guest will migrate here: take the image when its rings start")
    )
    poll_us: int = field(
        default=DEFAULT_POLL_US, metadata=said("N", f"default: {DEFAULT_POLL_US}; 0: never", type=pause_of)
    )
    control: str | None = field(
        default=None, metadata=said("PATH", "listen for commands on this Unix socket; see ctl", type=path_of)
    )
    aio: Aio = field(
        default=Aio.AUTO,
        metadata=said(None, "default: threads only without io_uring", choices=[aio.value for aio in Aio], into=Aio),
    )
    link_log: str = field(
        default=DEFAULT_LINK_LOG,
        metadata=said("DIR", f"memory that outlives the daemon (default: {DEFAULT_LINK_LOG})", type=path_of),
    )
    discard_link_log: bool = field(
        default=False, metadata=switch("lose the writes in a log that is missing or does not count")
    )
    key_fds: tuple[int, ...] = field(
        default=(),
        metadata=said(
            "N",
            "read a key of encrypted images from this inherited descriptor, all of it; may be given again",
            flag="--key-fd",
            type=fd_of,
            action="append",
            into=tuple,
        ),
    )
    key_files: tuple[str, ...] = field(
        default=(),
        metadata=said(
            "PATH",
            "read a key of encrypted images from this file, a newline at its end included; may be given again",
            flag="--key-file",
            type=path_of,
            action="append",
            into=tuple,
        ),
    )
    sandbox: bool = field(default=False, metadata=switch("give up every right that serving this image does not need"))
    allow_files: tuple[str, ...] | None = field(  # directories of what images may name; None: anywhere
        default=None,
        metadata=said(
            "DIR",
            "what an image names lies beneath it; repeatable (default: anywhere; with --sandbox the image's own)",
            type=path_of,
            action="append",
            into=tuple,
        ),
    )
    stats: bool = field(default=False, metadata=switch("print the counters as one line of JSON at exit"))
    trace_io: str | None = field(
        default=None, metadata=said("FILE", "record requests and I/O in this new file", type=path_of)
    )

    @property
    def worker(self) -> WorkerOptions:
        """How the worker runs."""
        return WorkerOptions(self.aio, self.poll_us)


def parse(arguments: list[str], *, activated_fd: int | None = None) -> Options:
    """The options; *activated_fd* is the socket of a command line that names none.

    Raises: UsageError naming the option, the value and the limit.
    """
    given = vars(_parser().parse_args(arguments))
    if activated_fd is not None and given.keys().isdisjoint({"socket_path", "fd"}):
        given["fd"] = activated_fd
    options = Options(
        **{each.name: each.metadata["into"](given[each.name]) for each in fields(Options) if each.name in given}
    )
    _require_sense(options)
    if options.socket_group is not None and options.socket_mode is None:
        options = replace(options, socket_mode=GROUP_MODE)
    return replace(options, allow_files=_allowed(options))


def _require_sense(options: Options) -> None:
    """Refuse options that do not go together."""
    if (options.socket_path is None) == (options.fd is None):
        raise UsageError("give one of --socket-path=PATH and --fd=N")
    if options.socket_path is None and (options.socket_mode is not None or options.socket_group is not None):
        raise UsageError("--socket-mode and --socket-group are for a --socket-path=PATH")
    if options.control is not None and options.socket_path is not None:
        _require_two_sockets(options.socket_path, options.control)
    if options.format != "qcow2" and options.lazy_refcounts is not None:
        wish = "on" if options.lazy_refcounts else "off"
        raise UsageError(f"--lazy-refcounts={wish}: a {options.format} image has no refcounts")
    if options.format != "luks" and options.luks_header is not None:
        raise UsageError(f"--luks-header={options.luks_header}: a {options.format} image has no such file")
    if options.incoming and options.trace_io:
        raise UsageError("--incoming and --trace-io: a trace begins with the image")


def _require_two_sockets(socket_path: str, control: str) -> None:
    if os.path.realpath(socket_path) == os.path.realpath(control):
        raise UsageError(f"--socket-path={socket_path} and --control={control}: one socket cannot be both")


def _allowed(options: Options) -> tuple[str, ...] | None:
    """The directories of what images may name: absolute, as they were meant when the daemon started."""
    given = options.allow_files
    if given is None and options.sandbox:
        given = (os.path.dirname(os.path.realpath(options.blk_file)),)
    return None if given is None else tuple(map(os.path.abspath, given))


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
    """One that tells what was given, and nothing of what was not."""
    parser = Parser(
        prog=PROGRAM,
        allow_abbrev=False,
        description="Serve a disk image to a virtual machine.",
        epilog=f"{PROGRAM} ctl --help and {PROGRAM} libvirt-xml --help tell what else it does.",
        argument_default=argparse.SUPPRESS,
    )
    for each in fields(Options):
        flag = each.metadata["flag"] or f"--{each.name.replace('_', '-')}"
        parser.add_argument(flag, dest=each.name, **each.metadata["words"])
    parser.add_argument("--version", action="store_true", help="say which version this is, and exit")
    parser.add_argument(
        "--print-capabilities", action="store_true", help="say what this program can do, as JSON, and exit"
    )
    return parser
