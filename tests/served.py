"""An image served by a device of this very process, for what no command line can ask: `device.resize` and the like."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vhost.daemon import receive_visitors
from vhost.device import Device
from vhost.disk import ImageBackend
from vhost.endpoint import listen
from vhost.held import HeldImage
from vhost.option import Options


@dataclass(frozen=True)
class Served:
    """The device, and where front-ends find it."""

    device: Device
    backend: ImageBackend
    held: HeldImage
    socket_path: Path


@contextmanager
def serve(image: Path, *, format: str = "qcow2", writable: bool = True, beside: Path | None = None) -> Iterator[Served]:
    """Serve *image*, front-end after front-end; leaving ends that as SIGTERM ends the daemon.

    The socket is in the directory *beside*; by default, in the image's.
    """
    socket_path = (beside or image.parent) / f"{image.name}.sock"
    stop_fd = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        options = Options(blk_file=str(image), format=format, read_only=not writable)
        with HeldImage(options) as held:
            held.take()
            backend = ImageBackend(held, cache=options.cache)
            with Device(backend, num_queues=4, writeback=True) as device, listen(str(socket_path)) as endpoint:
                control = threading.Thread(target=receive_visitors, args=(endpoint, stop_fd, device))
                control.start()
                try:
                    yield Served(device, backend, held, socket_path)
                finally:
                    os.eventfd_write(stop_fd, 1)
                    control.join()
    finally:
        os.close(stop_fd)
