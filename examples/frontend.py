"""A front-end in one page: `python examples/frontend.py SOCKET [SECTOR]` prints a sector of the disk served there."""

import socket
import struct
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the driver's side is no part of what is installed

from bench.driver import Buffer, DriverMemory, DriverQueue
from vhost.message import U64, Header, MemoryTable, Region, Request, VhostFeature, VringAddress, VringState
from virtio.block import RequestType, Status
from virtio.feature import BlockFeature, RingFeature

WANTED = int(RingFeature.VERSION_1 | BlockFeature.FLUSH | BlockFeature.RO | VhostFeature.PROTOCOL_FEATURES)
SECTOR = 512


class FrontEnd:
    """One queue on a vhost-user-blk back-end."""

    def __init__(self, socket_path: str, memory: DriverMemory, queue: DriverQueue) -> None:
        self.memory = memory
        self.queue = queue
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(socket_path)

    def send(self, request: Request, payload: Any = b"", fds: tuple[int, ...] = ()) -> None:
        """Send one message, with file descriptors beside it."""
        data = payload if isinstance(payload, bytes) else payload.pack()
        socket.send_fds(self.socket, [Header(request, 1, len(data)).pack() + data], fds)

    def ask(self, request: Request) -> int:
        """Send a request that is answered with a number."""
        self.send(request)
        reply = self.socket.recv(Header.LAYOUT.size + U64.LAYOUT.size, socket.MSG_WAITALL)
        return U64.parse(reply[Header.LAYOUT.size :]).value

    def start(self) -> None:
        """Negotiate features, share the memory, start queue 0."""
        self.send(Request.SET_OWNER)
        self.send(Request.SET_FEATURES, U64(self.ask(Request.GET_FEATURES) & WANTED))
        address = self.memory.guest_address  # ours is the same: a driver and its front-end in one process
        region = Region(guest_address=address, size=self.memory.nbytes, user_address=address, mmap_offset=0)
        self.send(Request.SET_MEM_TABLE, MemoryTable((region,)), (self.memory.fd,))
        ring = self.queue.layout
        placed = VringAddress(0, 0, ring.descriptor_address, ring.device_address, ring.driver_address, 0)
        self.send(Request.SET_VRING_NUM, VringState(0, ring.size))
        self.send(Request.SET_VRING_BASE, VringState(0, 0))
        self.send(Request.SET_VRING_ADDR, placed)
        self.send(Request.SET_VRING_CALL, U64(0), (self.queue.call_fd,))
        self.send(Request.SET_VRING_KICK, U64(0), (self.queue.kick_fd,))
        self.send(Request.SET_VRING_ENABLE, VringState(0, 1))

    def read(self, sector: int, nbytes: int) -> bytes:
        """One virtio-blk request: a header for the device to read, data and a status byte for it to write."""
        header, data, status = (self.memory.allocate(size) for size in (16, nbytes, 1))
        self.memory.store(header, struct.pack("<IIQ", RequestType.IN, 0, sector))
        self.queue.add([Buffer(header, 16), Buffer(data, nbytes, True), Buffer(status, 1, True)])
        self.queue.kick()
        self.queue.wait()
        if self.memory.load(status, 1)[0] != Status.OK:
            raise OSError(f"sector {sector} cannot be read")
        return self.memory.load(data, nbytes)


def main(socket_path: str, sector: int) -> None:
    """Print *sector* in hexadecimal, sixteen bytes a line."""
    with DriverMemory(1 << 20) as memory, DriverQueue(memory, 16) as queue:
        front_end = FrontEnd(socket_path, memory, queue)
        with front_end.socket:
            front_end.start()
            data = front_end.read(sector, SECTOR)
    for start in range(0, SECTOR, 16):
        print(f"{sector * SECTOR + start:08x}  {data[start : start + 16].hex(' ')}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0)
