"""The daemon: one device, one path, one front-end at a time; restartable, stopped by a signal."""

import contextlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator

from ring.counter import Counters
from ring.memory import REGIONS_MAX
from ring.virtqueue import SIZE_MAX
from ring.worker import Worker
from vhost.channel import Channel, Hangup
from vhost.connection import Connection
from vhost.endpoint import Endpoint
from vhost.message import ProtocolViolation
from vhost.session import Offer, Session
from virtio.block import Backend
from virtio.config import MAX_RANGE_SECTORS, WCE_OFFSET, block_config
from virtio.feature import offered_features
from virtio.native import NativeBlock

DEFAULT_QUEUES = 128  # QEMU asks for one a vCPU
SOFTWARE_ERROR = 70  # EX_SOFTWARE

log = logging.getLogger("vhost")


@contextlib.contextmanager
def stop_signals() -> Iterator[int]:
    """An eventfd that becomes readable at SIGTERM or SIGINT. Main thread only."""
    stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def ask_to_stop(_number: int, _frame: object) -> None:
        os.eventfd_write(stop_fd, 1)

    before = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop_fd
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
        os.close(stop_fd)


def run(backend: Backend, endpoint: Endpoint, stop_fd: int, *, num_queues: int, writeback: bool) -> Counters:
    """Serve *backend* to whoever comes to *endpoint* until *stop_fd* is readable; then drain and detach it."""
    block = _native_block(backend)
    offer = _offer(backend, num_queues=num_queues, writeback=writeback)
    with Worker(block, backend.start, on_queue_broken=_tell_of_broken_queue, on_death=_die) as worker:
        worker.call(lambda: backend.attach(worker, block))
        try:
            _receive_visitors(endpoint, stop_fd, offer, worker, backend, block)
        finally:
            worker.call(backend.detach)
    return worker.counters


def _native_block(backend: Backend) -> NativeBlock:
    geometry = backend.geometry
    limit = 0 if geometry.read_only else MAX_RANGE_SECTORS
    return NativeBlock(
        size=geometry.size,
        block_size=geometry.block_size,
        read_only=geometry.read_only,
        serial=geometry.serial,
        max_discard_sectors=limit,
        max_write_zeroes_sectors=limit,
    )


def _offer(backend: Backend, *, num_queues: int, writeback: bool) -> Offer:
    config = block_config(backend.geometry, num_queues=num_queues, wce=writeback)
    features = offered_features(read_only=backend.geometry.read_only)
    return Offer(features, num_queues, SIZE_MAX, REGIONS_MAX, config.pack())


def _receive_visitors(
    endpoint: Endpoint, stop_fd: int, offer: Offer, worker: Worker, backend: Backend, block: NativeBlock
) -> None:
    wce = bool(offer.config[WCE_OFFSET])
    for visitor in endpoint.visitors(stop_fd):
        session = Session(offer, wce=wce)
        with Connection(Channel(visitor), session, worker, backend, block) as connection:
            _serve(connection, stop_fd)
        wce = session.wce


def _serve(connection: Connection, stop_fd: int) -> None:
    """Serve one front-end; whatever it does wrong ends here."""
    try:
        connection.serve(stop_fd)
    except (Hangup, ConnectionResetError, BrokenPipeError):
        log.info("the front-end left")
    except ProtocolViolation as violation:
        log.warning("connection closed: %s", violation)
    except OSError as error:
        log.warning("connection closed: %s", error)


def _tell_of_broken_queue(index: int, fault: str) -> None:
    log.warning("queue %d stopped: %s", index, fault)


def _die(error: BaseException) -> None:
    """The worker thread raised: a bug of ours. The process ends loudly, the image as a crash would leave it."""
    traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(SOFTWARE_ERROR)
