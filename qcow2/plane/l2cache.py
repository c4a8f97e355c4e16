"""The L2 cache: slices of L2 tables held in C, bounded, never dirty; and the extent map that answers from them."""

from array import array
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

from qcow2.format.geometry import Geometry
from qcow2.native import Pointer, check, ffi, lib
from qcow2.plane.entry import WORD_BITS, Entries
from qcow2.plane.untouched import Untouched

MIN_SLOTS = 64
USED_SLICES = 4096  # that are told of at a time


class Kind(IntEnum):
    """What a run of guest clusters is; mirrors enum l2_kind."""

    MISS = 0
    UNALLOCATED = 1
    ZERO_PLAIN = 2
    ZERO_ALLOCATED = 3
    DATA = 4
    COMPRESSED = 5
    BAD = 6


class Run(NamedTuple):
    """A stretch of guest bytes that one L2 slice maps in one way; mirrors struct l2_run."""

    kind: int  # a Kind; an int because this is made for every request
    copied: int
    entry: int
    host_offset: int
    nbytes: int


class ExtentMap(NamedTuple):
    """An `extent_translate`, its context, and its `struct extent_places` if any; valid while the image is open."""

    translate_address: int
    context_address: int
    places_address: int = 0


class L2Cache:
    """Owner of a struct l2map and of the arrays it borrows."""

    def __init__(self, geometry: Geometry, nbytes: int) -> None:
        self._geometry = geometry
        self._nbytes = nbytes
        nslots = self._slots()
        self.entries = Entries.of(geometry)
        created = lib.l2map_create(self.entries.native, geometry.size, nslots)
        if created == ffi.NULL:
            raise MemoryError(f"no memory for an L2 cache of {nslots} slices")
        self._map: Pointer = ffi.gc(created, lib.l2map_destroy)
        self._run = ffi.new("struct l2_run *")
        self._l1: Any = None
        self._metadata: Any = None
        self._backing: object = None
        self._stock: Any = None
        self._cipher: object = None
        self._freed: Any = None
        self._log: Any = None
        self._dirty: Any = None
        self.untouched: Untouched | None = None  # of an external data file that is not raw

    @property
    def extent_map(self) -> ExtentMap:
        """The addresses the worker takes."""
        context = int(ffi.cast("uintptr_t", self._map))
        return ExtentMap(lib.l2map_translate_address(), context, lib.l2map_places_address())

    def _slots(self) -> int:
        """How many slices to hold: no more than the disk has."""
        slices = -(-self._geometry.size >> self._geometry.slice_bits)
        return max(MIN_SLOTS, min(self._nbytes // self._geometry.slice_bytes, slices))

    def resize(self) -> None:
        """The disk's size has changed; the cache is empty after, the extent map keeps its addresses."""
        check(lib.l2map_resize(self._map, self._geometry.size, self._slots()))
        if self.untouched is not None:  # entries may have gone with their tables, and what was data be nobody's
            self.untouched.clear()

    def set_l1(self, l1: "array[int]") -> None:
        """Borrow *l1*, the entries in host order; call again before its length changes."""
        self._l1 = _borrow("uint64_t[]", l1)
        lib.l2map_set_l1(self._map, self._l1, len(l1))

    def set_metadata(self, clusters: "array[int]") -> None:
        """Borrow *clusters*, sorted numbers of host clusters that guest data may not overlap."""
        self._metadata = _borrow("uint64_t[]", clusters)
        lib.l2map_set_metadata(self._map, self._metadata, len(clusters))

    def release_metadata(self) -> None:
        """Give the array of `set_metadata` back, so that it may change its length."""
        lib.l2map_set_metadata(self._map, ffi.NULL, 0)
        ffi.release(self._metadata)

    def set_file_end(self, nbytes: int) -> None:
        """Host clusters that begin at or past *nbytes* do not exist."""
        lib.l2map_set_file_end(self._map, nbytes)

    def set_file(self, slot: int | None, *, writable: bool) -> None:
        """Say which of the worker's files this is, and whether overwrites in place may be answered."""
        lib.l2map_set_file(self._map, lib.SLOT_UNKNOWN if slot is None else slot, writable)

    def set_data_file(self, slot: int | None) -> None:
        """Say which of the worker's files data lies in, of an image where that is another one."""
        lib.l2map_set_data_file(self._map, lib.SLOT_UNKNOWN if slot is None else slot)

    @property
    def error(self) -> int:
        """errno of an entry, or a mark of the log, that the extent map could not write; 0: it wrote them all."""
        return int(lib.l2map_error(self._map))

    @property
    def can_say_zeros(self) -> bool:
        """Whether an entry can: not in version 2, which has no flag for it, over a backing file."""
        return bool(lib.l2map_can_say_zeros(self._map))

    def set_backing(self, extent_map: ExtentMap | None, size: int, owner: object) -> None:
        """Let unallocated clusters show what *extent_map*, kept alive by *owner*, says; None: only Python can tell."""
        self._backing = owner
        translate, context = extent_map[:2] if extent_map else (0, 0)
        pointers = ffi.cast("extent_translate", translate), ffi.cast("void *", context)
        lib.l2map_set_backing(self._map, True, *pointers, size)

    def clear_backing(self) -> None:
        """Let unallocated clusters read as zeros."""
        lib.l2map_set_backing(self._map, False, ffi.NULL, ffi.NULL, 0)
        self._backing = None

    def set_cipher(self, address: int, owner: object) -> None:
        """Data is stored by the `struct extent_cipher` at *address*, kept alive by *owner*."""
        self._cipher = owner
        lib.l2map_set_cipher(self._map, ffi.cast("struct extent_cipher *", address))

    def set_stock(self, stock: Any, unsynced: Any) -> None:
        """Let writes that find nothing take clusters from *stock*, and from *unsynced* for waiting links; borrowed."""
        self._stock = stock, unsynced
        lib.l2map_set_stock(self._map, stock, unsynced)

    def set_freed(self, freed: Any) -> None:
        """Let the extent map leave the host clusters of entries that it clears in *freed*, which is borrowed."""
        self._freed = freed
        lib.l2map_set_freed(self._map, freed)

    def set_untouched(self, untouched: Untouched) -> None:
        """Let the extent map link *untouched* clusters of the data file; one is so until its entry changes."""
        self.untouched = untouched
        lib.l2map_set_untouched(self._map, untouched.native)

    def set_log(self, log: Any) -> None:
        """Let links of the extent map's wait in *log*, a `struct link_log`, which is borrowed."""
        self._log = log
        lib.l2map_set_log(self._map, log)

    def set_logless(self, is_logless: bool) -> None:
        """Say whether no link will wait in a log: the extent map makes its own after a SYNC then."""
        lib.l2map_set_logless(self._map, is_logless)

    def set_dirty(self, dirty: Any) -> None:
        """Let the extent map note in *dirty*, a `struct dirty_bits`, which is borrowed, what it changes."""
        self._dirty = dirty
        lib.l2map_set_dirty(self._map, dirty)

    def lock(self, first: int, last: int) -> None:
        """Somebody holds, or waits for, these guest clusters: the extent map leaves their entries alone."""
        lib.l2map_lock(self._map, first, last)

    def is_there(self, first: int, last: int) -> bool:
        """Whether the extent map holds a place there, whose bytes or name are under way."""
        return bool(lib.l2map_holds(self._map, first, last))

    def unlock(self, first: int, last: int) -> None:
        """Take one `lock` of exactly this range back."""
        lib.l2map_unlock(self._map, first, last)

    def claim(self, slice_number: int) -> None:
        """Let the extent map not load the slice itself: the file says, or said when it was read, what is not true."""
        lib.l2map_claim(self._map, slice_number)

    def unclaim(self, slice_number: int) -> None:
        """Take one `claim` back."""
        lib.l2map_unclaim(self._map, slice_number)

    @property
    def loads(self) -> int:
        """How many slices the extent map has loaded itself."""
        return lib.l2map_loads(self._map)

    @property
    def clears(self) -> int:
        """How often the extent map has let entries say zeros."""
        return lib.l2map_clears(self._map)

    def load(self, slice_number: int, data: bytes) -> None:
        """Put a slice, as it is in the file, into the cache."""
        lib.l2map_load(self._map, slice_number, ffi.from_buffer("uint8_t[]", data))

    def load_empty(self, slice_number: int) -> None:
        """Put a slice without entries into the cache, which nobody has used yet."""
        lib.l2map_load(self._map, slice_number, ffi.NULL)

    def used(self) -> list[int]:
        """Slices in the cache that were used since they came there, if it is full lately: some, if there are many."""
        slices = ffi.new("uint64_t[]", USED_SLICES)
        return list(slices[0 : lib.l2map_used(self._map, slices, USED_SLICES)])

    def update(self, guest_offset: int, entries: Sequence[int]) -> None:
        """The entries from *guest_offset* on, all in one slice, have become *entries*."""
        words = ffi.new("uint64_t[]", self.entries.words(entries))
        lib.l2map_update(self._map, guest_offset, words, len(entries))

    def describe(self, guest_offset: int, nbytes: int) -> Run:
        """The longest run at *guest_offset*, of *nbytes* at most, that memory can tell about."""
        run = self._run
        lib.l2map_describe(self._map, guest_offset, nbytes, run)
        entry = run.entry.word | run.entry.bitmap << WORD_BITS
        return Run(run.kind, run.copied, entry, run.host_offset, run.nbytes)


def _borrow(ctype: str, numbers: "array[int]") -> Any:
    """A C view of *numbers*; an empty array has no address of its own."""
    return ffi.from_buffer(ctype, numbers) if numbers else ffi.new(ctype, 1)


class RawMap:
    """The extent map of a file that is its own mapping."""

    def __init__(self, size: int) -> None:
        self._map = ffi.new("struct rawmap *", {"size": size, "slot": lib.SLOT_UNKNOWN, "writable": 0})

    @property
    def extent_map(self) -> ExtentMap:
        """The addresses the worker takes."""
        return ExtentMap(lib.rawmap_translate_address(), int(ffi.cast("uintptr_t", self._map)))

    def set_file(self, slot: int | None, *, writable: bool) -> None:
        """Say which of the worker's files this is, and whether writes may be answered."""
        self._map.slot = lib.SLOT_UNKNOWN if slot is None else slot
        self._map.writable = writable

    def set_cipher(self, start: int, address: int, owner: object) -> None:
        """The disk begins at *start*, stored by the `struct extent_cipher` at *address*, kept alive by *owner*."""
        self._cipher = owner
        self._map.start = start
        self._map.cipher = ffi.cast("struct extent_cipher *", address)

    def set_size(self, size: int) -> None:
        """The file is *size* bytes long from now on; the extent map keeps its addresses."""
        self._map.size = size
