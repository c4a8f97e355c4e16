"""The `vhost-user-qcow2` command line: open an image, put it under a device, serve it until a signal."""

import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vhost import PROGRAM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from qcow2.engine.encryption import Keyring
    from qcow2.engine.statistics import Statistics
    from ring.counter import Counters
    from ring.trace import Trace
    from vhost.controlcommands import TakeSnapshot
    from vhost.device import Device
    from vhost.disk import ImageBackend
    from vhost.endpoint import Endpoint
    from vhost.held import HeldImage
    from vhost.option import Options

    Control = AbstractContextManager[object]

COMMANDS = ("ctl", "libvirt-xml")
PROGRESS_SECONDS = 5
STATS = (
    "requests",
    "reads",
    "writes",
    "flushes",
    "discards",
    "write_zeroes",
    "python_requests",
    "crossings",
    "immediate",
    "stalls",
    "syncs",
)
CAPABILITIES = '{"type": "block", "features": ["blk-file", "read-only"]}'


def main(arguments: list[str] | None = None) -> int:
    """Run the program; the exit status. Where nobody reads what is printed, this process dies of that."""
    if arguments is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until somebody sees to it: nothing has begun that needs an end
    try:
        try:
            return _run(sys.argv[1:] if arguments is None else arguments)
        finally:
            if sys.stdout is not None:  # None where it was closed when Python started
                sys.stdout.flush()
    except BrokenPipeError:
        from qcow2.tool.interruption import die_of_closed_pipe

        return die_of_closed_pipe()
    except OSError as error:
        sys.stdout = None  # Python would try again at exit, and complain itself
        return _complain(f"standard output: {error.strerror}")


def _run(arguments: list[str]) -> int:
    """Serve, or do what else *arguments* say. Imports come late: asking for the capabilities must cost nothing."""
    if "--version" in arguments:
        import qcow2

        print(f"{PROGRAM} version {qcow2.__version__}")
        return 0
    if "--print-capabilities" in arguments:
        print(CAPABILITIES)
        return 0
    if arguments and arguments[0] not in COMMANDS and not arguments[0].startswith("-"):
        return _complain(
            f"{arguments[0]!r} is no command: those are {', '.join(COMMANDS)}; else options serve an image"
        )
    if arguments[:1] == ["ctl"]:
        from qcow2.tool.interruption import run_to_end
        from vhost.controlclient import main as control

        return run_to_end(lambda: control(arguments[1:]))
    from vhost.argument import UsageError
    from vhost.option import parse, whole_parser
    from vhost.systemd import activated_fd

    try:
        if arguments[:1] == ["libvirt-xml"]:
            if {"-h", "--help"} & {*arguments}:
                whole_parser().parse_args(arguments)  # which prints it, and exits
            return _print_xml(parse(arguments[1:]))
        options = parse(arguments, activated_fd=activated_fd())
    except (UsageError, ValueError) as error:
        return _complain(str(error))
    return _serve(options)


def _print_xml(options: "Options") -> int:
    from vhost.libvirt import disk_xml

    if options.socket_path is None:
        return _complain("libvirt-xml: give --socket-path=PATH")
    print(disk_xml(options), end="")
    return 0


def _serve(options: "Options") -> int:
    import logging

    import ring._native
    from qcow2.sources import StaleExtension, require_current
    from qcow2.tool.stdio import occupy
    from vhost.endpoint import EndpointError
    from vhost.limits import raise_descriptor_limit, share_the_heap
    from vhost.signals import stop_signals
    from vhost.stderr import Stderr
    from virtio.block import Unavailable

    try:
        occupy()
        with stop_signals(is_last=True) as stop_fd:
            require_current(ring._native)
            logging.basicConfig(level=logging.WARNING, format=f"{PROGRAM}: %(message)s", handlers=[Stderr()])
            raise_descriptor_limit()
            share_the_heap()
            serve_image(options, stop_fd)
    except (EndpointError, Unavailable, StaleExtension) as error:
        return _complain(str(error))
    except OSError as error:
        return _complain(f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error))
    except MemoryError:
        return _complain("out of memory")
    return 0


def _complain(text: str) -> int:
    """Say what is wrong on one line."""
    print(f"{PROGRAM}: {' '.join(text.split())}", file=sys.stderr)
    return 1


def serve_image(options: "Options", stop_fd: int) -> None:
    """Serve an image as *options* say until *stop_fd* is readable, at SIGTERM or SIGINT, and close it cleanly.

    The socket's path comes first: one that cannot be used leaves the image untouched. It listens last. A signal ends a
    repair too, which the next open begins anew.
    Raises: EndpointError, Unavailable, OSError.
    """
    import gc
    from contextlib import ExitStack
    from functools import partial

    from qcow2.node.logplace import tell_if_no_place
    from vhost.daemon import run
    from vhost.disk import ImageBackend
    from vhost.held import HeldImage
    from vhost.systemd import ServiceManager
    from virtio.block import Unavailable

    with ExitStack() as stack:
        manager = stack.enter_context(ServiceManager())
        endpoint = stack.enter_context(_endpoint(options))
        control = stack.enter_context(_control(options, stop_fd))
        tell_if_no_place(options.link_log)
        options = stack.enter_context(_with_private_logs(options))
        progress = partial(_repair_progress, stop_fd)
        try:
            keys = _keys(options, stop_fd)
            # What is there by now stays: a search through it held up requests for 80 ms on a busy machine. The image
            # comes later, or it would never be collected.
            gc.freeze()
            held = stack.enter_context(HeldImage(options, progress, partial(_stop_if_asked, stop_fd), keys))
            if options.incoming:
                held.look()
            else:
                held.take()
            if options.trace_io is not None and held.encrypted_in() is not None:
                raise Unavailable(f"--trace-io={options.trace_io}: would hold what an encrypted disk keeps secret")
            trace = stack.enter_context(_trace(options.trace_io)) if options.trace_io is not None else None
            if options.sandbox:
                _confine(options)
            backend = ImageBackend(held, cache=options.cache, trace=trace)

            def control_of(device: "Device") -> "Control":
                return control(device, backend, held, _snapshots(options, device, backend, held))

            counters = run(
                backend,
                endpoint,
                stop_fd,
                num_queues=options.num_queues,
                writeback=options.cache.writeback,
                worker=options.worker,
                control=_sealed(control_of) if options.sandbox else control_of,
                on_ready=manager.tell_ready,
            )
            manager.tell_stopping()
        except Stopped:
            return
        held.end()  # while a second signal still cannot interrupt it
    if options.stats:
        print(_stats(counters, held.statistics), flush=True)


def _keys(options: "Options", stop_fd: int) -> "Keyring | None":
    """What opens encrypted images. From here on nothing that we have in memory gets into a core dump.

    Raises: Unavailable; Stopped if a signal came before the keys.
    """
    if not options.key_fds and not options.key_files:
        return None
    from functools import partial

    from qcow2.engine.encryption import Keyring
    from qcow2.plane.cipher import keep_secrets
    from vhost.endpoint import is_readable
    from vhost.keys import Keys

    def wait(fd: int) -> None:
        if not is_readable(fd, stop_fd):
            raise Stopped

    keep_secrets()
    keys = Keys(options.key_fds, options.key_files, wait)
    return Keyring(keys, partial(_stop_if_asked, stop_fd), are_ranked=True)


@contextmanager
def _control(
    options: "Options", stop_fd: int
) -> "Iterator[Callable[[Device, ImageBackend, HeldImage, TakeSnapshot], Control]]":
    """What makes a control socket of a device, if there is to be one; the path is taken here and now."""
    from contextlib import nullcontext

    if options.control is None:
        yield lambda device, backend, held, take_snapshot: nullcontext()
        return
    from vhost.controlcommands import Commands
    from vhost.controlsocket import Control
    from vhost.endpoint import listen
    from vhost.errorevents import telling_errors
    from vhost.event import Event
    from vhost.exports import Exports
    from vhost.imagecommands import ImageCommands
    from vhost.jobcommands import JobCommands
    from vhost.jobs import Jobs

    image = {"image": options.blk_file, "format": options.format, "read-only": options.read_only}
    refusal = "no export: a daemon with --sandbox starts no other program" if options.sandbox else ""
    exports = Exports(options.blk_file, options.allow_files, refusal)
    with listen(options.control, mode=0o600, at_once=False) as endpoint, exports:

        @contextmanager
        def begin(
            device: "Device", backend: "ImageBackend", held: "HeldImage", take_snapshot: "TakeSnapshot"
        ) -> "Iterator[None]":
            jobs = Jobs(device, backend, lambda report: commands.on_event(Event("job", report.as_json())))
            on_jobs = JobCommands(device, backend, held, jobs, lambda *taken: commands.tell_of_snapshot(*taken))
            on_image = ImageCommands(device, backend, held, jobs.require_none)

            def describe() -> dict[str, Any]:
                return {**image, "failed": backend.has_failed}

            commands = Commands(device, stop_fd, describe, take_snapshot, on_jobs, exports, on_image)
            with Control(endpoint, commands), telling_errors(commands.on_event), jobs:
                yield

        yield begin


def _snapshots(options: "Options", device: "Device", backend: "ImageBackend", held: "HeldImage") -> "TakeSnapshot":
    """Takes a snapshot of the image, or says that it may not."""
    from vhost.overlaywish import OverlayWish
    from vhost.snapshot import Pace, SnapshotRefused, Snapshots

    def refuse(name: str, pace: Pace, wish: OverlayWish) -> str:
        raise SnapshotRefused("no snapshot: a daemon with --trace-io keeps to the files it has")

    return refuse if options.trace_io is not None else Snapshots(device, backend, held).take


@contextmanager
def _trace(path: str) -> "Iterator[Trace]":
    """A trace in the new file *path*; says so if it ends before the daemon does."""
    import logging
    import os

    from ring.trace import Trace

    with Trace(path) as trace:
        yield trace
    if trace.error:
        logging.getLogger("vhost").warning("%s: the trace ends early: %s", path, os.strerror(trace.error))


def _confine(options: "Options") -> None:
    from qcow2.node.chain import chain_places
    from vhost.held import gate_of
    from vhost.reach import own_directories
    from vhost.sandbox import confine

    places = chain_places(options.blk_file, options.format, gate_of(options), options.data_file)
    images = [path for path, _ in places]
    others = [path for path in (*(path for _, path in places), options.luks_header) if path is not None]
    changed = () if options.read_only else (images[0], places[0][1])
    confine(
        images=images + others,
        changed=[path for path in changed if path is not None],
        log_directory=options.link_log,
        sockets=[path for path in (options.socket_path, options.control) if path is not None],
        directories=own_directories(options),
    )


@contextmanager
def _with_private_logs(options: "Options") -> "Iterator[Options]":
    """A sandboxed daemon reaches no link log but its own."""
    from dataclasses import replace

    from qcow2.node.logplace import private_directory

    if not options.sandbox or options.read_only:
        yield options
        return
    with private_directory(options.link_log) as path:
        yield replace(options, link_log=path)


def _sealed(control: "Callable[[Device], Control]") -> "Callable[[Device], Control]":
    """Seal the sandbox once the device has its worker, then go on with *control*."""
    from vhost.sandbox import seal

    def begin(device: "Device") -> "Control":
        seal()
        return control(device)

    return begin


class Stopped(Exception):
    """A signal came before the image was open; the main thread's."""


def _stop_if_asked(stop_fd: int) -> None:
    """Raise Stopped once a signal came; on a thread of the control socket, which others await, an OSError."""
    import errno
    import threading

    from vhost.endpoint import is_stopping

    if is_stopping(stop_fd):
        if threading.current_thread() is threading.main_thread():
            raise Stopped
        raise OSError(errno.ECANCELED, "the daemon is ending")


def _repair_progress(stop_fd: int, path: str) -> "Callable[[int, int], None]":
    """Say that the image is being repaired, and every few seconds how far it is; raise Stopped once a signal came."""
    import logging
    import time

    log = logging.getLogger("vhost")
    told = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal told
        _stop_if_asked(stop_fd)
        if not told:
            log.warning("%s: was not closed cleanly, repairing it", path)
            told = time.monotonic()
        elif time.monotonic() - told > PROGRESS_SECONDS:
            log.warning("%s: repairing, %d %%", path, 100 * done // max(total, 1))
            told = time.monotonic()

    return progress


def _endpoint(options: "Options") -> "AbstractContextManager[Endpoint]":
    from vhost.endpoint import inherit, listen

    if options.socket_path is not None:
        return listen(options.socket_path, mode=options.socket_mode, group=options.socket_group, at_once=False)
    assert options.fd is not None  # by `parse`: one of the two
    return inherit(options.fd)


def _stats(counters: "Counters", statistics: "Statistics") -> str:
    """One line of JSON: what the data plane and the engine counted."""
    import json

    return json.dumps(
        {
            **{name: getattr(counters, name) for name in STATS},
            "metadata_writes": statistics.metadata_writes,
            "clusters_allocated": statistics.clusters_allocated,
            "bytes_read": counters.read_bytes,
            "bytes_written": counters.written_bytes,
        }
    )
