"""vhost-user: block devices served to a virtual machine over a Unix socket."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vhost.client import Control, ControlError
    from virtio.block import Backend, BlockDevice

__all__ = ["Control", "ControlError", "serve"]
PROGRAM = "vhost-user-qcow2"


def __getattr__(name: str) -> object:
    """The client of a control socket comes when it is asked for, so that importing the package stays cheap."""
    if name not in ("Control", "ControlError"):
        raise AttributeError(f"module 'vhost' has no attribute {name!r}")
    from vhost import client

    return getattr(client, name)


def serve(device: "BlockDevice | Backend", *, socket_path: str, num_queues: int = 128, writeback: bool = True) -> None:
    """Serve *device* on *socket_path* until SIGTERM or the like; one front-end at a time, the next when it leaves.

    For the main thread. *writeback* says whether completed writes may be volatile until the guest flushes.
    Raises: EndpointError if the socket cannot be used, ValueError if the device describes itself impossibly.
    """
    from vhost.daemon import run  # here, so that importing the package stays cheap
    from vhost.endpoint import listen
    from vhost.signals import stop_signals
    from virtio.block import BlockDevice, DeviceBackend

    backend = DeviceBackend(device) if isinstance(device, BlockDevice) else device
    with stop_signals() as stop_fd, listen(socket_path, at_once=False) as endpoint:
        run(backend, endpoint, stop_fd, num_queues=num_queues, writeback=writeback)
