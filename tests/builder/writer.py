"""From a recipe to a file: every run of host clusters is placed, its references counted, its bytes written."""

import random
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.builder.built import Built
from tests.builder.recipe import Cluster, Recipe, View
from tests.builder.record import (
    BITMAPS,
    BITMAPS_EXTENSION,
    COMPRESSED,
    COMPRESSION_TYPE,
    COPIED,
    END,
    HEADER_FIELDS,
    MAGIC,
    V2_FIELDS,
    ZERO,
    extension,
    pack_refcounts,
    padded,
)


@dataclass(eq=False)
class _Run:
    """Contiguous host clusters that some structure needs."""

    nclusters: int
    at: int | None = None
    host_offset: int = 0


def build(recipe: Recipe, path: Path) -> Built:
    """Write the image that *recipe* describes to *path*."""
    return _Writer(recipe).write(path)


class _Writer:
    """One pass over a recipe: place every run of host clusters, count references, write."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.cluster_size = recipe.cluster_size
        self.taken: dict[int, _Run] = {0: _Run(1)}  # host cluster: its owner; the header owns the first
        self.references: Counter[int] = Counter({0: 1})
        self.pieces: dict[int, bytes] = {}
        self.refcount_table = _Run(0)
        self.cursor = 1  # loose runs come at or after it
        self.views = [recipe.view] + [view for _, view in recipe.snapshots]
        self.l1_sizes = [self._l1_size(view) for view in self.views]

    def write(self, path: Path) -> Built:
        tables = self._tables()
        table_runs = {id(table): _Run(1) for view_tables in tables for table in view_tables.values()}
        l1_runs = [self._run(8 * l1_size) for l1_size in self.l1_sizes]
        snapshot_run = self._run(sum(len(self._snapshot(i, 0, 0)) for i in range(len(self.recipe.snapshots))))
        bitmap_runs = self._bitmap_runs()
        self._place_clusters([*l1_runs, snapshot_run, *table_runs.values()], bitmap_runs)
        self._count([*l1_runs, snapshot_run, *bitmap_runs], tables, table_runs)
        blocks = self._place_refcounts()
        self._fill_tables(tables, table_runs, l1_runs)
        self._fill_snapshots(snapshot_run, l1_runs)
        bitmap_extension = self._fill_bitmaps(bitmap_runs)
        self._fill_refcounts(blocks)
        self.pieces[0] = self._header(l1_runs[0], snapshot_run, bitmap_extension)
        self._dump(path)
        l2 = {index: table_runs[id(table)].host_offset for index, table in tables[0].items()}
        offsets = {index: run.host_offset for index, run in blocks.items()}
        return Built(path, self.recipe, l1_runs[0].host_offset, l2, self.refcount_table.host_offset, offsets)

    # -- what there is to place

    def _l1_size(self, view: View) -> int:
        if view is self.recipe.view and self.recipe.l1_size is not None:
            return self.recipe.l1_size
        return -(-self.recipe.size // (self.cluster_size * self.recipe.entries_per_table))

    def _run(self, nbytes: int) -> _Run:
        return _Run(-(-nbytes // self.cluster_size))

    def _tables(self) -> list[dict[int, View]]:
        """The L2 tables of each view; views whose slice is the same objects share the table, as after a snapshot."""
        shared: list[dict[int, View]] = []
        for view in self.views:
            tables: dict[int, View] = {}
            for index, cluster in view.items():
                l1_index, l2_index = divmod(index, self.recipe.entries_per_table)
                tables.setdefault(l1_index, {})[l2_index] = cluster
            for earlier in shared:
                tables = {i: earlier[i] if earlier.get(i) == table else table for i, table in tables.items()}
            shared.append(tables)
        return shared

    def _bitmap_runs(self) -> list[_Run]:
        """The directory, then one table each; the bits themselves are all zeros or all ones, which needs no cluster."""
        directory = sum(len(self._bitmap_entry(*bitmap, 0)) for bitmap in self.recipe.bitmaps)
        return [self._run(directory)] + [
            self._run(8 * self._bitmap_table_size(bits)) for _, bits in self.recipe.bitmaps
        ]

    # -- where it lies

    def _place_clusters(self, before: list[_Run], after: list[_Run]) -> None:
        found = {id(c): c for view in self.views for c in view.values() if c.kind in ("data", "preallocated zero")}
        data = list(found.values())
        data_runs = [_Run(1, cluster.at) for cluster in data]
        stream_run = self._run(len(self.recipe.stream))
        self._place([*before, *data_runs, stream_run, *after])
        for cluster, run in zip(data, data_runs, strict=True):
            cluster.host_offset = run.host_offset
            self.pieces[run.host_offset] = cluster.content
        for cluster, start in self.recipe.stream_members:
            cluster.host_offset = stream_run.host_offset + start
        self.pieces[stream_run.host_offset] = bytes(self.recipe.stream)

    def _place(self, runs: list[_Run]) -> None:
        fixed = [run for run in runs if run.at is not None]
        loose = [run for run in runs if run.at is None and run.nclusters]
        for run in fixed:
            assert run.at is not None
            self._take(run, run.at)
        shuffler = random.Random(self.recipe.seed)
        if self.recipe.layout == "reversed":
            loose.reverse()
        elif self.recipe.layout == "scattered":
            shuffler.shuffle(loose)
        for run in loose:
            gap = shuffler.randrange(3) if self.recipe.layout == "scattered" else 0
            self._take(run, self._free(run.nclusters, gap))

    def _free(self, nclusters: int, gap: int = 0) -> int:
        start = self.cursor + gap
        while any(index in self.taken for index in range(start, start + nclusters)):
            start += 1
        self.cursor = start + nclusters
        return start

    def _take(self, run: _Run, start: int) -> None:
        for index in range(start, start + run.nclusters):
            if index in self.taken:
                raise ValueError(f"host cluster {index} is taken twice")
            self.taken[index] = run
        run.host_offset = start * self.cluster_size

    def _place_refcounts(self) -> dict[int, _Run]:
        """Take a refcount block for each span of clusters in use, the blocks' own and the table's clusters included."""
        per_block = (self.cluster_size * 8) >> self.recipe.refcount_order
        blocks: dict[int, _Run] = {}
        while missing := {index // per_block for index in self.taken} - blocks.keys():
            for index in sorted(missing):
                blocks[index] = _Run(1)
                self._take(blocks[index], self._free(1))
            if (needed := self._run(8 * (max(blocks) + 1)).nclusters) > self.refcount_table.nclusters:
                self.taken = {i: run for i, run in self.taken.items() if run is not self.refcount_table}
                self.refcount_table.nclusters = needed
                self._take(self.refcount_table, self._free(needed))
        return blocks

    def _count(self, runs: list[_Run], tables: list[dict[int, View]], table_runs: dict[int, _Run]) -> None:
        """Count every reference once a path: a table that two views share counts its clusters twice."""
        for run in runs:
            self._refer(run.host_offset, run.nclusters * self.cluster_size)
        for view_tables in tables:
            for table in view_tables.values():
                self._refer(table_runs[id(table)].host_offset, self.cluster_size)
                for cluster in table.values():
                    if cluster.is_allocated:
                        self._refer(cluster.host_offset, self._extent(cluster))

    def _extent(self, cluster: Cluster) -> int:
        """Bytes from the first to the last 512-byte sector that the entry covers."""
        if cluster.kind != "compressed":
            return self.cluster_size
        return (self._sectors(cluster) + 1) * 512 - cluster.host_offset % 512

    def _sectors(self, cluster: Cluster) -> int:
        return (cluster.host_offset + cluster.nbytes - 1) // 512 - cluster.host_offset // 512

    def _refer(self, host_offset: int, nbytes: int) -> None:
        if nbytes:
            first, last = host_offset // self.cluster_size, (host_offset + nbytes - 1) // self.cluster_size
            self.references.update(range(first, last + 1))

    # -- what is in it

    def _fill_tables(self, tables: list[dict[int, View]], table_runs: dict[int, _Run], l1_runs: list[_Run]) -> None:
        for view_tables, l1_size, l1_run in zip(tables, self.l1_sizes, l1_runs, strict=True):
            l1 = [0] * l1_size
            for l1_index, table in view_tables.items():
                run = table_runs[id(table)]
                l1[l1_index] = run.host_offset | self._copied(run.host_offset)
                words = self.recipe.entry_size // 8
                entries = [0] * (self.recipe.entries_per_table * words)
                for l2_index, cluster in table.items():
                    entries[l2_index * words] = self._entry(cluster)
                    if self.recipe.has_subclusters:
                        entries[l2_index * words + 1] = self._bitmap(cluster)
                self.pieces[run.host_offset] = struct.pack(f">{len(entries)}Q", *entries)
            self.pieces[l1_run.host_offset] = struct.pack(f">{l1_size}Q", *l1)

    def _copied(self, host_offset: int) -> int:
        return COPIED if self.references[host_offset // self.cluster_size] == 1 else 0

    def _bitmap(self, cluster: Cluster) -> int:
        match cluster.kind:
            case "zero" | "preallocated zero":
                return 0xFFFFFFFF << 32
            case "compressed":
                return 0
            case "data":
                return cluster.zero_bits << 32 | cluster.data_bits

    def _entry(self, cluster: Cluster) -> int:
        zero = 0 if self.recipe.has_subclusters else ZERO
        match cluster.kind:
            case "zero":
                return zero
            case "compressed":
                bits = 62 - (self.recipe.cluster_bits - 8)
                return COMPRESSED | self._sectors(cluster) << bits | cluster.host_offset
            case "data" | "preallocated zero" as kind:
                return cluster.host_offset | self._copied(cluster.host_offset) | (zero if kind != "data" else 0)

    def _snapshot(self, index: int, l1_offset: int, l1_size: int) -> bytes:
        """A snapshot table entry with the 16 bytes of extra data that version 3 asks for."""
        name = self.recipe.snapshots[index][0].encode()
        identity = str(index + 1).encode()
        head = struct.pack(">QIHHIIQII", l1_offset, l1_size, len(identity), len(name), 0, 0, 0, 0, 16)
        return padded(head + struct.pack(">QQ", 0, self.recipe.size) + identity + name, 8)

    def _fill_snapshots(self, run: _Run, l1_runs: list[_Run]) -> None:
        entries = [self._snapshot(i, l1_runs[i + 1].host_offset, self.l1_sizes[i + 1]) for i in range(len(l1_runs) - 1)]
        if entries:
            self.pieces[run.host_offset] = b"".join(entries)

    def _bitmap_table_size(self, granularity_bits: int) -> int:
        nbits = -(-self.recipe.size // (1 << granularity_bits))
        return -(-nbits // (8 * self.cluster_size))

    def _bitmap_entry(self, name: str, granularity_bits: int, table_offset: int) -> bytes:
        size = self._bitmap_table_size(granularity_bits)
        head = struct.pack(">QIIBBHI", table_offset, size, 1 << 1, 1, granularity_bits, len(name.encode()), 0)
        return padded(head + name.encode(), 8)

    def _fill_bitmaps(self, runs: list[_Run]) -> bytes:
        if not self.recipe.bitmaps:
            return b""
        directory, *tables = runs
        entries = [self._bitmap_entry(*b, t.host_offset) for b, t in zip(self.recipe.bitmaps, tables, strict=True)]
        self.pieces[directory.host_offset] = b"".join(entries)
        for (_, bits), table in zip(self.recipe.bitmaps, tables, strict=True):
            entry = struct.pack(">Q", 0 if self.recipe.are_bitmaps_clean else 1)  # 1: all ones
            self.pieces[table.host_offset] = entry * self._bitmap_table_size(bits)
        return struct.pack(">IIQQ", len(entries), 0, len(b"".join(entries)), directory.host_offset)

    def _fill_refcounts(self, blocks: dict[int, _Run]) -> None:
        for run in (self.refcount_table, *blocks.values()):
            self._refer(run.host_offset, run.nclusters * self.cluster_size)
        per_block = (self.cluster_size * 8) >> self.recipe.refcount_order
        table = [0] * (self.refcount_table.nclusters * self.cluster_size // 8)
        for index, run in blocks.items():
            table[index] = run.host_offset
            counts = [self.references[index * per_block + i] for i in range(per_block)]
            self.pieces[run.host_offset] = pack_refcounts(counts, self.recipe.refcount_order)
        self.pieces[self.refcount_table.host_offset] = struct.pack(f">{len(table)}Q", *table)

    def _header(self, l1: _Run, snapshots: _Run, bitmap_extension: bytes) -> bytes:
        recipe = self.recipe
        is_zstd = recipe.compression == "zstd"
        length = 72 if recipe.version == 2 else recipe.header_length + len(recipe.header_tail)
        extensions = list(recipe.extensions)
        if bitmap_extension:
            extensions.append((BITMAPS_EXTENSION, bitmap_extension))
        tail = b"".join(extension(kind, data) for kind, data in extensions) + extension(END, b"")
        name = (recipe.backing or "").encode()
        values = {
            "magic": MAGIC,
            "version": recipe.version,
            "backing_file_offset": length + len(tail) if name else 0,
            "backing_file_size": len(name),
            "crypt_method": 0,
            "cluster_bits": recipe.cluster_bits,
            "size": recipe.size,
            "l1_size": self.l1_sizes[0],
            "l1_table_offset": l1.host_offset,
            "refcount_table_offset": self.refcount_table.host_offset,
            "refcount_table_clusters": self.refcount_table.nclusters,
            "nb_snapshots": len(recipe.snapshots),
            "snapshots_offset": snapshots.host_offset,
            "incompatible_features": recipe.incompatible | (COMPRESSION_TYPE if is_zstd else 0),
            "compatible_features": recipe.compatible,
            "autoclear_features": recipe.autoclear | (BITMAPS if recipe.bitmaps else 0),
            "refcount_order": recipe.refcount_order,
            "header_length": length,
            "compression_type": int(is_zstd),
        }
        header = bytearray(length)
        for key in V2_FIELDS if recipe.version == 2 else HEADER_FIELDS:
            offset, code = HEADER_FIELDS[key]
            if offset < length - len(recipe.header_tail):
                struct.pack_into(">" + code, header, offset, values[key])
        header[length - len(recipe.header_tail) :] = recipe.header_tail
        first = bytes(header) + tail + name
        if len(first) > self.cluster_size:
            raise ValueError(f"header of {len(first)} bytes in a cluster of {self.cluster_size}")
        return first

    def _dump(self, path: Path) -> None:
        with path.open("wb") as file:
            file.truncate((max(self.taken) + 1) * self.cluster_size)
            for host_offset, data in self.pieces.items():
                file.seek(host_offset)
                file.write(data)
