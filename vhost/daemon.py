"""The daemon: one device, one path, one front-end at a time; restartable, stopped by a signal."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from ring.aio import PLAIN, WorkerOptions
from ring.counter import Counters
from vhost.channel import Channel, Hangup
from vhost.connection import Connection
from vhost.device import Device
from vhost.endpoint import Endpoint, is_stopping
from vhost.message import ProtocolViolation
from vhost.session import Session
from virtio.block import Backend, Unavailable
from virtio.config import WCE_OFFSET

log = logging.getLogger("vhost")


def run(
    backend: Backend,
    endpoint: Endpoint,
    stop_fd: int,
    *,
    num_queues: int,
    writeback: bool,
    worker: WorkerOptions = PLAIN,
    control: Callable[[Device], AbstractContextManager[object]] = lambda device: nullcontext(),
    on_ready: Callable[[], None] = lambda: None,
) -> Counters:
    """Serve *backend* to whoever comes to *endpoint* until *stop_fd* is readable; then drain and detach it.

    What *control* makes of the device is entered while it is served. *on_ready* is told when front-ends may come:
    nothing can fail any more that would cut one off while we greet each other.
    Raises: EndpointError.
    """
    with (
        Device(backend, num_queues=num_queues, writeback=writeback, worker=worker) as device,
        control(device),
    ):
        endpoint.begin()
        on_ready()
        receive_visitors(endpoint, stop_fd, device)
    return device.worker.counters


def receive_visitors(endpoint: Endpoint, stop_fd: int, device: Device) -> None:
    """Let one front-end after the other use *device*, until *stop_fd* is readable."""
    wce = bool(device.offer.config[WCE_OFFSET])
    for visitor in endpoint.visitors(stop_fd):
        session = Session(device.offer, wce=wce)
        with Connection(Channel(visitor), session, device) as connection:
            device.session = session
            if (problem := _serve(connection, stop_fd)) and device.told.is_news(problem):
                log.warning("connection closed: %s", problem)
            device.session = None
            if is_stopping(stop_fd):
                # Before this front-end sees us go: QEMU 7.2 comes back within a second, and if whom it finds then ends
                # while they greet each other, it never tries again. A refusal it takes well.
                endpoint.refuse()
        wce = session.wce


def _serve(connection: Connection, stop_fd: int) -> str:
    """Serve one front-end; whatever it does wrong ends here -> what that was, if it did."""
    try:
        connection.serve(stop_fd)
    except (Hangup, ConnectionResetError, BrokenPipeError):
        log.info("the front-end left")
    except (ProtocolViolation, OSError, Unavailable) as error:
        return str(error)
    except MemoryError:
        return "out of memory"
    return ""
