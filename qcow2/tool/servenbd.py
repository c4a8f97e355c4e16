"""`qcow2 serve-nbd`: offer a disk to NBD clients, as qemu-nbd does."""

import argparse
import os
import select
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

from qcow2.driver.shared import SharedDriver
from qcow2.engine.opened import OpenOptions
from qcow2.native import lib
from qcow2.nbd.export import Cache, Export, Terms
from qcow2.nbd.listening import inherited, listening_on_path, listening_on_port
from qcow2.nbd.server import Server
from qcow2.node.chain import Chain
from qcow2.node.gate import Gate
from qcow2.node.node import Node
from qcow2.tool.failure import UsageError
from qcow2.tool.file import add_log_options, log_of
from qcow2.tool.interruption import ENDS
from qcow2.tool.named import add_format_option, add_image_options, the_image
from qcow2.tool.source import wanted_snapshot

PORT = 10809
ADDRESS = "localhost"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `qcow2 serve-nbd`."""
    add_format_option(parser)
    add_image_options(parser)
    add_log_options(parser)
    parser.add_argument("-k", "--socket", metavar="PATH", help="listen on a Unix socket there")
    parser.add_argument("-p", "--port", type=int, metavar="PORT", help=f"listen on this TCP port (default: {PORT})")
    parser.add_argument("-b", "--bind", metavar="ADDRESS", help=f"listen on this address (default: {ADDRESS})")
    parser.add_argument("-r", "--read-only", action="store_true", help="let nobody write")
    parser.add_argument("-x", "--export-name", default="", metavar="NAME", help="what clients ask for (default: '')")
    parser.add_argument("-D", "--description", default="", metavar="TEXT", help="what clients are told of it")
    parser.add_argument(
        "-l", "--snapshot", "--snapshot-id", "--load-snapshot", metavar="SNAPSHOT", help="an id or a name; read-only"
    )
    parser.add_argument(
        "-B", "--bitmap", action="append", default=[], metavar="NAME", help="let clients ask what this bitmap holds"
    )
    parser.add_argument(
        "-A", "--allocation-depth", action="store_true", help="let clients ask which file of the chain has what"
    )
    parser.add_argument("-e", "--shared", type=int, default=1, metavar="N", help="clients at once, 0: any number")
    parser.add_argument("-t", "--persistent", action="store_true", help="go on when the last client has left")
    parser.add_argument(
        "--cache", choices=[each.value for each in Cache], default="writeback", help="as with --cache of qemu-nbd"
    )
    parser.add_argument(
        "--tls-creds", metavar="DIR", help="of server-cert.pem, server-key.pem, ca-cert.pem: nothing without TLS"
    )
    parser.add_argument("--no-tls", action="store_true", help="whoever reaches the address may have the disk, in plain")
    parser.add_argument(
        "--tls-verify-peer", choices=("on", "off"), default="on", help="clients need a certificate too (default: on)"
    )
    parser.add_argument(
        "--allow-files",
        metavar="DIR",
        action="append",
        help="what the image names lies beneath it; repeatable (default: anywhere)",
    )
    parser.add_argument("--fork", action="store_true", help="go on in the background once clients may come")
    parser.add_argument("--end-with-input", action="store_true", help="end when standard input does")
    parser.add_argument("--pid-file", metavar="PATH", help="write the process id there once clients may come")
    parser.add_argument("filename", metavar="FILE", help="the image")


def run_command(arguments: argparse.Namespace) -> int:
    """Serve until a signal comes, or the last client has left; with --fork return once clients may come.

    Raises: UsageError, Failure, OSError, ImageError.
    """
    _validate(arguments)
    given = inherited() if arguments.socket is arguments.port is arguments.bind is None else []
    if not arguments.fork:
        _serve(arguments, given, lambda: None)
        return 0
    ready_fd, tell_fd = os.pipe()
    server = os.fork()  # before there is anything that a child could not have: locks, threads
    if server:
        os.close(tell_fd)
        return 0 if os.read(ready_fd, 1) else max(os.waitstatus_to_exitcode(os.waitpid(server, 0)[1]), 1)
    os.close(ready_fd)
    os.setsid()
    _serve(arguments, given, lambda: _leave_terminal(tell_fd))
    return 0


def _leave_terminal(tell_fd: int) -> None:
    """Nobody reads what we say any more; who waits at *tell_fd* need not."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nowhere, fd)
    os.close(nowhere)
    os.write(tell_fd, b"1")
    os.close(tell_fd)


def _serve(arguments: argparse.Namespace, given: list[socket.socket], on_ready: Callable[[], None]) -> None:
    with ExitStack() as stack, suppress(Stopped):
        stop_fd = stack.enter_context(_stopped_by_signals())
        if arguments.keys is not None:
            arguments.keys.on_wait = partial(_stop_if_asked, stop_fd)
        tls = None
        if arguments.tls_creds is not None:
            from qcow2.nbd.tls import server_context

            tls = server_context(arguments.tls_creds, verifies=arguments.tls_verify_peer == "on")
        driver, node = stack.enter_context(_opened(arguments))
        export = Export(node, driver, _terms(arguments))
        listeners = [stack.enter_context(each) for each in given] or _listeners(arguments, stack)
        if arguments.pid_file is not None:
            with open(arguments.pid_file, "w", encoding="ascii") as file:
                print(os.getpid(), file=file)
        on_ready()
        stop_fds = (stop_fd, 0) if arguments.end_with_input else (stop_fd,)
        Server(export, listeners, limit=arguments.shared, tls=tls, persists=arguments.persistent).run(*stop_fds)


def _terms(arguments: argparse.Namespace) -> Terms:
    return Terms(
        name=arguments.export_name,
        description=arguments.description,
        is_shared=arguments.shared != 1,
        cache=Cache(arguments.cache),
        bitmaps=tuple(arguments.bitmap),
        tells_depth=arguments.allocation_depth,
    )


def _validate(arguments: argparse.Namespace) -> None:
    if arguments.socket is not None and (arguments.port is not None or arguments.bind is not None):
        raise UsageError("--socket and --port or --bind exclude each other")
    if arguments.no_tls and arguments.tls_creds is not None:
        raise UsageError("--no-tls and --tls-creds exclude each other")
    if arguments.fork and arguments.end_with_input:
        raise UsageError("--fork and --end-with-input exclude each other")
    if arguments.shared < 0:
        raise UsageError(f"--shared={arguments.shared} is not a number of clients")
    if not 0 <= (arguments.port or 0) < 1 << 16:
        raise UsageError(f"--port={arguments.port} is not a port")


class Stopped(Exception):
    """A signal came before the image was open."""


def _stop_if_asked(stop_fd: int) -> None:
    if select.select([stop_fd], [], [], 0)[0]:
        raise Stopped


@contextmanager
def _stopped_by_signals() -> Iterator[int]:
    """A descriptor that is readable once a signal has asked us to end."""
    stop_fd = os.eventfd(0, os.EFD_CLOEXEC)
    before = {number: signal.getsignal(number) for number in ENDS}
    for number in ENDS:
        if before[number] is not signal.SIG_IGN:
            lib.tell_at_signal(number, stop_fd)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)  # by a parent of many threads
    try:
        yield stop_fd
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(stop_fd)


@contextmanager
def _opened(arguments: argparse.Namespace) -> Iterator[tuple[SharedDriver, Node]]:
    """The disk, left clean at the end. Raises: Failure, OSError, ImageError."""
    image = the_image(arguments, writes=not arguments.read_only)
    snapshot = wanted_snapshot(arguments)
    writes = not arguments.read_only and snapshot is None
    allowed = None if arguments.allow_files is None else tuple(arguments.allow_files)
    with ExitStack() as stack:
        driver = SharedDriver()
        stack.callback(driver.close)  # a second time does nothing
        chain = Chain(gate=Gate(allowed, allowed), luks_header=image.luks_header, **log_of(arguments))
        stack.enter_context(chain)
        options = OpenOptions(writes, snapshot=snapshot, keys=arguments.keys)
        node = chain.open(image.path, image.image_format, options)
        try:
            yield driver, node
        finally:
            driver.run(node.close())
            driver.close()
            if chain.memory is not None and chain.memory.is_made:
                chain.memory.remove()


def _listeners(arguments: argparse.Namespace, stack: ExitStack) -> list[socket.socket]:
    """Raises: OSError naming the address."""
    if arguments.socket is not None:
        return [stack.enter_context(listening_on_path(arguments.socket))]
    port = PORT if arguments.port is None else arguments.port
    is_open = arguments.tls_creds is not None or arguments.no_tls
    return stack.enter_context(listening_on_port(arguments.bind or ADDRESS, port, is_open=is_open))
