"""The half of a virtio-blk device that lives in C: parses each request, serves it over the extent map or punts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ring.extent import ExtentMap
from ring.native import Pointer, ffi, lib
from ring.worker import Worker
from virtio.config import SECTOR, SERIAL_MAX

NO_SLOT = 0xFFFFFFFF  # BLOCK_NO_SLOT


class NativeBlock:
    """`struct block`, a `NativeDevice` for the worker; once one runs, change it on its thread only."""

    def __init__(
        self,
        *,
        size: int,
        block_size: int = SECTOR,
        read_only: bool = False,
        serial: str = "",
        max_range_sectors: int = 0,
    ) -> None:
        """Describe a disk of *size* bytes; a limit of 0 sectors answers that request type with UNSUPP.

        The device starts in writeback, without an extent map (everything goes to Python) and without a file
        to sync (FLUSH goes to Python, and writethrough is Python's to keep).
        """
        encoded = serial.encode()
        if len(encoded) > SERIAL_MAX:
            raise ValueError(f"serial {serial!r} is {len(encoded)} bytes long, the limit is {SERIAL_MAX}")
        self._block: Any = ffi.new("struct block *")
        lib.block_init(self._block)
        self._block.size = size
        self._block.block_size = block_size
        self._block.read_only = read_only
        ffi.memmove(self._block.serial, encoded, len(encoded))
        self._block.max_range_sectors = max_range_sectors
        self.set_sync_slot(None)
        self.set_frozen(None)
        self._wanted = self.is_forced = False  # writethrough: by the guest, by whoever controls the daemon

    @property
    def native(self) -> Pointer:
        """Its `struct device`, valid as long as this object."""
        device: Pointer = ffi.addressof(self._block, "device")
        return device

    @property
    def writethrough(self) -> bool:
        """Whether a completed write must be stable; without a file to sync that is Python's to keep."""
        return bool(self._block.writethrough)

    def set_writethrough(self, writethrough: bool) -> None:
        """From now on a write, write-zeroes or discard joins the group commit before its status is written."""
        self._wanted = writethrough
        self._block.writethrough = self._wanted or self.is_forced

    def force_writethrough(self, forced: bool) -> None:
        """Do so whatever `set_writethrough` says, or no more."""
        self.is_forced = forced
        self._block.writethrough = self._wanted or self.is_forced

    def set_size(self, size: int) -> None:
        """Let the disk be *size* bytes long: requests past the old end are served from now on."""
        self._block.size = size

    def set_flush_punts(self, punts: bool) -> None:
        """Leave FLUSH to Python as long as a sync alone would not make everything that has completed stable."""
        self._block.flush_punts = punts

    def set_changes_punt(self, punts: bool) -> None:
        """Leave every write, discard and write-zeroes to Python: somebody else wants to know of each."""
        self._block.changes_punt = punts

    @contextmanager
    def holding_commits(self, worker: Worker) -> Iterator[None]:
        """Let what waits for a sync alone, FLUSH or a write in writethrough, wait for the end of this, too.

        Who awaits all that is under way does not wait for those. For one function on the thread of *worker*.
        """
        lib.block_hold_commits(self._block)
        try:
            yield
        finally:
            lib.block_begin_commits(self._block, worker.native)

    def refuse_writes(self) -> None:
        """Answer every change and FLUSH with IOERR from now on, also those in flight."""
        self._block.failed = True

    def set_sync_slot(self, slot: int | None, names: int | None = None) -> None:
        """FLUSH and writethrough sync the file in *slot*, then the one in *names* that leads to its data.

        Without *names* all is in one file; without *slot* both are left to Python.
        """
        self._block.sync_slot = NO_SLOT if slot is None else slot
        self._block.names_slot = NO_SLOT if names is None else names

    def set_frozen(self, bits: bytearray | None) -> None:
        """Leave to Python what changes a chunk of 64 KiB whose bit is set; bits may be cleared meanwhile, by Python."""
        self._frozen = None if bits is None else ffi.from_buffer("uint8_t[]", bits)
        self._block.frozen = ffi.NULL if self._frozen is None else self._frozen
        self._block.nfrozen = 0 if bits is None else len(bits) * 8

    def set_extent_map(self, extent_map: ExtentMap | None) -> None:
        """Serve reads and writes over *extent_map*, whose owner must outlive its use; None leaves them to Python."""
        lib.block_set_extent_map(self._block, *(extent_map or (0, 0, 0)))
