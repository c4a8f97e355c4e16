"""Who comes to the control socket is let in and greeted at once, whatever command keeps the others waiting."""

import json
import select
import socket
import threading
from collections.abc import Callable

from ring.thread import start_deaf
from vhost.controlcommands import COMMANDS, VERSION
from vhost.device import die
from vhost.endpoint import Door

CLIENTS_MAX = 16
SUBSCRIBE = "subscribe"  # which concerns the connection alone
GREETING = {"vhost-user-qcow2": {"version": VERSION, "commands": [*COMMANDS, SUBSCRIBE]}}
REFUSAL = {"error": f"{CLIENTS_MAX} clients are connected, and no more are served: try again"}


class Greeter:
    """A thread that passes on each client of *listener* to *on_client*, with what it has not taken of the greeting.

    It ends once *stop_fd* is readable.
    """

    def __init__(
        self, listener: socket.socket, stop_fd: int, on_client: Callable[[socket.socket, bytes], None]
    ) -> None:
        self._listener = listener
        self._stop_fd = stop_fd
        self._on_client = on_client
        self._door = Door(listener, stop_fd)
        self._free = threading.Semaphore(CLIENTS_MAX)
        self._thread = threading.Thread(target=self._main, name="greeter", daemon=True)

    def start(self) -> None:
        """Raises: OSError if there is no thread to be had."""
        start_deaf(self._thread)

    def join(self) -> None:
        """Return once nobody is let in any more."""
        self._thread.join()

    def leave(self) -> None:
        """A client is gone that was passed on; for any thread."""
        self._free.release()

    def _main(self) -> None:
        try:
            while self._is_called():
                visitor = self._door.open()
                if visitor is not None:
                    self._greet(visitor)
        except BaseException as error:  # a bug of ours: nobody would be let in any more
            die(error)

    def _is_called(self) -> bool:
        """Wait for a visitor; False if it is time to end."""
        poll = select.poll()
        poll.register(self._stop_fd, select.POLLIN)
        poll.register(self._listener, select.POLLIN)
        return all(fd != self._stop_fd for fd, _ in poll.poll())

    def _greet(self, visitor: socket.socket) -> None:
        visitor.setblocking(False)
        has_room = self._free.acquire(blocking=False)
        line = json.dumps(GREETING if has_room else REFUSAL).encode() + b"\n"
        try:
            line = line[visitor.send(line) :]
        except BlockingIOError:
            pass
        except OSError:  # it has left
            visitor.close()
        if has_room and visitor.fileno() >= 0:
            self._on_client(visitor, line)
            return
        visitor.close()
        if has_room:
            self.leave()
