"""A vhost-user-blk front-end with several queues, as QEMU's would be for a Linux guest."""

import socket
import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType

from bench.driver import DriverMemory, DriverQueue
from vhost.message import (
    U64,
    ConfigWindow,
    Header,
    HeaderFlag,
    MemoryTable,
    ProtocolFeature,
    Record,
    Region,
    Request,
    VhostFeature,
    VringAddress,
    VringState,
)
from virtio.feature import BlockFeature, RingFeature

TIMEOUT = 60.0  # seconds; a dirty image may be repaired first
QUEUE_SIZE = 256
RING_MEMORY = 1 << 16  # bytes a queue needs at most
RING = RingFeature.VERSION_1 | RingFeature.INDIRECT_DESC | RingFeature.EVENT_IDX
BLOCK = BlockFeature.FLUSH | BlockFeature.DISCARD | BlockFeature.WRITE_ZEROES | BlockFeature.RO | BlockFeature.MQ
FEATURES = int(RING) | int(BLOCK) | int(VhostFeature.PROTOCOL_FEATURES)
PROTOCOL = ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIG


class FrontEnd(AbstractContextManager["FrontEnd"]):
    """Guest memory, *queues* virtqueues for *depth* indirect chains each, and the connection they are served on."""

    def __init__(self, connection: socket.socket, *, queues: int, nbytes: int, depth: int = QUEUE_SIZE) -> None:
        self._stack = ExitStack()
        self._socket = connection
        self._features = 0
        self.memory = DriverMemory(queues * RING_MEMORY + nbytes)
        self.queues: Sequence[DriverQueue] = ()
        self._count = queues
        self._size = max(QUEUE_SIZE, depth)

    def __enter__(self) -> "FrontEnd":
        with ExitStack() as stack:
            stack.enter_context(self.memory)
            stack.enter_context(self._socket)
            self._socket.settimeout(TIMEOUT)
            self._negotiate()
            event_idx = bool(self._features & RingFeature.EVENT_IDX)
            rings = [DriverQueue(self.memory, self._size, event_idx=event_idx) for _ in range(self._count)]
            self.queues = [stack.enter_context(ring) for ring in rings]
            self._start()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def indirect(self) -> bool:
        """Whether chains may go through indirect tables."""
        return bool(self._features & RingFeature.INDIRECT_DESC)

    def size(self) -> int:
        """Bytes of the disk."""
        self._send(Request.GET_CONFIG, ConfigWindow(0, 8, 0, bytes(8)).pack())
        return 512 * int.from_bytes(ConfigWindow.parse(self._receive(Request.GET_CONFIG)).data, "little")

    # -- the session

    def _negotiate(self) -> None:
        offered = self._ask(Request.GET_FEATURES)
        self._features = offered & FEATURES
        protocol = self._ask(Request.GET_PROTOCOL_FEATURES) & int(PROTOCOL)
        self._send(Request.SET_PROTOCOL_FEATURES, U64(protocol).pack())
        self._send(Request.SET_OWNER)
        self._send(Request.SET_FEATURES, U64(self._features).pack())

    def _start(self) -> None:
        address = self.memory.guest_address
        region = Region(guest_address=address, size=self.memory.nbytes, user_address=address, mmap_offset=0)
        self._tell(Request.SET_MEM_TABLE, MemoryTable((region,)), self.memory.fd)
        for index, queue in enumerate(self.queues):
            self._start_queue(index, queue)

    def _start_queue(self, index: int, queue: DriverQueue) -> None:
        ring = queue.layout
        placed = VringAddress(index, 0, ring.descriptor_address, ring.device_address, ring.driver_address, 0)
        self._tell(Request.SET_VRING_NUM, VringState(index, ring.size))
        self._tell(Request.SET_VRING_BASE, VringState(index, ring.base))
        self._tell(Request.SET_VRING_ADDR, placed)
        self._tell(Request.SET_VRING_CALL, U64(index), self.queues[0].call_fd)  # one interrupt for all queues
        self._tell(Request.SET_VRING_KICK, U64(index), queue.kick_fd)
        self._tell(Request.SET_VRING_ENABLE, VringState(index, 1))

    # -- the wire

    def _send(self, request: Request, payload: bytes = b"", *fds: int, flags: int = 1) -> None:
        socket.send_fds(self._socket, [Header(request, flags, len(payload)).pack() + payload], list(fds))

    def _tell(self, request: Request, record: Record | MemoryTable, *fds: int) -> None:
        """Send a request and wait until the server has acknowledged it."""
        self._send(request, record.pack(), *fds, flags=1 | HeaderFlag.NEED_REPLY)
        (status,) = struct.unpack("=Q", self._receive(request))
        if status:
            raise ConnectionError(f"the server refuses {request.name} with {status}")

    def _ask(self, request: Request) -> int:
        """Send a request that is answered with a number."""
        self._send(request)
        return U64.parse(self._receive(request)).value

    def _receive(self, request: Request) -> bytes:
        header = Header.parse(self._exactly(Header.LAYOUT.size, request))
        return self._exactly(header.size, request)

    def _exactly(self, nbytes: int, request: Request) -> bytes:
        data = self._socket.recv(nbytes, socket.MSG_WAITALL)
        if len(data) != nbytes:
            raise ConnectionError(f"the server hung up on {request.name}")
        return data
