"""The block device: what a user subclasses, and what the machinery under it serves."""

import errno
from collections.abc import Callable
from enum import IntEnum
from typing import Protocol

from ring.request import Request
from ring.worker import Worker
from virtio.config import SECTOR, SERIAL_MAX, Properties
from virtio.native import NativeBlock

UNMAP = 1  # VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
BLOCK_SIZE_MAX = 4096


class RequestType(IntEnum):
    """The types a device is asked for. Spec: virtio 1.2, 5.2.6."""

    IN = 0  # VIRTIO_BLK_T_IN
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13


CHANGES = (RequestType.OUT, RequestType.DISCARD, RequestType.WRITE_ZEROES)


class Status(IntEnum):
    """The last byte of every request."""

    OK = 0  # VIRTIO_BLK_S_OK
    IOERR = 1
    UNSUPP = 2


class RequestError(Exception):
    """The guest asked for something invalid: that request ends with *status*."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


class BlockDevice:
    """A disk written in Python: subclass it, give it a size, and override what it can do.

    The methods are called on one thread, one request at a time, with ranges that are inside the disk and whole
    blocks. `OSError` fails the request; `RequestError` ends it with a status of your own.
    """

    size: int  # bytes, a multiple of block_size
    block_size: int = SECTOR
    read_only: bool = False
    serial: str = ""

    def read(self, offset: int, nbytes: int) -> bytes | bytearray | memoryview:
        """Return exactly *nbytes*."""
        raise NotImplementedError

    def write(self, offset: int, data: bytes) -> None:
        """Store *data*: when this returns, a read must see it."""
        raise NotImplementedError

    def flush(self) -> None:
        """Make everything written so far survive a power loss."""

    def discard(self, offset: int, nbytes: int) -> None:
        """The guest no longer needs these bytes; a hint."""

    def write_zeroes(self, offset: int, nbytes: int, *, unmap: bool) -> None:
        """Make the range read as zeros; with *unmap* its space may be given back."""
        self.write(offset, bytes(nbytes))


class Unavailable(Exception):
    """What stands under a device cannot be had now; one line says why."""


class Lease(Protocol):
    """Of what stands under a device and is let go while no ring runs. All methods are the control thread's."""

    @property
    def is_held(self) -> bool: ...

    def take(self) -> None:
        """Take hold of it, unless it is held. Raises: Unavailable."""

    def admit(self, memory: set[tuple[int, int]], new: set[tuple[int, int]]) -> None:
        """Before requests of a guest whose *memory* is in these files (device, inode).

        Nobody else moves data there now, into those that are *new*.

        Raises: Unavailable.
        """

    def look(self) -> None:
        """Bring the properties up to date without taking hold. Raises: Unavailable."""

    def let_go(self) -> None:
        """Leave it, clean and stable, to others; what cannot be left so stays held."""


class Backend(Protocol):
    """What stands under a device. All methods are called on the worker thread.

    Between `attach` and `detach` a `lease` is held; a backend without one is there as long as its device.
    """

    @property
    def lease(self) -> Lease | None: ...

    @property
    def properties(self) -> Properties: ...

    def attach(self, worker: Worker, block: NativeBlock) -> None:
        """Before the first request: register files, tell *block* its extent map and the file to sync."""

    def start(self, request: Request) -> None:
        """Begin *request*; it is finished now or later."""

    def flush(self, done: Callable[[int], None]) -> None:
        """*done(0)* once every completed write is stable, or *done(-errno)*."""

    def await_syncs(self, done: Callable[[int], None]) -> None:
        """*done()* of anything once each sync that a request waits for now has ended, however."""

    def settle(self, done: Callable[[int], None]) -> None:
        """*done(0)* once the files alone hold all that has completed, or *done(-errno)*; nothing need be stable."""

    def grow(self, nbytes: int, done: Callable[[str], None]) -> None:
        """Let the disk be *nbytes* long, while no request is under way; *done("")*, or *done* of what is wrong."""

    def exchange(self, swap: Callable[[], None]) -> None:
        """As `detach`, *swap()* and `attach`, while requests wait: files that stay need not be registered anew."""

    def detach(self) -> None:
        """After the last request and operation; files may be closed from now on, and it may be attached again."""


class DeviceBackend:
    """A `BlockDevice` as a `Backend`: every request is one call."""

    def __init__(self, device: BlockDevice) -> None:
        """Raises: ValueError if the device describes itself impossibly."""
        _check(device)
        self.properties = Properties(
            size=device.size,
            block_size=device.block_size,
            read_only=device.read_only,
            serial=device.serial,
        )
        self.lease = None
        self._device = device
        self._block: NativeBlock | None = None

    def attach(self, worker: Worker, block: NativeBlock) -> None:
        self._block = block

    def exchange(self, swap: Callable[[], None]) -> None:
        swap()

    def detach(self) -> None:
        self._block = None

    def start(self, request: Request) -> None:
        request.finish(_status_of(lambda: self._serve(request)))

    def flush(self, done: Callable[[int], None]) -> None:
        done(0 if _status_of(self._device.flush) == Status.OK else -errno.EIO)

    def await_syncs(self, done: Callable[[int], None]) -> None:
        done(0)

    def settle(self, done: Callable[[int], None]) -> None:
        done(0)

    def grow(self, nbytes: int, done: Callable[[str], None]) -> None:
        done("a device of this kind cannot be resized")

    def _serve(self, request: Request) -> None:
        match request.type:
            case RequestType.IN:
                request.data().store(self._device.read(request.offset, request.nbytes))
            case RequestType.OUT:
                self._device.write(request.offset, request.data().load())
            case RequestType.DISCARD:
                self._device.discard(request.offset, request.nbytes)
            case RequestType.WRITE_ZEROES:
                self._device.write_zeroes(request.offset, request.nbytes, unmap=bool(request.flags & UNMAP))
            case RequestType.FLUSH:
                self._device.flush()
            case _:
                raise RequestError(Status.UNSUPP)
        if request.type in CHANGES and self._block is not None and self._block.writethrough:
            self._device.flush()


def _status_of(action: Callable[[], None]) -> int:
    try:
        action()
    except RequestError as error:
        return error.status
    except OSError:
        return Status.IOERR
    return Status.OK


def _check(device: BlockDevice) -> None:
    """Refuse what no driver could use."""
    block_size = device.block_size
    if not SECTOR <= block_size <= BLOCK_SIZE_MAX or block_size & (block_size - 1):
        raise ValueError(f"block size {block_size} is not a power of two from {SECTOR} to {BLOCK_SIZE_MAX}")
    if device.size < 0 or device.size % block_size:
        raise ValueError(f"size {device.size} is not a multiple of the block size, {block_size}")
    if len(device.serial.encode()) > SERIAL_MAX:
        raise ValueError(f"serial {device.serial!r} has more than {SERIAL_MAX} bytes")
