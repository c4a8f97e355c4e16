"""The back-end channel: requests of ours that the front-end answers, or not, whenever it likes."""

import errno
import socket

from vhost.channel import Channel, Hangup, close_received
from vhost.message import REPLY_FLAGS, U64, VERSION, BackendRequest, HeaderFlag, ProtocolViolation


class BackendChannel:
    """The socket that came with SET_BACKEND_REQ_FD. Nobody ever waits for what arrives on it."""

    def __init__(self, fd: int, *, acks: bool) -> None:
        """Take over *fd*; *acks*: the front-end acknowledges requests that ask for it.

        Raises: OSError if it is not a Unix socket: to close another kind may take as long as its peer likes.
        """
        self._channel = Channel(_socket(fd))
        self._flags = VERSION | (HeaderFlag.NEED_REPLY if acks else 0)

    def fileno(self) -> int:
        return self._channel.fileno()

    def close(self) -> None:
        self._channel.close()

    def tell_config_change(self) -> None:
        """Say that the configuration space has changed.

        Raises: OSError if the channel is broken, ProtocolViolation if nobody reads it.
        """
        self._channel.send(BackendRequest.CONFIG_CHANGE_MSG, self._flags, b"")

    def receive_ack(self) -> bool:
        """Take one that has arrived; False once the front-end has closed the channel.

        One a call: a flood of them must not keep others waiting. One that nobody asked for is dropped, too.
        Raises: ProtocolViolation for anything but an acknowledgement.
        """
        try:
            received = self._channel.receive()
        except (Hangup, ConnectionResetError):
            return False
        if received is not None:
            message, fds = received
            fds.close()
            if message.request != BackendRequest.CONFIG_CHANGE_MSG or message.flags != REPLY_FLAGS:
                raise ProtocolViolation(f"message {message.request} on the back-end channel is no acknowledgement")
            U64.parse(message.payload)  # whether it could read the space; if not, it keeps what it knew
        return True


def _socket(fd: int) -> socket.socket:
    try:
        found = socket.socket(fileno=fd)
    except OSError:
        close_received(fd)
        raise
    if found.family == socket.AF_UNIX:
        return found
    close_received(found.detach())
    raise OSError(errno.EPROTOTYPE, "the channel for our own requests is no Unix socket")
