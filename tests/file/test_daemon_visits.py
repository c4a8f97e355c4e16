"""Front-ends that go away at any moment, or say something else than they should: nothing of them stays.

A whole valid conversation is recorded from a front-end of our own, then replayed cut off at every byte, and mutated.
"""

import os
import random
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.frontend import GET_FEATURES, VERSION, FrontEnd
from tests.patience import TIMEOUT
from tests.program import Daemon

VISITS = 1000
NOISE_KIB = 1024  # of resident memory between 10 and 1,000 visits: an allocator's, not 990 visits' worth of anything
MUTANTS = 150


@dataclass
class Spoken:
    """One message and the fds that came with it, ours to keep."""

    data: bytes
    fds: list[int]


class Recorder(FrontEnd):
    """A front-end that keeps what it says."""

    spoken: list[Spoken]

    def _send(self, request: int, payload: bytes, *, fds: tuple[int, ...] = (), flags: int = VERSION) -> None:
        header = struct.pack("<III", request, flags, len(payload))
        self.spoken.append(Spoken(header + payload, [os.dup(fd) for fd in fds]))
        super()._send(request, payload, fds=fds, flags=flags)


@dataclass
class Conversation:
    """All of a visit, message by message."""

    spoken: list[Spoken] = field(default_factory=list)

    def send(self, visitor: socket.socket, nbytes: int) -> None:
        """Say the first *nbytes* of it."""
        for message in self.spoken:
            part = message.data[:nbytes]
            if not part:
                return
            socket.send_fds(visitor, [part], message.fds)
            nbytes -= len(part)

    def __len__(self) -> int:
        return sum(len(message.data) for message in self.spoken)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    image = tmp_path / "disk.raw"
    image.write_bytes(b"intact\n".ljust(1 << 20, b"\0"))
    with Daemon(image, "--format=raw") as running:
        yield running
        running.stop()


@contextmanager
def recording(daemon: Daemon, *, queues: int, inflight: bool) -> Iterator[tuple[Conversation, FrontEnd]]:
    """Record what a front-end says from its first word on; its fds are closed at the end."""
    conversation = Conversation()

    class Once(Recorder):
        spoken = conversation.spoken

    try:
        with Once(daemon.socket_path, queues=queues, inflight=inflight) as guest:
            yield conversation, guest
    finally:
        for message in conversation.spoken:
            for fd in message.fds:
                os.close(fd)


@pytest.fixture
def conversation(daemon: Daemon) -> Iterator[Conversation]:
    """Everything our front-end can say: memory, rings, in-flight region, log, channel, configuration, the end."""
    with recording(daemon, queues=2, inflight=True) as (conversation, guest):
        guest.read(0, 512)
        guest.read_config()
        guest.set_writeback(False)
        guest.set_writeback(True)
        log = os.memfd_create("log")
        os.ftruncate(log, 1 << 20)
        guest.set_log(log, 1 << 20)
        guest.log(True)
        guest.log(False)
        os.close(log)
        guest.open_backend_channel().close()
        guest.stop_queue(1)
        guest.socket.close()
        yield conversation


@dataclass(frozen=True)
class Held:
    """What the daemon holds, as the kernel counts it."""

    fds: tuple[str, ...]
    mappings: int
    threads: int


def held(daemon: Daemon) -> Held:
    """Counted while a proper front-end is served, so that whoever came before is forgotten."""
    process = Path(f"/proc/{daemon.process.pid}")
    with FrontEnd(daemon.socket_path) as guest:
        assert guest.read(0, 512).startswith(b"intact")
        kinds = [os.readlink(fd).partition("[")[0].partition(":")[0] for fd in (process / "fd").iterdir()]
        mappings = sum(" rw-s " in line for line in (process / "maps").read_text().splitlines())
        return Held(tuple(sorted(kinds)), mappings, len(list((process / "task").iterdir())))


def resident_kib(daemon: Daemon) -> int:
    for line in Path(f"/proc/{daemon.process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError("no VmRSS")


def connect(daemon: Daemon) -> socket.socket:
    visitor = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    visitor.settimeout(TIMEOUT)
    visitor.connect(str(daemon.socket_path))
    return visitor


def is_answering(daemon: Daemon) -> bool:
    """Whether a next front-end gets an answer, which it gets once the one before is forgotten."""
    with connect(daemon) as visitor:
        visitor.sendall(struct.pack("<III", GET_FEATURES, VERSION, 0))
        return len(visitor.recv(20)) == 20


def test_a_front_end_may_go_at_every_byte(daemon: Daemon, conversation: Conversation) -> None:
    """After each, the daemon answers the next; after all, it holds what it held before."""
    before = held(daemon)
    assert len(conversation.spoken) >= 30
    for nbytes in range(1, len(conversation)):
        with connect(daemon) as visitor:
            conversation.send(visitor, nbytes)
        assert is_answering(daemon)
    assert held(daemon) == before


def mutate(rng: random.Random, conversation: Conversation) -> list[Spoken]:
    """The conversation with messages lost, repeated, swapped, with other bytes and other fds."""
    mutant = list(conversation.spoken)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(len(mutant))
        chosen = mutant[at]
        match rng.randrange(6):
            case 0:
                del mutant[at]
            case 1:
                mutant.insert(rng.randrange(len(mutant)), chosen)
            case 2:
                other = rng.randrange(len(mutant))
                mutant[at], mutant[other] = mutant[other], chosen
            case 3 | 4:
                data = bytearray(chosen.data)
                data[rng.choice([0, 4, *range(12, len(data))])] = rng.choice([0, 1, 2, 3, 8, 0x40, 0x7F, 0x80, 0xFF])
                mutant[at] = Spoken(bytes(data), chosen.fds)
            case _:
                strangers = [fd for message in conversation.spoken for fd in message.fds]
                mutant[at] = Spoken(chosen.data, [rng.choice(strangers) for _ in range(rng.randrange(4))])
    return mutant


def test_mutated_conversations_leave_nothing(daemon: Daemon, conversation: Conversation) -> None:
    before = held(daemon)
    for seed in range(MUTANTS):
        with connect(daemon) as visitor:
            try:
                for message in mutate(random.Random(seed), conversation):
                    socket.send_fds(visitor, [message.data], message.fds)
                visitor.shutdown(socket.SHUT_WR)
                while visitor.recv(4096):
                    pass
            except (BrokenPipeError, ConnectionResetError):
                pass
        assert is_answering(daemon), f"seed {seed}"
    assert held(daemon) == before


def test_1000_visits_leave_what_10_left(daemon: Daemon) -> None:
    """Each visit maps memory, starts a ring, is served, and goes: descriptors, mappings, threads, memory."""

    def visit(count: int) -> tuple[Held, int]:
        for _ in range(count):
            with connect(daemon) as visitor:
                conversation.send(visitor, len(conversation))
                visitor.shutdown(socket.SHUT_WR)
                while visitor.recv(4096):
                    pass
        return held(daemon), resident_kib(daemon)

    with recording(daemon, queues=1, inflight=False) as (conversation, guest):
        guest.socket.close()
        after_10, memory_after_10 = visit(10)
        after_1000, memory_after_1000 = visit(VISITS - 10)
    print(f"after 10 visits: {after_10}, {memory_after_10} KiB; after {VISITS}: {memory_after_1000} KiB")
    assert after_1000 == after_10
    assert memory_after_1000 - memory_after_10 < NOISE_KIB
