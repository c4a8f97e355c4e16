"""Socket activation and notification of systemd, as sd_listen_fds(3) and sd_notify(3) describe them."""

import os
import socket

FIRST_FD = 3  # SD_LISTEN_FDS_START


def activated_fd() -> int | None:
    """The socket that we were started with, if it was meant for us; what names it leaves the environment.

    Raises: ValueError if there are several.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdigit() or int(count) == 0:
        return None
    if int(count) > 1:
        raise ValueError(f"systemd passed {count} sockets, one is enough")
    os.set_inheritable(FIRST_FD, False)
    return FIRST_FD


def notify(state: str) -> None:
    """Tell the service manager, if there is one that wants to know. Raises: OSError if it does not listen."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address is None:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect("\0" + address[1:] if address.startswith("@") else address)
        sender.send(state.encode())
