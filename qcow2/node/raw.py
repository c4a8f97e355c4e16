"""A raw file as an image: under a qcow2 overlay, or served as it is."""

import errno
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qcow2.driver.operation import Buffer, File, Occupied, Resize, Size, Zero
from qcow2.engine.backing import Capabilities
from qcow2.engine.data import Data, SectorCipher
from qcow2.engine.stability import Stability
from qcow2.engine.statistics import Statistics
from qcow2.format.geometry import whole_sectors
from qcow2.format.layout import SECTOR_SIZE
from qcow2.plane.l2cache import ExtentMap, Kind, RawMap, Run

if TYPE_CHECKING:
    from qcow2.engine.linkpolicy import LinkPolicy

FILE_SIZE_MAX = (1 << 63) - 1  # off_t


class RawImage:
    """A file whose guest offsets are host offsets; the same face as `qcow2.engine.image.Image`."""

    _start = 0  # of the disk, in the file

    def __init__(self, file: File, size: int, *, read_only: bool) -> None:
        self.file = file
        self.size = size
        self.read_only = read_only
        self.backing: None = None
        self.statistics = Statistics()
        self._data = Data(file)
        self._map = RawMap(size)
        self.on_failure: Callable[[], None] = lambda: None  # told once, when the image takes no more writes
        self.on_bitmaps_void: Callable[[], None] = lambda: None  # never told
        self.bitmap_problems: list[str] = []  # never any
        self._slot: int | None = None
        self._stability = Stability(file, self.statistics, self._refuse_writes)

    @classmethod
    async def open(cls, file: File, *, writable: bool = False) -> "RawImage":
        """The image in *file*; a length that is no multiple of 512 is rounded up, as QEMU does."""
        size = -(-await Size(file) // SECTOR_SIZE) * SECTOR_SIZE
        return cls(file, size, read_only=not writable)

    @property
    def is_encrypted(self) -> bool:
        """Whether what it stores of the disk is encrypted."""
        return self._data.is_encrypted

    @property
    def cipher(self) -> SectorCipher | None:
        """By which it is."""
        return self._data.cipher

    @property
    def chain(self) -> Sequence["RawImage"]:
        """This image alone: raw files have no backing file."""
        return [self]

    @property
    def extent_map(self) -> ExtentMap:
        """The addresses the worker takes; valid until the image is closed."""
        return self._map.extent_map

    @property
    def data_file(self) -> File:
        """The file."""
        return self.file

    @property
    def capabilities(self) -> Capabilities:
        """A disk, and no more."""
        return Capabilities()

    async def is_hollow(self) -> bool:
        """No: `resolve` tells holes."""
        return False

    def set_slot(self, file: File, slot: int | None) -> None:
        """Say which of the worker's files *file* is; None takes it back."""
        if file is self.file:
            self._slot = slot
            self._map.set_file(slot, writable=not self.read_only and self._stability.error is None)

    def set_link_policy(self, policy: "LinkPolicy") -> None:
        """There are no links."""

    @property
    def failure(self) -> OSError | None:
        """Why it takes no more writes, if it takes none."""
        return self._stability.failure

    def fail(self, error: OSError) -> None:
        """Take no more writes because of *error*."""
        self._stability.fail(error)

    async def lose(self, error: OSError) -> None:
        """`fail`: there are no tables that a process after this one would have to write again."""
        self._stability.fail(error)

    def _refuse_writes(self) -> None:
        self._map.set_file(self._slot, writable=False)
        self.on_failure()

    def _require_writable(self) -> None:
        if self.read_only:
            raise OSError(errno.EROFS, "opened read-only", self.file.path)
        self._stability.require_trust()

    async def resolve(self, guest_offset: int, nbytes: int) -> Run:
        """Data or a hole, as the host tells."""
        is_data, found = await Occupied(self.file, guest_offset, nbytes)
        return Run(Kind.DATA if is_data else Kind.ZERO_ALLOCATED, 1, 0, guest_offset, found)

    async def reads_as_zeros(self, guest_offset: int, nbytes: int) -> bool:
        """Whether the range is known to read as zeros: past the end."""
        return guest_offset >= self.size

    async def find(self, guest_offset: int, nbytes: int) -> tuple[Data, int]:
        """Where the range is: where it says."""
        return self._data, guest_offset

    async def read(self, guest_offset: int, target: Buffer) -> None:
        """Fill *target*; zeros past the end."""
        await self._data.read(guest_offset, target)

    async def write(self, guest_offset: int, source: Buffer) -> None:
        """Put *source* at *guest_offset*; process-safe on return."""
        self._require_writable()
        await self._data.write(guest_offset, source)

    async def write_zeroes(self, guest_offset: int, nbytes: int, *, unmap: bool) -> None:
        """Make the range read as zeros; *unmap* or not, the host decides about the space."""
        self._require_writable()
        await Zero(self.file, guest_offset, nbytes)

    async def discard(self, guest_offset: int, nbytes: int) -> None:
        """Give the range's space back; it reads as zeros."""
        self._require_writable()
        await Zero(self.file, guest_offset, nbytes)

    async def flush(self) -> None:
        """Make every write that has completed stable."""
        if not self.read_only:
            await self._stability.sync()

    async def grow(self, nbytes: int) -> None:
        """Let the file be *nbytes* long at least, and the disk, rounded up to a sector; stable on return.

        A block device has grown already. Nothing else is under way.
        Raises: ValueError for less than now; OSError, then the disk goes on as it was.
        """
        self._require_writable()
        size = await self.grown_size(nbytes)
        await Resize(self.file, max(nbytes, await Size(self.file)))
        await self._end_at(size)

    async def grown_size(self, nbytes: int) -> int:
        """*nbytes* rounded up to a sector, if `grow` would not refuse it. Raises: ValueError."""
        size = whole_sectors(self.file.path, nbytes)
        if size < self.size:
            raise ValueError(
                f"{self.file.path}: size {nbytes} is less than the disk has, {self.size}; it can only grow"
            )
        if size > FILE_SIZE_MAX - self._start:
            where = " behind its LUKS header" if self._start else ""
            raise ValueError(f"{self.file.path}: size {nbytes} is more than a file can have{where}, {FILE_SIZE_MAX}")
        return size

    async def shrink(self, nbytes: int) -> None:
        """Let the file be *nbytes* long, and the disk, rounded up to a sector; stable on return.

        Nothing else is under way.
        Raises: ValueError for more than now, or a negative size; OSError, then the disk goes on as it was.
        """
        self._require_writable()
        size = self._shrunk_size(nbytes)
        await Resize(self.file, nbytes)
        await self._end_at(size)

    def _shrunk_size(self, nbytes: int) -> int:
        size = whole_sectors(self.file.path, nbytes)
        if size > self.size:
            raise ValueError(
                f"{self.file.path}: size {nbytes} is not from 0 to {self.size}, the disk cannot shrink to it"
            )
        return size

    async def _end_at(self, size: int) -> None:
        """The file has that length: stable on return. Raises: OSError, then the disk goes on as it was."""
        await self._stability.sync()
        self.size = size
        self._map.set_size(size)

    async def preallocate(self, guest_offset: int, nbytes: int, *, writes: bool) -> None:
        """Have zeros written to what the file has of the range, if *writes*; only the host could set space aside."""
        self._require_writable()
        step, end = 1 << 20, min(guest_offset + nbytes, await Size(self.file))
        for start in range(guest_offset, end if writes else 0, step):
            await self._data.write(start, bytes(min(step, end - start)))
        await self._stability.sync()

    async def settle(self) -> None:
        """The file holds all that has completed."""

    async def close(self) -> None:
        """Make everything stable. Raises: OSError, once a sync has failed, too: the host tells of an error once."""
        if not self.read_only:
            await self._stability.sync()
