"""Requests that C leaves to Python, and their guest memory as opaque slices."""

from ring.native import Pointer, check, ffi, lib


class GuestSlice:
    """A run of bytes in a request's guest buffers; good until the request is finished.

    Satisfies `qcow2.driver.operation.Buffer`. Raises OSError ESTALE once the request is finished.
    """

    __slots__ = ("nbytes", "request_id", "start", "worker")

    def __init__(self, worker: Pointer, request_id: int, start: int, nbytes: int) -> None:
        self.worker = worker
        self.request_id = request_id
        self.start = start
        self.nbytes = nbytes

    def __len__(self) -> int:
        return self.nbytes

    def slice(self, start: int, nbytes: int) -> "GuestSlice":
        """Borrow *nbytes* of this slice from *start*; no copy."""
        if start < 0 or nbytes < 0 or start + nbytes > self.nbytes:
            raise ValueError(f"slice of {nbytes} bytes at {start} leaves a buffer of {self.nbytes}")
        if nbytes == self.nbytes:
            return self
        return GuestSlice(self.worker, self.request_id, self.start + start, nbytes)

    def load(self) -> bytes:
        """Copy the bytes out."""
        target = bytearray(self.nbytes)
        check(lib.worker_load(self.worker, self.request_id, self.start, ffi.from_buffer(target), self.nbytes))
        return bytes(target)

    def store(self, data: bytes | bytearray | memoryview) -> None:
        """Copy *data*, exactly as long as the slice, in."""
        with ffi.from_buffer(data) as source:  # not held past this: see `ring.operations`
            if len(source) != self.nbytes:
                raise ValueError(f"{len(source)} bytes stored into a buffer of {self.nbytes}")
            check(lib.worker_store(self.worker, self.request_id, self.start, source, self.nbytes))

    def zero(self) -> None:
        """Fill with zeros."""
        check(lib.worker_clear(self.worker, self.request_id, self.start, self.nbytes))


class Request:
    """One parsed and validated request that C did not serve alone."""

    __slots__ = ("flags", "id", "nbytes", "offset", "queue", "type", "worker")

    def __init__(self, worker: Pointer, request_id: int, type: int, flags: int, offset: int, nbytes: int) -> None:
        self.worker = worker
        self.id = request_id
        self.queue = request_id >> 16 & 0xFFFF  # the number of the one it came from
        self.type = type  # the virtio-blk request type
        self.flags = flags  # of write-zeroes: UNMAP
        self.offset = offset  # bytes
        self.nbytes = nbytes

    def data(self) -> GuestSlice:
        """The guest's buffer, *nbytes* long: to be filled by IN, to be read by OUT; empty for other types."""
        return GuestSlice(self.worker, self.id, 0, self.nbytes)

    def finish(self, status: int) -> None:
        """End the request with a virtio status byte, exactly once; its slices are dead from here on.

        C adds the sync of writethrough, the status byte, the used element and the call.
        Raises: OSError ESTALE if it was finished before.
        """
        check(lib.worker_finish(self.worker, self.id, status), "request")
