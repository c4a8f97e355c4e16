"""The control socket: lines of JSON in, lines of JSON out, on a thread of its own, one that greets, one that acts.

A client is bounded in everything: one line of at most 64 KiB, one answer at a time, which it reads before it is read
again; sixteen clients. One that breaks a rule is told so and dropped; nobody else notices.

One command is under way at a time. What waits for nobody is answered meanwhile; what else is asked stays in its socket.
"""

import contextlib
import json
import math
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

from ring.thread import start_deaf
from vhost import event
from vhost.commander import Commander
from vhost.controlcommands import AT_ONCE, CommandError, Commands
from vhost.device import die
from vhost.endpoint import Endpoint
from vhost.event import Event
from vhost.greeter import CLIENTS_MAX, SUBSCRIBE, Greeter

LINE_MAX = 64 << 10
UNSENT_MAX = 1 << 20  # bytes that wait for one who does not read the events it asked for


class Client:
    """One connection: what it sent of a line, what we answered and it has not read."""

    def __init__(self, connection: socket.socket, unsent: bytes) -> None:
        self.socket = connection
        self.received = bytearray()
        self.unsent = bytearray(unsent)
        self.is_leaving = False  # once it has read what is unsent
        self.is_waiting = False  # until the command that is under way, its own or another's, is done
        self.wants: frozenset[str] = frozenset()  # events by their names

    def send(self) -> None:
        """Send what it takes now. Raises: OSError if it is gone."""
        with contextlib.suppress(BlockingIOError):
            del self.unsent[: self.socket.send(self.unsent)]

    def receive(self, is_its_turn: Callable[[bytes], bool]) -> bytes | None:
        """The next line, if all of it is there and *is_its_turn*; if that is not so it stays there.

        Raises: OSError if it is gone.
        """
        try:
            there = self.socket.recv(LINE_MAX, socket.MSG_PEEK)
        except BlockingIOError:
            return None
        if not there:
            raise ConnectionResetError
        end = there.find(b"\n") + 1
        line = bytes(self.received) + there[: end - 1]
        if end and not is_its_turn(line):
            self.is_waiting = True
            return None
        self.received += self.socket.recv(end or len(there))
        if not end:
            return None
        self.received.clear()
        return line

    def subscribe(self, request: dict[str, Any]) -> list[str]:
        """Want the events that *request* names from now on, or all; -> what is wanted. Raises: CommandError."""
        names = request.get("events", list(event.NAMES))
        if not isinstance(names, list) or not all(name in event.NAMES for name in names):
            raise CommandError(f"{names!r} is no list of {', '.join(event.NAMES)}")
        if request.keys() - {"command", "id", "events"}:
            raise CommandError(f"{SUBSCRIBE} takes no arguments and perhaps events")
        self.wants |= frozenset(names)
        return sorted(self.wants)


class Control:
    """A context manager: serves *commands* to the clients of *endpoint* while it is entered."""

    def __init__(self, endpoint: Endpoint, commands: Commands) -> None:
        """Without its path, too: the guest is to have its disk. Raises: EndpointError if that is another's by now."""
        endpoint.begin(CLIENTS_MAX, may_be_gone=True)
        self._listener = endpoint.unix_socket
        self._commands = commands
        self._commander = Commander()
        self._is_acting = False  # a command is under way
        self._done: deque[tuple[Client, bytes]] = deque()  # what is to be answered
        self._clients: dict[int, Client] = {}  # whose command was under way last comes last
        self._arrived: deque[Client] = deque()
        self._events: deque[Event] = deque()
        self._thread = threading.Thread(target=self._main, name="control", daemon=True)
        self._stop_fd = -1
        self._event_fd = -1
        self._telling = threading.Lock()  # guards what any thread may use: who arrived, events, answers, and their fd

    def __enter__(self) -> "Control":
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._event_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._commands.on_event = self.tell
        self._greeter = Greeter(self._listener, self._stop_fd, self._welcome, self._lose)
        self._greeter.start()
        self._commander.start()
        start_deaf(self._thread)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._commander.wait()  # what it does is answered
        os.eventfd_write(self._stop_fd, 1)
        self._greeter.join()
        self._thread.join()
        self._commander.end()  # the clients have left
        os.close(self._stop_fd)
        with self._telling:
            os.close(self._event_fd)
            self._event_fd = -1
        for client in self._arrived:
            client.socket.close()

    def tell(self, event: Event) -> None:
        """Send *event* to those who want it; for any thread."""
        with self._telling:
            if self._event_fd >= 0:
                self._events.append(event)
                os.eventfd_write(self._event_fd, 1)

    def _welcome(self, connection: socket.socket, unsent: bytes) -> None:
        """On the greeter's thread."""
        with self._telling:
            self._arrived.append(Client(connection, unsent))
            os.eventfd_write(self._event_fd, 1)

    def _lose(self, connection: socket.socket) -> None:
        """On the greeter's thread: drop one that has left, unless it is among our clients, who are dropped there."""
        with self._telling:
            for client in [client for client in self._arrived if client.socket is connection]:
                self._arrived.remove(client)
                connection.close()

    def _main(self) -> None:
        try:
            self._serve_clients()
        except BaseException as error:  # a bug of ours: nobody would be answered any more
            die(error)

    def _serve_clients(self) -> None:
        while True:
            ready = self._wait()
            has_answered = False
            if self._event_fd in ready:
                os.eventfd_read(self._event_fd)
                self._admit()
                has_answered = self._answer_done()
            if self._stop_fd in ready:
                break
            self._tell_events()
            if has_answered:
                continue  # those who waited were not looked at, and may come before those who did not
            for client in [client for fd, client in self._clients.items() if fd in ready]:
                self._serve(client)
        for client in list(self._clients.values()):
            self._drop(client)

    def _wait(self) -> set[int]:
        poll = select.poll()
        poll.register(self._stop_fd, select.POLLIN)
        poll.register(self._event_fd, select.POLLIN)
        for fd, client in self._clients.items():
            if client.unsent or not client.is_waiting:
                poll.register(fd, select.POLLOUT if client.unsent else select.POLLIN)
        return {fd for fd, _ in poll.poll()}

    def _admit(self) -> None:
        with self._telling:
            while self._arrived:
                client = self._arrived.popleft()
                self._clients[client.socket.fileno()] = client

    def _tell_events(self) -> None:
        while self._events:
            told = self._events.popleft()
            line = _line({"event": told.name, "data": told.data})
            for client in [client for client in self._clients.values() if told.name in client.wants]:
                client.unsent += line
                if len(client.unsent) > UNSENT_MAX:
                    self._drop(client)

    def _drop(self, client: Client) -> None:
        del self._clients[client.socket.fileno()]
        self._greeter.leave(client.socket)
        client.socket.close()
        self._commander.give(partial(self._commands.leave, client))

    def _serve(self, client: Client) -> None:
        try:
            if client.unsent:
                client.send()
            elif (line := client.receive(self._is_turn_of)) is not None:
                self._answer(client, line)
            if len(client.received) > LINE_MAX and not client.unsent:
                client.is_leaving = True
                client.unsent += _line({"error": f"a line is longer than {LINE_MAX} bytes"})
                client.send()
            if client.is_leaving and not client.unsent:
                raise ConnectionResetError
        except OSError:
            self._drop(client)

    def _is_turn_of(self, line: bytes) -> bool:
        return not self._is_acting or _may_be_answered_at_once(_request_of(line))

    def _answer(self, client: Client, line: bytes) -> None:
        """Now, or once the command is done. Raises: OSError if it is gone."""
        request = _request_of(line)
        if _may_be_answered_at_once(request):
            client.unsent += _line(self._reply(client, request))
            client.send()
            return
        self._is_acting = client.is_waiting = True
        self._clients[client.socket.fileno()] = self._clients.pop(client.socket.fileno())
        self._commander.give(partial(self._act, client, request))

    def _act(self, client: Client, request: dict[str, Any] | str) -> None:
        """On the commander's thread."""
        answer = _line(self._reply(client, request))
        with self._telling:
            self._done.append((client, answer))
            os.eventfd_write(self._event_fd, 1)

    def _answer_done(self) -> bool:
        """Let the next command come, if one is done; whether it is."""
        is_done = bool(self._done)
        while self._done:
            client, answer = self._done.popleft()
            self._is_acting = False
            for each in self._clients.values():
                each.is_waiting = False
            if client in self._clients.values():
                client.unsent += answer
                self._serve(client)
        return is_done

    def _reply(self, client: Client, request: dict[str, Any] | str) -> dict[str, Any]:
        if isinstance(request, str):
            return {"error": request}
        tag = {"id": request["id"]} if "id" in request else {}
        try:
            if request.get("command") == SUBSCRIBE:
                return {**tag, "result": client.subscribe(request)}
            return {**tag, "result": self._commands.run(request, client)}
        except (CommandError, OSError) as error:
            return {**tag, "error": str(error)}
        except MemoryError:
            return {**tag, "error": "out of memory"}


def _request_of(line: bytes) -> dict[str, Any] | str:
    """What *line* asks for; or why that is nothing."""
    try:
        request = json.loads(line, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError):
        return "not a line of JSON"
    return request if isinstance(request, dict) else "not a JSON object"


def _finite(text: str) -> float:
    """A number that an answer may repeat: JSON has no others. Raises: ValueError."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number of JSON")
    return number


def _may_be_answered_at_once(request: dict[str, Any] | str) -> bool:
    """Whether it waits for nothing, so that nobody waits for it."""
    return isinstance(request, str) or request.get("command") in (*AT_ONCE, SUBSCRIBE)


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"
