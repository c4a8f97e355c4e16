"""The image: what people use. Coroutines that reach the disk only through `qcow2.driver.operation`."""

import errno
from array import array
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qcow2.driver.operation import Allocated, Buffer, File, Read, Resize, Size
from qcow2.engine.backing import Backing, Capabilities, Place, Seen
from qcow2.engine.bitmapdirectory import BitmapDirectory
from qcow2.engine.bitmaptable import StoredBitmap, load_bitmaps, stored_bits
from qcow2.engine.changes import Changes
from qcow2.engine.compressed import CompressedClusters, level_of
from qcow2.engine.data import Data, find_untouched
from qcow2.engine.encryption import Keyring, open_data
from qcow2.engine.expansion import expand_zeros, has_zero_flags
from qcow2.engine.growth import grown_size
from qcow2.engine.links import LinkPolicy
from qcow2.engine.mapping import Mapping
from qcow2.engine.metadata import active_clusters, snapshot_clusters
from qcow2.engine.opened import Found, Opened
from qcow2.engine.reading import Reader
from qcow2.engine.root import Root
from qcow2.engine.shedding import shrunk_size
from qcow2.engine.stability import Stability
from qcow2.engine.statistics import Statistics
from qcow2.error import CorruptImage, UnsupportedImage
from qcow2.format.geometry import Geometry
from qcow2.format.header import Header, clear_autoclear, header_over, read_header, require_uncorrupted
from qcow2.format.layout import (
    ENTRY_SIZE,
    HEADER_INCOMPATIBLE_OFFSET,
    PROMISES,
    Autoclear,
    CryptMethod,
    ExtensionMagic,
    HeaderRecord,
    Incompatible,
)
from qcow2.format.refusal import l1_entries
from qcow2.format.snapshot import Snapshot, find_snapshot, read_snapshots, require_sizes
from qcow2.plane.entry import words_of
from qcow2.plane.l2cache import ExtentMap, L2Cache, Run
from qcow2.plane.linklog import LinkLog

DEFAULT_CACHE_SIZE = 32 << 20


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """How to open an image."""

    writable: bool = False
    lazy_refcounts: bool | None = None  # None: as the image says
    cache_size: int = DEFAULT_CACHE_SIZE  # bytes of L2 tables in memory, at most
    snapshot: str | None = None  # read the disk as this one, an id or else a name, holds it
    keys: Keyring | None = None  # what may open it, if it is encrypted
    has_data: bool = True  # else an encrypted image opens without a key, and only its mapping can be looked at


class Image:
    """An open qcow2 image. Its coroutines may run side by side on one scheduler; nothing else may touch it."""

    def __init__(
        self,
        file: File,
        data: Data,
        header: Header,
        l1: "array[int]",
        backing: "Backing | None",
        options: OpenOptions,
    ) -> None:
        self.file = file
        self.geometry = Geometry.of(header.record)
        self.backing = backing
        self.read_only = not options.writable
        self._statistics = Statistics()
        self._header = header
        self.on_failure: Callable[[], None] = lambda: None  # told once, when the image takes no more writes
        self.on_bitmaps_void: Callable[[], None] = lambda: None  # told once, at the first change of a disk with bitmaps
        self.bitmap_problems: list[str] = []  # why some bitmaps cannot be kept, once it is open for writing
        self._told_void = False
        self._slot: int | None = None
        self._is_hollow: bool | None = None  # nobody has asked yet
        self._stability = stability = Stability(file, self._statistics, self._refuse_writes, data.file)
        self._cache = L2Cache(self.geometry, options.cache_size)
        self._mapping = mapping = Mapping(
            file, self.geometry, self._cache, l1, header.record.l1_table_offset, stability, self._statistics
        )
        compressed = CompressedClusters(file, self.geometry, header.compression_type, self._statistics)
        self._data = data
        self._native = data.native
        if self._native is not None:
            self._cache.set_cipher(*self._native)
        self._reader = reader = Reader(data, mapping, compressed, backing)
        self._opened = Opened(file, data, self.geometry, mapping, reader, compressed, stability, self._statistics)
        self._changes: Changes | None = None  # only while writable
        if backing is not None:
            self._cache.set_backing(backing.extent_map, backing.size, backing)

    @classmethod
    async def open(
        cls,
        file: File,
        *,
        backing: "Backing | None" = None,
        data_file: File | None = None,
        options: OpenOptions | None = None,
        log: LinkLog | None = None,
    ) -> "Image":
        """Open the image in *file*, already locked, over *backing*, already open; its data may be in *data_file*.

        For writing it must not be dirty: repair it first. Links may wait in *log*, if it is given, until `flush`.
        Raises: UnsupportedImage, CorruptImage.
        """
        options = options or OpenOptions()
        header = await read_header(file)
        if header.record.has_data_file and data_file is None:
            raise UnsupportedImage(file.path, "its data is in an external data file, which is not open")
        if options.writable:
            _require_writable(file, header, options)
        if options.snapshot is not None:
            header = await _header_of(file, header, options.snapshot)
        data = await open_data(file, header, options.keys, has_data=options.has_data, data_file=data_file)
        record = header.record
        l1 = words_of(await Read(file, record.l1_table_offset, record.l1_size * ENTRY_SIZE))
        image = cls(file, data, header, l1, backing, options)
        file_size = await Size(file)
        if file_size < record.l1_end:  # an empty end of the L1 table was cut off; nothing may be put in its place
            if options.writable:
                await Resize(file, record.l1_end)
            file_size = record.l1_end
        image._mapping.set_file_end(file_size)
        if options.writable:
            image._changes = await image._open_changes(header, file_size, options, log)
        return image

    async def _open_changes(self, header: Header, file_size: int, options: OpenOptions, log: LinkLog | None) -> Changes:
        record = header.record
        nbytes = record.refcount_table_clusters << record.cluster_bits
        table = words_of(await Read(self.file, record.refcount_table_offset, nbytes))
        _validate_refcount_table(self.file, record, table, file_size)
        owned = active_clusters(self.file, self.geometry, header, self._mapping.l1, table)
        snapshots = await read_snapshots(self.file, header)
        owned_by_snapshots = await snapshot_clusters(self.file, self.geometry, record, snapshots, file_size)
        self._mapping.own_metadata(owned + owned_by_snapshots)
        header = await clear_autoclear(self.file, header, maintained=PROMISES)  # those wait for the first change
        is_lazy = header.has_lazy_refcounts if options.lazy_refcounts is None else options.lazy_refcounts
        root = Root(header, self._stability, is_lazy=is_lazy)
        bitmaps, owned_by_bitmaps = await self._load_bitmaps(root)
        if record.has_data_file and not record.has_raw_data:
            self._cache.set_untouched(await find_untouched(self._data.file, self.geometry))
        problems = self.bitmap_problems
        found = Found(file_size, table, snapshots, owned_by_snapshots, bitmaps, owned_by_bitmaps, problems)
        return Changes(self._opened, root, found, log if record.version >= 3 else None)  # else no place for the tag

    async def _load_bitmaps(self, root: Root) -> "tuple[list[StoredBitmap], array[int]]":
        """The bitmaps that are kept from now on; none if they cannot be found: the first change voids them."""
        header = root.header
        if header.extension(ExtensionMagic.BITMAPS) is None:
            return [], array("Q")
        try:
            bitmaps, owned = await load_bitmaps(self.file, header, self.geometry, self._mapping.is_metadata)
        except CorruptImage as error:
            self.bitmap_problems.append(str(error))
            return [], array("Q")
        self._mapping.own_metadata(owned)
        root.broken_promises ^= Autoclear.BITMAPS
        for each in bitmaps:
            if each.is_kept and each.problem:
                text = f"bitmap {each.bitmap.name!r} {each.problem}: the first change makes it void"
                self.bitmap_problems.append(text)
        return bitmaps, owned

    @property
    def statistics(self) -> Statistics:
        """What the engine has counted, and the slices that the extent map has loaded, the entries it has cleared."""
        return self._statistics + Statistics(l2_loads=self._cache.loads, metadata_writes=self._cache.clears)

    @property
    def header(self) -> Header:
        """The header as it is on the disk."""
        return self._changes.root.header if self._changes else self._header

    @property
    def is_encrypted(self) -> bool:
        """Whether what it stores of the disk is encrypted."""
        return self._data.is_encrypted

    @property
    def size(self) -> int:
        """Length of the disk in bytes."""
        return self.geometry.size

    @property
    def chain(self) -> "Sequence[Backing]":
        """This image and what is under it, top first."""
        return [self, *(self.backing.chain if self.backing is not None else ())]

    @property
    def extent_map(self) -> ExtentMap:
        """The addresses the worker takes; they answer for the whole chain, as long as this image is referenced."""
        return self._cache.extent_map

    @property
    def data_file(self) -> File:
        """The image's own, or its external data file."""
        return self._data.file

    @property
    def capabilities(self) -> Capabilities:
        """Clusters, snapshots and bitmaps."""
        has_snapshots = not self.geometry.has_data_file
        return Capabilities(self.geometry.cluster_size, has_snapshots=has_snapshots, has_bitmaps=True)

    def set_slot(self, file: File, slot: int | None) -> None:
        """Say which of the worker's files *file*, one of the chain's, is; None takes it back."""
        if file is self.file and (self._native is not None or not self._data.is_encrypted):  # else only Python can tell
            self._slot = slot
            self._cache.set_file(slot, writable=self._may_overwrite())
        elif file is self._data.file and file is not self.file:
            self._cache.set_data_file(slot)
        elif self.backing is not None:
            self.backing.set_slot(file, slot)

    def set_link_policy(self, policy: LinkPolicy) -> None:
        """Say when links may wait, and who is told about it; at first they may always."""
        if self._changes is not None:
            has_log = policy.has_log and not self.geometry.has_data_file
            self._changes.links.policy = replace(policy, has_log=has_log)

    def fail(self, error: OSError) -> None:
        """Take no more writes because of *error*; reads go on, close leaves the dirty bit."""
        self._stability.fail(error)

    def _refuse_writes(self) -> None:
        self._cache.set_file(self._slot, writable=False)
        self.on_failure()

    def _writable(self) -> Changes:
        if self._changes is None:
            raise OSError(errno.EROFS, "opened read-only", self.file.path)
        self._changes.require_trust()
        return self._changes

    def _may_overwrite(self) -> bool:
        """Whether the extent map may answer writes: not before the first change has seen to what must come before."""
        return self._changes is not None and self._changes.may_overwrite and self._stability.error is None

    async def _changing(self) -> Changes:
        changes = self._writable()
        if changes.root.has_promises:
            breaks = changes.root.header.record.autoclear_features & changes.root.broken_promises
            await changes.root.void_promises()
            changes.require_trust()
            self._cache.set_file(self._slot, writable=self._may_overwrite())
            if breaks & Autoclear.BITMAPS and not self._told_void:
                self._told_void = True
                self.on_bitmaps_void()
        if changes.uncounted.is_due:
            await changes.uncounted.look_if_cheap()
            changes.require_trust()
            self._cache.set_file(self._slot, writable=self._may_overwrite())
        return changes

    async def resolve(self, guest_offset: int, nbytes: int) -> Run:
        """Describe the longest run at *guest_offset* that this image, without its backing file, maps in one way."""
        return await self._mapping.resolve(guest_offset, nbytes)

    async def is_hollow(self) -> bool:
        """Whether much of the file is holes, so that data of the mapping may be none of the host's.

        The rule is QEMU's for images with preallocated metadata, but that it counts what has references.
        """
        if self._data.is_encrypted:  # a hole holds no zeros
            return False
        if self._is_hollow is None:
            size = self.geometry.clusters(await Size(self.file))
            held = await Allocated(self.file) >> self.geometry.cluster_bits
            self._is_hollow = size >= max(held * 10 // 9, held + 2)
        return self._is_hollow

    async def reads_as_zeros(self, guest_offset: int, nbytes: int) -> bool:
        """Whether the mappings of the chain show, without a look at data, that the range reads as zeros."""
        return await self._reader.reads_as_zeros(guest_offset, nbytes)

    async def find(self, guest_offset: int, nbytes: int) -> Place | Seen:
        """Where in the files of the chain the range is, if it is in one piece."""
        return await self._reader.find(guest_offset, nbytes)

    async def read(self, guest_offset: int, target: Buffer) -> None:
        """Fill *target*, which lies inside the disk.

        Raises: OSError, CorruptImage.
        """
        await self._reader.read(guest_offset, target)

    async def write(self, guest_offset: int, source: Buffer) -> None:
        """Put *source*, which lies inside the disk, at *guest_offset*; process-safe on return, stable after `flush`.

        Raises: OSError, CorruptImage; then nothing, a part or all of it is written.
        """
        changes = await self._changing()
        await changes.bitmaps.mark(guest_offset, len(source))
        await changes.guard(changes.writer.write(guest_offset, source))

    def require_compressible(self) -> None:
        """Raises: UnsupportedImage if it can have no compressed clusters."""
        if self._data.is_encrypted or self.header.record.incompatible_features & Incompatible.EXTERNAL_DATA:
            raise UnsupportedImage(self.file.path, "no compressed clusters if it is encrypted or has a data file")

    async def write_compressed(self, guest_offset: int, source: memoryview, level: int | None = None) -> None:
        """As `write`, of whole clusters, the disk's last one as long as it is; those that become smaller compressed.

        Raises: ValueError, UnsupportedImage; OSError, CorruptImage; then nothing, a part or all of it is written.
        """
        self.require_compressible()
        level = level_of(self.header.compression_type, level)
        end, size = guest_offset + len(source), self.geometry.cluster_size
        if guest_offset % size or (end % size and end != self.size):
            raise ValueError(f"{len(source)} bytes at {guest_offset} are not whole clusters of {size} bytes")
        changes = await self._changing()
        await changes.bitmaps.mark(guest_offset, len(source))
        await changes.guard(changes.packer.write(guest_offset, source, level))

    async def fetch(self, guest_offset: int, nbytes: int, content: memoryview | None = None) -> None:
        """Let the image itself have *content*, what shows through it in the range, or zeros if that is what does.

        Where it has anything, also what was written meanwhile, that stays: the disk is the same, so no bitmap knows.
        Raises: OSError, CorruptImage; then a part of it is the image's.
        """
        changes = await self._changing()
        await changes.guard(changes.fetcher.fetch(guest_offset, nbytes, content))

    async def write_zeroes(self, guest_offset: int, nbytes: int, *, unmap: bool) -> None:
        """Make the range read as zeros; *unmap* lets go of the host clusters that it covers, else they are kept."""
        changes = await self._changing()
        await changes.bitmaps.mark(guest_offset, nbytes)
        await changes.guard(changes.zeroer.write_zeroes(guest_offset, nbytes, unmap=unmap))

    async def discard(self, guest_offset: int, nbytes: int) -> None:
        """Let go of the host clusters that the range covers, which then read as zeros; the rest stays as it is."""
        changes = await self._changing()
        await changes.bitmaps.mark(guest_offset, nbytes)
        await changes.guard(changes.zeroer.discard(guest_offset, nbytes))

    async def flush(self) -> None:
        """Make every write that has completed stable."""
        if self._changes is not None:
            await self._changes.links.flush()

    async def settle(self) -> None:
        """Let the file alone hold all that has completed: no link waits after, and no bits are live."""
        if self._changes is not None:
            await self._changes.links.commit()
            await self._changes.bitmaps.settle()

    async def grow(self, nbytes: int) -> None:
        """Let the disk be *nbytes* long, rounded up to a sector; what is new reads as zeros. Stable on return.

        Nothing else is under way. A death at any moment leaves the old disk or the new one.
        Raises: ValueError, UnsupportedImage; OSError, then the disk goes on as it was.
        """
        self._require_own_data("resized")
        changes = await self._alone()
        size = grown_size(self.file, self.header, nbytes)
        if size != self.size:
            require_sizes(self.file.path, changes.snapshots.table)
        await changes.guard(changes.fitting.change(size, changes.grower.grow(size)))

    async def shrink(self, nbytes: int) -> None:
        """Let the disk be *nbytes* long, rounded up to a sector; what is past that is gone. Stable on return.

        Nothing else is under way. A death at any moment leaves the old disk or the new one.
        Raises: ValueError, UnsupportedImage, CorruptImage; OSError, then the disk may be the new one.
        """
        self._require_own_data("resized")
        changes = await self._alone()
        size = shrunk_size(self.file, self.header, nbytes)
        await changes.guard(changes.fitting.change(size, changes.shedder.shrink(size)))

    async def preallocate(self, guest_offset: int, nbytes: int, *, writes: bool) -> None:
        """Give each cluster of the range that holds nothing a place, which is zeros; *writes* writes them, too.

        Nothing else is under way. Raises: OSError, CorruptImage; then a part of them has one.
        """
        self._require_own_data("preallocated")
        changes = await self._alone()
        await changes.guard(changes.writer.preallocate(guest_offset, nbytes, writes=writes))

    async def expand_zeros(self) -> None:
        """Let nothing say zeros that version 2 cannot say so; the disk is as it was. Nothing else is under way.

        Raises: OSError, CorruptImage; UnsupportedImage if a snapshot says so, which is left as it is.
        """
        for snapshot in await self.snapshots():
            record = snapshot.record
            l1 = words_of(await Read(self.file, record.l1_table_offset, record.l1_size * ENTRY_SIZE))
            if await has_zero_flags(self.file, self.geometry, l1):
                message = f"snapshot {snapshot.name!r} has zero clusters, which version 2 does not know"
                raise UnsupportedImage(self.file.path, message)
        changes = await self._alone()
        await changes.guard(expand_zeros(self._opened, changes.writer, changes.zeroer))
        await changes.links.commit()
        if await has_zero_flags(self.file, self.geometry, self._mapping.l1):
            raise UnsupportedImage(self.file.path, "there are zero clusters past the end of the disk")

    async def empty(self) -> None:
        """Let what is below show everywhere: the same bytes as now, says the caller, and stable. Stable on return.

        Nothing else is under way. Raises: OSError, CorruptImage; then some clusters are here still.
        """
        changes = await self._alone()
        await changes.guard(changes.shedder.shed(0))

    async def put_over(self, backing: "Backing | None", name: str | None, backing_format: str | None) -> None:
        """Let *backing*, open, show through, and the header say so by *name*; stable on return.

        Nothing else is under way. The disk is the same over it, says the caller: what that takes is stable first.
        Raises: UnsupportedImage, before anything has changed; OSError, then nobody knows which one the header names.
        """
        self.refuse_snapshots()
        changes = await self._alone()
        header = header_over(self.file, changes.root.header, name, backing_format)
        await changes.bitmaps.settle()
        await changes.links.flush()
        await changes.root.rewrite(header)
        self.backing = backing
        self._reader.backing = backing
        if backing is None:
            self._cache.clear_backing()
        else:
            self._cache.set_backing(backing.extent_map, backing.size, backing)

    def refuse_snapshots(self) -> None:
        """Internal snapshots show what is below, too, and nothing is fetched for them. Raises: UnsupportedImage."""
        if count := self.header.record.nb_snapshots:
            message = f"{count} internal snapshots would show another disk: delete them first"
            raise UnsupportedImage(self.file.path, message)

    async def snapshots(self) -> tuple[Snapshot, ...]:
        """The internal snapshots, in the order of their table. Raises: UnsupportedImage, CorruptImage, OSError."""
        table = self._changes.snapshots.table if self._changes else await read_snapshots(self.file, self._header)
        return table.snapshots

    async def create_snapshot(self, name: str, date_ns: int) -> Snapshot:
        """Keep what the disk holds as the internal snapshot *name*, made *date_ns* ns after 1970; stable on return.

        Nothing else is under way. A death at any moment leaves the old snapshots or the new one besides.
        Raises: ValueError, UnsupportedImage, CorruptImage; OSError, EINVAL if the refcounts are too narrow.
        """
        self._require_own_data("kept in internal snapshots")
        changes = await self._alone()
        return await changes.guard(changes.snapshots.create(name, date_ns))

    async def apply_snapshot(self, wanted: str) -> None:
        """Go back to the internal snapshot of the id, or else the name, *wanted*; stable on return.

        Nothing else is under way. The disk is as long as it was then. A death leaves the old disk or the new one.
        Raises: FileNotFoundError, UnsupportedImage, CorruptImage, OSError.
        """
        changes = await self._alone()
        snapshot = find_snapshot(self.file.path, changes.snapshots.table, wanted)
        change = changes.snapshots.apply(snapshot)
        await changes.guard(changes.fitting.change(snapshot.disk_size, change, all_dirty=True))

    async def delete_snapshot(self, name: str) -> None:
        """Forget the internal snapshot *name*, of several the first; what it alone held is free. Stable on return.

        Nothing else is under way. Raises: FileNotFoundError, CorruptImage, OSError.
        """
        changes = await self._alone()
        snapshot = find_snapshot(self.file.path, changes.snapshots.table, name, by_id=False)
        await changes.guard(changes.snapshots.delete(snapshot))

    async def bitmaps(self) -> list[StoredBitmap]:
        """The persistent bitmaps, in the order of their directory. Raises: CorruptImage, OSError."""
        if self._changes is not None:
            return self._changes.bitmaps.stored
        stored, _ = await load_bitmaps(self.file, self.header, self.geometry, lambda cluster: False)
        return stored

    async def bitmap_bits(self, stored: StoredBitmap) -> bytes:
        """The bits of one of `bitmaps`, as of now; bit n is bit n % 8 of byte n // 8. Raises: OSError."""
        if self._changes is not None:
            return await self._changes.bitmaps.read_bits(stored)
        return await stored_bits(self.file, self.geometry, stored)

    async def change_bitmaps(self, change: Callable[[BitmapDirectory], Coroutine[Any, Any, None]]) -> None:
        """Let *change* do something to the directory of bitmaps. Nothing else is under way.

        Raises: BitmapError, UnsupportedImage, CorruptImage, OSError.
        """
        changes = self._writable()
        if changes.uncounted.is_due:
            await changes.uncounted.look_if_cheap()
            changes.require_trust()
        await changes.links.commit()
        await changes.bitmaps.settle()
        await changes.guard(change(changes.bitmap_directory))

    def _require_own_data(self, what: str) -> None:
        if self.geometry.has_data_file:
            raise UnsupportedImage(self.file.path, f"a disk in an external data file cannot be {what}")

    async def _alone(self) -> Changes:
        """What changes the image; no link waits, and nobody else is about to change anything."""
        changes = await self._changing()
        await changes.links.commit()
        return changes

    async def close(self) -> None:
        """Leave the image clean: refcounts written, everything stable, then the dirty bit cleared.

        Nothing else is under way. Raises: OSError if that fails, or a metadata write or sync has failed before; the
        dirty bit then stays.
        """
        if self._changes is not None:
            await self._changes.guard(self._changes.settle())


def _require_writable(file: File, header: Header, options: OpenOptions) -> None:
    """Refuse what may not be written to."""
    if options.snapshot is not None:
        raise UnsupportedImage(file.path, f"snapshot {options.snapshot!r} can be read only")
    require_uncorrupted(file, header)
    if header.is_dirty:
        raise CorruptImage(file.path, HEADER_INCOMPATIBLE_OFFSET, "not closed cleanly, repair it before writing")
    if header.record.crypt_method == CryptMethod.AES:
        raise UnsupportedImage(file.path, "encrypted with the legacy AES of QEMU, which can be read only")
    if options.lazy_refcounts and header.record.version < 3:
        raise UnsupportedImage(file.path, "lazy refcounts need version 3 (compat=1.1)")


async def _header_of(file: File, header: Header, wanted: str) -> Header:
    """*header* as if the disk were what the snapshot *wanted* holds. Raises: FileNotFoundError, CorruptImage."""
    snapshot = find_snapshot(file.path, await read_snapshots(file, header), wanted)
    record = snapshot.record
    end = record.l1_table_offset + record.l1_size * ENTRY_SIZE
    if record.l1_size < l1_entries(
        snapshot.disk_size, header.record.cluster_bits, header.record.entry_size
    ) or end > await Size(file):
        message = f"L1 table of snapshot {wanted!r} is cut off, or too short for {snapshot.disk_size} bytes"
        raise CorruptImage(file.path, record.l1_table_offset, message)
    changed = {"size": snapshot.disk_size, "l1_table_offset": record.l1_table_offset, "l1_size": record.l1_size}
    return replace(header, record=replace(header.record, **changed))


def _validate_refcount_table(file: File, record: HeaderRecord, table: "array[int]", file_size: int) -> None:
    for index, entry in enumerate(table):
        if entry % (1 << record.cluster_bits) or entry >= file_size:
            where = record.refcount_table_offset + index * ENTRY_SIZE
            raise CorruptImage(file.path, where, f"refcount table entry {index} is invalid: {entry:#x}")
