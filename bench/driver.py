"""The driver's side: guest memory of one's own and virtqueues in it, and the map of a raw file: for tests and load."""

import os
import select
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

from bench.native import ffi, lib
from ring.extent import ExtentMap
from ring.memory import Mapping, MemoryRegion
from ring.native import NULL, Pointer, check
from ring.native import lib as ring_lib
from ring.virtqueue import QueueLayout

EMPTY = -11  # -EAGAIN: no chain came back


class Buffer(NamedTuple):
    """One buffer of a chain."""

    guest_address: int
    nbytes: int
    is_writable: bool = False  # by the device


class Completion(NamedTuple):
    """A chain that came back."""

    head: int  # of a packed ring: the buffer id
    nbytes: int  # written by the device, as it says


class DriverMemory:
    """Guest memory in a memfd, a context manager; guest and user address of its byte 0 are *guest_address*."""

    def __init__(self, nbytes: int, *, guest_address: int = 0) -> None:
        self.nbytes = nbytes
        self.guest_address = guest_address
        self.fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.truncate(self.fd, nbytes)
        self._mapping = Mapping(self.region())
        self._native: Any = self._mapping.native
        self._next = 0

    def __enter__(self) -> "DriverMemory":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap and close the memfd."""
        self._mapping.close()
        os.close(self.fd)

    def region(self) -> MemoryRegion:
        """The whole memory as one region, with an fd of its own."""
        return MemoryRegion(os.dup(self.fd), self.guest_address, self.guest_address, self.nbytes, 0)

    def allocate(self, nbytes: int, *, align: int = 16) -> int:
        """Set *nbytes* aside -> their guest address. They are never given back."""
        start = (self._next + align - 1) // align * align
        if start + nbytes > self.nbytes:
            raise MemoryError(f"{nbytes} bytes wanted of guest memory, {self.nbytes - start} are left")
        self._next = start + nbytes
        return self.guest_address + start

    def host(self, guest_address: int, nbytes: int) -> Pointer:
        """Borrow our address of [guest_address, guest_address + nbytes)."""
        start = guest_address - self.guest_address
        if start < 0 or start + nbytes > self.nbytes:
            raise IndexError(f"guest address {guest_address:#x}, {nbytes} bytes, is outside memory")
        pointer: Pointer = self._native.host + start
        return pointer

    def load(self, guest_address: int, nbytes: int) -> bytes:
        """Copy bytes out of guest memory."""
        return bytes(ffi.buffer(self.host(guest_address, nbytes), nbytes))

    def store(self, guest_address: int, data: bytes) -> None:
        """Copy bytes into guest memory."""
        ffi.memmove(self.host(guest_address, len(data)), data, len(data))


class DriverQueue:
    """A virtqueue and its three eventfds, a context manager."""

    def __init__(
        self,
        memory: DriverMemory,
        size: int,
        *,
        event_idx: bool = False,
        packed: bool = False,
        base: int | None = None,
    ) -> None:
        """*base* is where the ring begins, as SET_VRING_BASE says it; None: as a new ring does."""
        if base is None:
            base = 0x80008000 if packed else 0
        self.memory = memory
        self.address = memory.allocate(lib.driver_ring_nbytes(size), align=64)
        self.layout = QueueLayout(
            size=size,
            descriptor_address=self.address,
            driver_address=self.address + lib.driver_ring_driver_offset(size),
            device_address=self.address + lib.driver_ring_device_offset(size),
            base=base,
            event_idx=event_idx,
            packed=packed,
        )
        self._ring: Pointer = ffi.new("struct driver_ring *")
        self._nbytes: Any = ffi.new("uint32_t *")
        flags = ring_lib.RING_EVENT_IDX * event_idx | ring_lib.RING_PACKED * packed
        lib.driver_ring_init(self._ring, memory.host(self.address, lib.driver_ring_nbytes(size)), size, flags, base)
        self.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.err_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __enter__(self) -> "DriverQueue":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the eventfds; the ring stays in its memory."""
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            os.close(fd)

    @property
    def native_address(self) -> int:
        """Where C's `struct driver_ring` lies, for C that drives this queue in our place; borrowed."""
        return int(ffi.cast("uintptr_t", self._ring))

    def add(self, buffers: Sequence[Buffer], *, table_address: int | None = None) -> int:
        """Post a chain, readable buffers first -> its head or buffer id; the device sees it at the next `publish`.

        With *table_address*, 16 bytes a buffer in guest memory, the chain is an indirect one.
        Raises: OSError ENOSPC if the ring is full.
        """
        native = ffi.new("struct driver_buffer[]", [tuple(buffer) for buffer in buffers])
        host = NULL if table_address is None else self.memory.host(table_address, 16 * len(buffers))
        return check(lib.driver_ring_add(self._ring, native, len(buffers), host, table_address or 0), "virtqueue")

    def add_head(self, head: int) -> None:
        """Post *head* itself, whatever it leads to: for drivers that misbehave."""
        lib.driver_ring_add_head(self._ring, head)

    def publish(self) -> bool:
        """Show the device what was posted -> whether it wants a kick."""
        return bool(lib.driver_ring_publish(self._ring))

    def kick(self) -> None:
        """Publish, and kick if the device wants it."""
        if self.publish():
            os.eventfd_write(self.kick_fd, 1)

    def poll(self) -> Completion | None:
        """Take one chain that came back, if there is one."""
        head = lib.driver_ring_poll(self._ring, self._nbytes)
        return None if head == EMPTY else Completion(check(head, "used ring"), self._nbytes[0])

    def wait(self, count: int = 1, *, timeout: float = 10.0) -> list[Completion]:
        """Sleep on the call until *count* chains came back.

        Raises: TimeoutError if the device does not call for *timeout* seconds.
        """
        completions: list[Completion] = []
        while len(completions) < count:
            completion = self.poll()
            if completion is not None:
                completions.append(completion)
            elif not lib.driver_ring_arm(self._ring):
                wait_readable(self.call_fd, timeout)
        return completions


def wait_readable(fd: int, timeout: float) -> None:
    """Sleep until the eventfd is signalled, and take the signal. Raises: TimeoutError."""
    if not select.select([fd], [], [], timeout)[0]:
        raise TimeoutError(f"no notification within {timeout} s")
    os.eventfd_read(fd)


class IdentityMap:
    """A raw file: guest offset is host offset, within the first *nbytes* of the file in *slot*."""

    def __init__(self, *, slot: int, nbytes: int, writable: bool) -> None:
        self._context: Pointer = ffi.new(
            "struct identity_map *", {"nbytes": nbytes, "slot": slot, "writable": writable}
        )

    @property
    def extent_map(self) -> ExtentMap:
        """The map's addresses; borrowed, keep this object while a worker uses them."""
        return ExtentMap(lib.identity_map_translate_address(), int(ffi.cast("uintptr_t", self._context)))
