"""A disk in memory: `python examples/ramdisk.py /tmp/ramdisk.sock`, then point a virtual machine at the socket."""

import sys

import vhost
from virtio.block import BlockDevice


class RamDisk(BlockDevice):
    def __init__(self, size: int) -> None:
        self.size = size
        self.memory = bytearray(size)

    def read(self, offset: int, nbytes: int) -> memoryview:
        return memoryview(self.memory)[offset : offset + nbytes]

    def write(self, offset: int, data: bytes) -> None:
        self.memory[offset : offset + len(data)] = data


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: ramdisk.py SOCKET")
    vhost.serve(RamDisk(64 << 20), socket_path=sys.argv[1])
