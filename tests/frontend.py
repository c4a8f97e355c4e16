"""A vhost-user-blk front-end and its driver in plain Python, sharing no line with the product: split virtqueues.

Its memory and its rings outlive the daemon, as a guest's do: `reap` still sees what a killed daemon had acknowledged.
Written from the vhost-user and virtio specifications. The 16-bit ring indices are stored and loaded whole through
`memoryview.cast`; system calls between them (kick, poll) order them on any processor.
"""

import mmap
import os
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.patience import TIMEOUT

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
VERSION_1 = 1 << 32
PROTOCOL_FEATURES = 1 << 30
F_LOG_ALL = 1 << 26
F_FLUSH = 1 << 9
F_CONFIG_WCE = 1 << 11
F_MQ = 1 << 12
F_DISCARD = 1 << 13
F_WRITE_ZEROES = 1 << 14

GET_FEATURES, SET_FEATURES, SET_OWNER, SET_MEM_TABLE = 1, 2, 3, 5
SET_LOG_BASE, SET_LOG_FD = 6, 7
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE = 8, 9, 10, 11
SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR = 12, 13, 14
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, SET_VRING_ENABLE = 15, 16, 18
SET_BACKEND_REQ_FD, GET_CONFIG, SET_CONFIG = 21, 24, 25
GET_INFLIGHT_FD, SET_INFLIGHT_FD = 31, 32
ADD_MEM_REG, REM_MEM_REG = 37, 38
CONFIG_CHANGE_MSG = 2  # on the back-end channel
MQ, LOG_SHMFD, REPLY_ACK, BACKEND_REQ = 1 << 0, 1 << 1, 1 << 3, 1 << 5
CONFIG, INFLIGHT_SHMFD, MEM_SLOTS = 1 << 9, 1 << 12, 1 << 15
VERSION, REPLY, NEED_REPLY = 1, 4, 8

WRITABLE, NEXT = 2, 1
QUEUE_SIZE = 256
SLOTS = QUEUE_SIZE // 3  # a request is three descriptors: header, data, status
DATA_BYTES = 256 * 1024
DATA_START = 1 << 17
ZONE = DATA_START + SLOTS * DATA_BYTES  # the memory of one queue: rings, headers and status bytes, data
GUEST_ADDRESS = 0x4000_0000
USER_ADDRESS = 0x7000_0000_0000


class BackendGone(Exception):
    """The daemon closed its end or died."""


@dataclass(frozen=True)
class Completion:
    """A used element: which request, its status byte, for reads the data."""

    slot: int
    status: int
    data: bytes


class Queue:
    """One virtqueue in its zone of the guest's memory, and the requests in flight on it."""

    feature = 0  # what its format needs

    def __init__(self, memory: memoryview, start: int) -> None:
        self.bytes = memory
        self.start = start
        self.descriptors, self.driver_ring, self.device_ring = start, start + 0x4000, start + 0x8000
        self.available_index = memory[self.driver_ring + 2 : self.driver_ring + 4].cast("H")
        self.used_index = memory[self.device_ring + 2 : self.device_ring + 4].cast("H")
        self.free = list(range(SLOTS))
        self.reads: dict[int, int] = {}  # slot: bytes wanted
        self.available = self.used = 0
        self.is_held_back = False
        self.kick, self.call = os.eventfd(0), os.eventfd(0)

    def begin_at(self, index: int) -> None:
        """Be a ring that has been in use before, for *index* requests."""
        self.available = self.used = self.available_index[0] = self.used_index[0] = index

    def base(self) -> int:
        """Where QEMU says that a ring begins or, after a death, goes on."""
        return self.used_index[0]

    def close(self) -> None:
        os.close(self.kick)
        os.close(self.call)
        self.available_index.release()
        self.used_index.release()

    def _header_at(self, slot: int) -> int:
        return self.start + (1 << 16) + slot * 64

    def _status_at(self, slot: int) -> int:
        return self._header_at(slot) + 32

    def _data_at(self, slot: int) -> int:
        return self.start + DATA_START + slot * DATA_BYTES

    def submit(
        self, kind: int, guest_offset: int = 0, data: bytes = b"", *, nbytes: int = 0, place: int | None = None
    ) -> int:
        """Queue a request and kick; *nbytes* is for reads, to *place* in memory, if the caller sees to it. Its slot."""
        slot = self.free.pop()
        at = self._header_at(slot)
        self.bytes[at : at + 16] = struct.pack("<IIQ", kind, 0, guest_offset // 512)
        self.bytes[self._status_at(slot)] = 0xFF
        chain = [(at, 16, 0)]
        if data:
            self.bytes[self._data_at(slot) : self._data_at(slot) + len(data)] = data
            chain.append((self._data_at(slot), len(data), 0))
        elif nbytes:
            if place is None:
                self.reads[slot] = nbytes
            chain.append((self._data_at(slot) if place is None else place, nbytes, WRITABLE))
        chain.append((self._status_at(slot), 1, WRITABLE))
        self._publish(slot, chain)
        return slot

    def submit_from(self, kind: int, guest_offset: int, place: int, nbytes: int) -> int:
        """Queue a write whose data is at *place* of the memory already; its slot."""
        slot = self.free.pop()
        at = self._header_at(slot)
        self.bytes[at : at + 16] = struct.pack("<IIQ", kind, 0, guest_offset // 512)
        self.bytes[self._status_at(slot)] = 0xFF
        self._publish(slot, [(at, 16, 0), (place, nbytes, 0), (self._status_at(slot), 1, WRITABLE)])
        return slot

    def _publish(self, slot: int, chain: list[tuple[int, int, int]]) -> None:
        head = slot * 3
        for position, (at, nbytes, flags) in enumerate(chain):
            more = NEXT if position + 1 < len(chain) else 0
            descriptor = struct.pack("<QIHH", GUEST_ADDRESS + at, nbytes, flags | more, head + position + 1)
            start = self.descriptors + 16 * (head + position)
            self.bytes[start : start + 16] = descriptor
        entry = self.driver_ring + 4 + 2 * (self.available % QUEUE_SIZE)
        self.bytes[entry : entry + 2] = struct.pack("<H", head)
        self.available = (self.available + 1) & 0xFFFF
        if not self.is_held_back:
            self._show()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let the device find all that is queued meanwhile at once, at the end, whoever runs when."""
        self.is_held_back = True
        try:
            yield
        finally:
            self.is_held_back = False
            self._show()

    def _show(self) -> None:
        self.available_index[0] = self.available
        os.eventfd_write(self.kick, 1)

    def has_used(self) -> bool:
        return self.used != self.used_index[0]

    def reap(self) -> Iterator[Completion]:
        """What is in the used ring by now, oldest first; works on the memory of a dead daemon, too."""
        while self.has_used():
            entry = self.device_ring + 4 + 8 * (self.used % QUEUE_SIZE)
            head = struct.unpack("<II", self.bytes[entry : entry + 8])[0]
            self.used = (self.used + 1) & 0xFFFF
            yield self._complete(head // 3)

    def _complete(self, slot: int) -> Completion:
        nbytes = self.reads.pop(slot, 0)
        self.free.append(slot)
        data = bytes(self.bytes[self._data_at(slot) : self._data_at(slot) + nbytes])
        return Completion(slot, self.bytes[self._status_at(slot)], data)


class FrontEnd:
    """Connect to *socket_path*, negotiate, start the queues; requests go to queue 0 unless `queues` is used."""

    generation = VERSION_1  # 0: a legacy driver
    insists = False  # on features that are not offered

    def __init__(
        self,
        socket_path: Path,
        *,
        features: int = F_FLUSH | F_DISCARD | F_WRITE_ZEROES,
        queues: int = 1,
        inflight: bool = False,
        inflight_entries: int = QUEUE_SIZE,
        queue_type: type[Queue] = Queue,
        connect: bool = True,
    ) -> None:
        """With *inflight*, what is in flight is tracked, so that `connect` to another daemon goes on with it."""
        self.wanted_features = features
        self.inflight = inflight
        self.inflight_entries = inflight_entries  # that are asked for
        self.inflight_fd = -1
        self.inflight_payload = b""
        self.memory_fd = os.memfd_create("guest")
        os.ftruncate(self.memory_fd, queues * ZONE)
        self.memory = mmap.mmap(self.memory_fd, queues * ZONE)
        self.bytes = memoryview(self.memory)
        self.queues = [queue_type(self.bytes, index * ZONE) for index in range(queues)]
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        if not connect:
            return
        try:
            self.connect(socket_path)
        except BaseException:
            self.close()
            raise

    def connect(self, socket_path: Path) -> None:
        """Connect, for the first time or again; the guest notices nothing."""
        self.socket.close()
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(TIMEOUT)
        self.socket.connect(str(socket_path))
        self._negotiate(self.wanted_features)

    def close(self) -> None:
        self.socket.close()
        if self.inflight_fd >= 0:
            os.close(self.inflight_fd)
        for queue in self.queues:
            queue.close()
        self.bytes.release()
        self.memory.close()
        os.close(self.memory_fd)

    def __enter__(self) -> "FrontEnd":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def kick(self) -> int:
        return self.queues[0].kick

    @property
    def available(self) -> int:
        return self.queues[0].available

    # -- the socket

    def _send(self, request: int, payload: bytes, *, fds: tuple[int, ...] = (), flags: int = VERSION) -> None:
        try:
            socket.send_fds(self.socket, [struct.pack("<III", request, flags, len(payload)) + payload], list(fds))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise BackendGone from error

    def _receive(self, request: int) -> bytes:
        header = self._exactly(12)
        got, flags, nbytes = struct.unpack("<III", header)
        assert (got, flags) == (request, VERSION | REPLY)
        return self._exactly(nbytes)

    def _exactly(self, nbytes: int) -> bytes:
        data = b""
        while len(data) < nbytes:
            try:
                piece = self.socket.recv(nbytes - len(data))
            except ConnectionResetError as error:
                raise BackendGone from error
            if not piece:
                raise BackendGone
            data += piece
        return data

    def ask(self, request: int) -> int:
        """A request without payload that is answered with 64 bits."""
        self._send(request, b"")
        return int.from_bytes(self._receive(request), "little")

    def tell(self, request: int, payload: bytes, *, fds: tuple[int, ...] = ()) -> None:
        """A request that the backend acknowledges; returns once it has."""
        self._send(request, payload, fds=fds, flags=VERSION | NEED_REPLY)
        assert int.from_bytes(self._receive(request), "little") == 0

    def _negotiate(self, features: int) -> None:
        self.offered = self.ask(GET_FEATURES)
        multiple = F_MQ if len(self.queues) > 1 else 0
        features |= multiple | self.generation | PROTOCOL_FEATURES | self.queues[0].feature
        self.features = features if self.insists else self.offered & features
        self.ask(GET_PROTOCOL_FEATURES)
        tracking = INFLIGHT_SHMFD if self.inflight else 0
        protocol = MQ | LOG_SHMFD | REPLY_ACK | BACKEND_REQ | CONFIG | MEM_SLOTS | tracking
        self._send(SET_PROTOCOL_FEATURES, struct.pack("<Q", protocol))
        self.tell(SET_OWNER, b"")
        self.tell(SET_FEATURES, struct.pack("<Q", self.features))
        if self.inflight:
            self._share_inflight()
        region = struct.pack("<IIQQQQ", 1, 0, GUEST_ADDRESS, len(self.memory), USER_ADDRESS, 0)
        self.tell(SET_MEM_TABLE, region, fds=(self.memory_fd,))
        for index, queue in enumerate(self.queues):
            self.start_queue(base=queue.base(), index=index)

    def _share_inflight(self) -> None:
        if self.inflight_fd < 0:
            self._send(GET_INFLIGHT_FD, struct.pack("<QQHH4x", 0, 0, len(self.queues), self.inflight_entries))
            header, (self.inflight_fd,), _, _ = socket.recv_fds(self.socket, 12, 1)
            assert struct.unpack("<III", header) == (GET_INFLIGHT_FD, VERSION | REPLY, 24)
            self.inflight_payload = self._exactly(24)
        self.tell(SET_INFLIGHT_FD, self.inflight_payload, fds=(self.inflight_fd,))

    def start_queue(self, base: int, index: int = 0) -> None:
        queue = self.queues[index]
        self.tell(SET_VRING_NUM, struct.pack("<II", index, QUEUE_SIZE))
        self.tell(SET_VRING_BASE, struct.pack("<II", index, base))
        self.place_queue(index)
        self.tell(SET_VRING_KICK, struct.pack("<Q", index), fds=(queue.kick,))
        self.tell(SET_VRING_CALL, struct.pack("<Q", index), fds=(queue.call,))
        self.tell(SET_VRING_ENABLE, struct.pack("<II", index, 1))

    def stop_queue(self, index: int = 0) -> int:
        """Drain a queue and return its base."""
        self._send(GET_VRING_BASE, struct.pack("<II", index, 0))
        return int(struct.unpack("<II", self._receive(GET_VRING_BASE))[1])

    def read_config(self, nbytes: int = 60) -> bytes:
        self._send(GET_CONFIG, struct.pack("<III", 0, nbytes, 0) + bytes(nbytes))
        return self._receive(GET_CONFIG)[12:]

    def set_writeback(self, enabled: bool) -> None:
        """The WCE byte of the configuration space; returns once acknowledged."""
        self.tell(SET_CONFIG, struct.pack("<III", 32, 1, 0) + bytes([enabled]))

    def set_log(self, fd: int, nbytes: int) -> None:
        """Let dirty pages be logged in *fd* from now on, if they are at all."""
        self._send(SET_LOG_BASE, struct.pack("<QQ", nbytes, 0), fds=(fd,))
        self._receive(SET_LOG_BASE)

    def log(self, enabled: bool) -> None:
        """Switch logging of buffers and of the used ring of queue 0 on or off, while it runs."""
        self.tell(SET_FEATURES, struct.pack("<Q", self.features | (F_LOG_ALL if enabled else 0)))
        self.place_queue(logged=enabled)

    def place_queue(self, index: int = 0, *, logged: bool = False) -> None:
        """Say where the ring lies; its used ring is logged as what it is."""
        queue = self.queues[index]
        rings = (queue.descriptors, queue.device_ring, queue.driver_ring)
        log = GUEST_ADDRESS + queue.device_ring
        places = (*(USER_ADDRESS + ring for ring in rings), log)
        self.tell(SET_VRING_ADDR, struct.pack("<IIQQQQ", index, int(logged), *places))

    def open_backend_channel(self, *, blocking: bool = False) -> socket.socket:
        """Give the daemon one end of a socket pair for its own requests; the other end is the caller's to close.

        If it is *blocking*, calls on it sleep that do not say otherwise.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            self.tell(SET_BACKEND_REQ_FD, b"", fds=(theirs.fileno(),))
            if blocking:
                os.set_blocking(theirs.fileno(), True)
        ours.settimeout(TIMEOUT)
        return ours

    @property
    def size(self) -> int:
        """Bytes."""
        return int.from_bytes(self.read_config(8), "little") * 512

    # -- requests

    def submit(self, kind: int, guest_offset: int = 0, data: bytes = b"", *, nbytes: int = 0) -> int:
        """Queue a request on queue 0; see `Queue.submit`."""
        return self.queues[0].submit(kind, guest_offset, data, nbytes=nbytes)

    def reap(self) -> list[Completion]:
        """What is in the used ring of queue 0 by now, oldest first."""
        return list(self.queues[0].reap())

    def wait(self) -> list[Completion]:
        """Block until at least one request of queue 0 is used; raises BackendGone if the daemon goes away first."""
        while not (done := self.reap()):
            self.wait_for_call()
        return done

    def wait_for_call(self) -> None:
        """Block until the device signals any queue; raises BackendGone if it went away and left nothing to reap."""
        calls = [queue.call for queue in self.queues]
        ready, _, _ = select.select([*calls, self.socket.fileno()], [], [], TIMEOUT)
        assert ready, "no completion and no hang-up"
        for call in set(calls) & set(ready):
            os.eventfd_read(call)
        if ready == [self.socket.fileno()] and not any(queue.has_used() for queue in self.queues):
            raise BackendGone

    def do(self, kind: int, guest_offset: int = 0, data: bytes = b"", *, nbytes: int = 0) -> Completion:
        """One request, alone, to its completion."""
        self.submit(kind, guest_offset, data, nbytes=nbytes)
        (completion,) = self.wait()
        return completion

    def read(self, guest_offset: int, nbytes: int) -> bytes:
        done = self.do(IN, guest_offset, nbytes=nbytes)
        assert done.status == OK
        return done.data

    def write(self, guest_offset: int, data: bytes) -> None:
        assert self.do(OUT, guest_offset, data).status == OK

    def flush(self) -> None:
        assert self.do(FLUSH).status == OK

    def discard(self, guest_offset: int, nbytes: int) -> None:
        segment = struct.pack("<QII", guest_offset // 512, nbytes // 512, 0)
        assert self.do(DISCARD, 0, segment).status == OK

    def write_zeroes(self, guest_offset: int, nbytes: int, *, unmap: bool) -> None:
        segment = struct.pack("<QII", guest_offset // 512, nbytes // 512, int(unmap))
        assert self.do(WRITE_ZEROES, 0, segment).status == OK
