"""Who comes to the control socket is let in and greeted at once, whatever command keeps the others waiting."""

import json
import select
import socket
import threading
from collections.abc import Callable

from ring.thread import start_deaf
from vhost.controlcommands import COMMANDS, VERSION
from vhost.device import die
from vhost.endpoint import Door, is_stopping

CLIENTS_MAX = 16
LOOKS, LOOK_MILLISECONDS = 20, 10  # at whether one of them leaves, before the next is refused
SUBSCRIBE = "subscribe"  # which concerns the connection alone
GREETING = {"vhost-user-qcow2": {"version": VERSION, "commands": [*COMMANDS, SUBSCRIBE]}}
REFUSAL = {"error": f"{CLIENTS_MAX} clients are connected, and no more are served: try again"}


class Greeter:
    """A thread that passes on each client of *listener* to *on_client*, with what it has not taken of the greeting.

    One that has left, and is in the way of another, is passed to *on_gone*. It ends once *stop_fd* is readable.
    """

    def __init__(
        self,
        listener: socket.socket,
        stop_fd: int,
        on_client: Callable[[socket.socket, bytes], None],
        on_gone: Callable[[socket.socket], None],
    ) -> None:
        self._listener = listener
        self._stop_fd = stop_fd
        self._on_client = on_client
        self._on_gone = on_gone
        self._door = Door(listener, stop_fd)
        self._present: set[socket.socket] = set()  # those passed on, open as long as they are in it
        self._changing = threading.Lock()  # guards that
        self._thread = threading.Thread(target=self._main, name="greeter", daemon=True)

    def start(self) -> None:
        """Raises: OSError if there is no thread to be had."""
        start_deaf(self._thread)

    def join(self) -> None:
        """Return once nobody is let in any more."""
        self._thread.join()

    def leave(self, client: socket.socket) -> None:
        """*client*, which was passed on, is about to be closed; for any thread."""
        with self._changing:
            self._present.discard(client)

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
        has_room = self._await_room()
        line = json.dumps(GREETING if has_room else REFUSAL).encode() + b"\n"
        try:
            line = line[visitor.send(line) :]
        except BlockingIOError:
            pass
        except OSError:  # it has left
            has_room = False
        if not has_room:
            visitor.close()
            return
        with self._changing:
            self._present.add(visitor)
        self._on_client(visitor, line)

    def _await_room(self) -> bool:
        """Whether one more may be let in, now or in a moment: who has just left may not be dropped yet."""
        for _ in range(LOOKS):
            if self._has_room():
                return True
            if is_stopping(self._stop_fd, LOOK_MILLISECONDS):
                break
        return False

    def _has_room(self) -> bool:
        with self._changing:
            if len(self._present) < CLIENTS_MAX:
                return True
            gone = {client for client in self._present if _has_left(client)}
            self._present -= gone
        for client in gone:
            self._on_gone(client)
        return bool(gone)


def _has_left(client: socket.socket) -> bool:
    """Whether it has hung up, and all that it sent is read."""
    hangup = select.poll()
    hangup.register(client, 0)  # which is told of, whatever one asks for
    if not hangup.poll(0):
        return False
    try:
        return not client.recv(1, socket.MSG_PEEK)
    except OSError:
        return True
