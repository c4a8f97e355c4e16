"""From guest bytes to what the image has for them: the L1 table, the L2 slices, and the changes of their entries.

A change is written to the file before it is made in memory, so what is in memory is never ahead of the page cache;
except for entries that are held: they are in the link log (`qcow2.engine.links`) and not yet in the file.
"""

from array import array
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from qcow2.driver.operation import File, Read, Signal
from qcow2.engine.stability import Stability
from qcow2.engine.statistics import Statistics
from qcow2.error import CorruptImage, MetadataOverlap, NotTried
from qcow2.format.geometry import Geometry
from qcow2.format.layout import ENTRY_SIZE
from qcow2.native import ffi, lib
from qcow2.plane.entry import bytes_of, l1_entry, l1_is_private, l1_is_sound, l1_table
from qcow2.plane.l2cache import Kind, L2Cache, Run

KNOWN_SLICES = 16  # of a new table: all of it with clusters of 64 KiB
SOME_LINKS = 256  # runs of entries that are handed to the driver in one piece
FEW_CLUSTERS = 16  # whose places among all metadata are found one by one
MISS, BAD = int(Kind.MISS), int(Kind.BAD)


def sort_clusters(clusters: "array[int]") -> None:
    """Put *clusters* in ascending order."""
    lib.clusters_sort(ffi.from_buffer("uint64_t[]", clusters), len(clusters))


def _without(clusters: "array[int]", lost: Iterable[int]) -> "array[int]":
    """The sorted *clusters* but for those of *lost*, each as often as it is named there."""
    times, kept = Counter(lost), array("Q")
    for cluster in clusters:
        if times.get(cluster):
            times[cluster] -= 1
        else:
            kept.append(cluster)
    return kept


class Mapping:
    """The active L1 table and its L2 tables."""

    def __init__(
        self,
        file: File,
        geometry: Geometry,
        cache: L2Cache,
        l1: "array[int]",
        l1_offset: int,
        stability: Stability,
        statistics: Statistics,
    ) -> None:
        self.geometry = geometry
        self.cache = cache
        self.entries = cache.entries
        self.l1 = l1
        self.l1_offset = l1_offset
        self.file_end = 0  # no host cluster begins at or past it
        self._file = file
        self._stability = stability
        self._statistics = statistics
        self._metadata: array[int] = array("Q")
        self._loading: dict[int, Signal] = {}
        self._outdated: set[int] = set()  # slices changed in the file while being loaded
        self._held: dict[int, dict[int, int]] = {}  # slice -> guest cluster -> entry that is not in the file yet
        self.before_load: Callable[[], None] = lambda: None  # `remember` what the extent map has linked meanwhile
        cache.set_l1(l1)
        cache.set_metadata(self._metadata)

    def move_l1(self, l1: "array[int]", l1_offset: int) -> None:
        """The header points at another L1 table, *l1*, at *l1_offset*."""
        self.cache.set_l1(l1)
        self.l1, self.l1_offset = l1, l1_offset

    def set_file_end(self, nbytes: int) -> None:
        """The host file is *nbytes* long now."""
        self.file_end = self.geometry.round_up(nbytes)
        self.cache.set_file_end(self.file_end)

    def own_metadata(self, clusters: Sequence[int]) -> None:
        """Guest data may not lie in these host *clusters*; one that is named twice has to be disowned twice."""
        self.cache.release_metadata()
        if len(clusters) <= FEW_CLUSTERS:
            for cluster in clusters:
                insort(self._metadata, cluster)
        else:
            self._metadata.extend(clusters)
            sort_clusters(self._metadata)
        self.cache.set_metadata(self._metadata)

    def disown_metadata(self, clusters: Sequence[int]) -> None:
        """These host *clusters* hold metadata no longer."""
        self.cache.release_metadata()
        if len(clusters) <= FEW_CLUSTERS:
            for cluster in clusters:
                del self._metadata[bisect_left(self._metadata, cluster)]
        else:
            self._metadata = _without(self._metadata, clusters)
        self.cache.set_metadata(self._metadata)

    def first_metadata(self, clusters: range) -> int | None:
        """The first of the consecutive *clusters* that holds metadata."""
        index = bisect_left(self._metadata, clusters.start)
        if index < len(self._metadata) and self._metadata[index] < clusters.stop:
            return self._metadata[index]
        return None

    def is_metadata(self, cluster: int) -> bool:
        """Whether *cluster* holds metadata."""
        return self.first_metadata(range(cluster, cluster + 1)) is not None

    def known(self, guest_offset: int, nbytes: int) -> Run:
        """What `resolve` would say, if memory can tell; else a run of kind MISS or BAD."""
        return self.cache.describe(guest_offset, nbytes)

    async def resolve(self, guest_offset: int, nbytes: int) -> Run:
        """Describe the longest run at *guest_offset* that one L2 slice maps in one way.

        Awaits: at most one Read of a slice; none when it is cached.
        Raises: CorruptImage if the entry has reserved bits or names a cluster that cannot be its own.
        """
        run = self.cache.describe(guest_offset, nbytes)
        while run.kind == MISS:
            await self._load(guest_offset)
            run = self.cache.describe(guest_offset, nbytes)
        if run.kind == BAD:
            self._refuse_entry(guest_offset, run)
        return run

    def _refuse_entry(self, guest_offset: int, run: Run) -> None:
        where = self.table_offset(guest_offset) + self.geometry.entry_offset(guest_offset)
        message = f"L2 entry {self.entries.text(run.entry)} of guest offset {guest_offset:#x}"
        cluster = self.geometry.cluster_of(run.host_offset)
        is_stream = self.entries.is_compressed(run.entry)
        if not is_stream and self.first_metadata(range(cluster, cluster + 1)) is not None:
            raise MetadataOverlap(self._file.path, where, f"{message} names a cluster that holds metadata")
        raise CorruptImage(self._file.path, where, f"{message} is invalid")

    def has_table(self, guest_offset: int) -> bool:
        """Whether an L2 table maps *guest_offset*."""
        return bool(l1_table(self.l1[self.geometry.l1_index(guest_offset)]))

    def has_private_table(self, guest_offset: int) -> bool:
        """Whether an L2 table that no snapshot shares maps *guest_offset*."""
        return l1_is_private(self.l1[self.geometry.l1_index(guest_offset)])

    def table_offset(self, guest_offset: int) -> int:
        """Host offset of the L2 table of *guest_offset*.

        Raises: CorruptImage if the L1 entry cannot be true.
        """
        index = self.geometry.l1_index(guest_offset)
        entry = self.l1[index]
        offset = l1_table(entry)
        if not l1_is_sound(entry, self.geometry.cluster_size) or offset >= self.file_end:
            where = self.l1_offset + index * ENTRY_SIZE
            raise CorruptImage(self._file.path, where, f"L1 entry {index} is invalid: {entry:#018x}")
        return offset

    async def _load(self, guest_offset: int) -> None:
        """Bring the slice of *guest_offset* into the cache; who comes while it is read waits for it."""
        number = self.geometry.slice_of(guest_offset)
        if number in self._loading:
            await self._loading[number].wait()
            return
        slice_bytes = self.geometry.slice_bytes
        in_table = self.geometry.entry_offset(guest_offset) // slice_bytes * slice_bytes
        table = self.table_offset(guest_offset)
        signal = self._loading[number] = Signal()
        self.cache.claim(number)  # what the extent map would load and link meanwhile would be undone
        try:
            self._statistics.l2_loads += 1
            data = await Read(self._file, table + in_table, slice_bytes)
            if number not in self._outdated:
                self.before_load()
                self.cache.load(number, data)
                for cluster, entry in self._held.get(number, {}).items():
                    self.cache.update(cluster << self.geometry.cluster_bits, [entry])
        finally:
            self._outdated.discard(number)
            del self._loading[number]
            self.cache.unclaim(number)
            signal.set()

    async def link(self, guest_offset: int, entries: Sequence[int]) -> None:
        """Make the L2 entries from *guest_offset* on, all of one slice of a private table, be *entries*.

        One metadata write; process-safe on return. The caller holds the lock of the clusters.
        """
        await self.bring(guest_offset, entries)
        self.cache.update(guest_offset, entries)

    async def link_stable(self, guest_offset: int, old_entries: Sequence[int], entries: Sequence[int]) -> None:
        """As `link`, for *entries* that show the same as the *old_entries*; nobody sees them before they are stable.

        What was written before is stable first. Raises: OSError; then memory has the entries as they were.
        """
        await self._stability.sync()
        self.hold(guest_offset, old_entries)  # also if the slice is read again
        try:
            await self.bring(guest_offset, entries)
            await self._sync_or_bring_back(guest_offset, old_entries)
        except OSError:
            self.release(guest_offset, old_entries)
            raise
        self.hold(guest_offset, entries)
        self.release(guest_offset, entries)

    async def _sync_or_bring_back(self, guest_offset: int, old_entries: Sequence[int]) -> None:
        """`sync`; where that is not tried the file says what memory must not, so it says the *old_entries* again."""
        try:
            await self._stability.sync()
        except NotTried as error:
            try:
                await self.bring(guest_offset, old_entries)
            except OSError:
                self._stability.fail(error)
            raise

    async def bring(self, guest_offset: int, entries: Sequence[int]) -> None:
        """The same for entries that are held: memory has them already, or what came after."""
        await self._stability.write(*self._part(guest_offset, entries))
        self._outdate(guest_offset)

    async def bring_all(self, links: Sequence[tuple[int, Sequence[int]]], on_brought: Callable[[range], None]) -> None:
        """`bring` many, in order; *on_brought* is told the guest clusters whose entries are in the file."""
        done, parts = 0, list[tuple[int, bytes]]()
        while done < len(links):
            if not parts:
                parts = [self._part(*link) for link in links[done : done + SOME_LINKS]]
            count = await self._stability.write_some(parts)
            for guest_offset, entries in links[done : done + count]:
                self._outdate(guest_offset)
                first = self.geometry.cluster_of(guest_offset)
                on_brought(range(first, first + len(entries)))
            done += count
            del parts[:count]

    def _part(self, guest_offset: int, entries: Sequence[int]) -> tuple[int, bytes]:
        """Where in the file these entries are, and how."""
        where = self.table_offset(guest_offset) + self.geometry.entry_offset(guest_offset)
        return where, self.entries.pack(entries)

    def _outdate(self, guest_offset: int) -> None:
        """Who reads the slice of *guest_offset* from the file now reads it again."""
        number = self.geometry.slice_of(guest_offset)
        if number in self._loading:
            self._outdated.add(number)

    def hold(self, guest_offset: int, entries: Sequence[int]) -> None:
        """Let the entries be *entries* in memory, as `link` would; in the file once `link` says the same."""
        self.remember(guest_offset, entries)
        self.cache.update(guest_offset, entries)

    def remember(self, guest_offset: int, entries: Sequence[int]) -> None:
        """The entries are held, and *entries* in memory already."""
        number = self.geometry.slice_of(guest_offset)
        if number not in self._held:
            self._held[number] = {}
            self.cache.claim(number)
        self._held[number].update(enumerate(entries, self.geometry.cluster_of(guest_offset)))

    def remember_all(self, links: Iterable[tuple[int, int]]) -> None:
        """`remember` many: guest clusters and their entries."""
        in_slice = self.geometry.slice_bits - self.geometry.cluster_bits
        for cluster, entry in links:
            number = cluster >> in_slice
            held = self._held.get(number)
            if held is None:
                held = self._held[number] = {}
                self.cache.claim(number)
            held[cluster] = entry

    def release(self, guest_offset: int, entries: Sequence[int]) -> None:
        """The *entries* that were held, of one slice, are in the file and need no log; what came after is held on."""
        number = self.geometry.slice_of(guest_offset)
        held = self._held.get(number, {})
        for cluster, entry in enumerate(entries, self.geometry.cluster_of(guest_offset)):
            if held.get(cluster) == entry:
                del held[cluster]
        if not held and number in self._held:
            del self._held[number]
            self.cache.unclaim(number)

    def remember_again(
        self, guest_offset: int, entries: Sequence[int], taken_back: int, old_entries: Sequence[int]
    ) -> None:
        """Hold those of *entries*, which wait, that a link at *taken_back*, which is undone, has brought to light."""
        old = dict(enumerate(old_entries, self.geometry.cluster_of(taken_back)))
        for cluster, entry in enumerate(entries, self.geometry.cluster_of(guest_offset)):
            if old.get(cluster) == entry:
                self.remember(cluster << self.geometry.cluster_bits, [entry])

    @property
    def holds(self) -> bool:
        """Whether an entry is held."""
        return bool(self._held)

    def is_held(self, guest_offset: int, nclusters: int) -> bool:
        """Whether one of the entries from *guest_offset* on, all of one slice, is held."""
        held = self._held.get(self.geometry.slice_of(guest_offset))
        first = self.geometry.cluster_of(guest_offset)
        return held is not None and any(cluster in held for cluster in range(first, first + nclusters))

    def know_empty(self, guest_offset: int) -> None:
        """The L2 table of *guest_offset* is new: its slices, a few at most, need not be read to be known."""
        geometry = self.geometry
        in_table = geometry.cluster_size // geometry.slice_bytes
        number = geometry.slice_of(guest_offset)
        first = number // in_table * in_table if in_table <= KNOWN_SLICES else number
        end = min(first + in_table, first + KNOWN_SLICES, geometry.slice_of(geometry.size - 1) + 1)
        for empty in range(first, end):
            self.cache.load_empty(empty)

    def forget(self, l1: "array[int]") -> None:
        """The tables in the file were changed by others; the L1 table, where it was, holds *l1*. No entry is held."""
        self.l1[:] = l1
        self._outdated.update(self._loading)
        self.cache.resize()

    async def change_l1(self, l1: "array[int]") -> None:
        """Let the L1 table hold *l1*, in the file and in memory; what they led to is the caller's. No entry is held.

        Raises: OSError; then a part of it does, the same one in both.
        """

        def take(part: slice) -> None:
            entries = slice(part.start // ENTRY_SIZE, part.stop // ENTRY_SIZE)
            self.l1[entries] = l1[entries]

        try:
            await self._stability.change(self.l1_offset, bytes_of(self.l1), bytes_of(l1), take)
        finally:
            self.forget(self.l1)

    async def set_table(self, guest_offset: int, host_offset: int) -> None:
        """Let the L1 entry of *guest_offset* point at the private table at *host_offset*, which is counted."""
        index = self.geometry.l1_index(guest_offset)
        entry = l1_entry(host_offset)
        await self._stability.write(self.l1_offset + index * ENTRY_SIZE, bytes_of([entry]))
        if old := l1_table(self.l1[index]):  # it may become free: the COPIED flag can lag behind the refcount
            self.disown_metadata([old >> self.geometry.cluster_bits])
        self.own_metadata([host_offset >> self.geometry.cluster_bits])
        self.l1[index] = entry
