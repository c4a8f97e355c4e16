"""Bounded-exhaustive workloads: every sequence of up to three actions of a guest, on every sort of image.

An action aims at fixed guest clusters, so that the actions of a sequence meet: what one writes the next discards,
overwrites or finds shared. The layout is the same on all images:

    0, 1    data                          8 and on  nothing, and no backing file under it
    2, 3    a zero cluster, and one that keeps a host cluster (version 3)
    4 to 7  what the backing file shows, or compressed clusters, or nothing
    the L2 table's length and on: a second L2 table's range, empty

What makes no sense, and where:

- *copy* is left out where nothing lies under cluster 4 but zeros (plain images without a snapshot), and *decompress*
  where no cluster is compressed. On clusters of 512 bytes, one sector, both replace the whole cluster.
- *table-growth* is left out with clusters of 64 KiB: the image would be 16 TiB long before its refcount table is full.
- *block* and *table-growth* start from an image whose refcount block, or table, is nearly full. With clusters of
  64 KiB any allocation of such a sequence makes the block, with smaller ones only the action itself does.
- Version 2 knows neither lazy refcounts nor zero clusters, so it has no lazy image, and nothing in clusters 2 and 3.
- Only one of *block* and *table-growth* starts a sequence's image off; a sequence with both starts with the full table.
"""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from qcow2.driver.buffer import MemoryBuffer
from qcow2.engine.create import Options, create
from tests.builder import Built, Recipe, build
from tests.builder.record import EXTENDED_L2
from tests.crash.driver import CrashDriver, SimulatedFile, SimulatedMemory
from tests.crash.history import SECTOR
from tests.crash.images import LAZY, content, open_image, read_all
from tests.crash.workload import Action, Step
from tests.engine import ENCRYPTION

BACKING = "base"
SHOWN = 14  # guest clusters that may hold something at first
FILL_AT = 14  # the first of those that *block* and *table-growth* write
NEIGHBOURS = 4  # writes into each end of a request
SCANNED_BLOCKS = 4  # the allocator looks for holes in so many blocks before it goes to the end of the file


@dataclass(frozen=True)
class Sort:
    """A sort of image."""

    name: str
    cluster_bits: int = 10
    lazy: bool = False
    version: int = 3
    refcount_order: int = 4
    backing: bool = False
    backing_clusters: int = 8  # of this image's size; the last lacks a sector
    compressed_backing: bool = False  # the backing file is an image of compressed clusters, not raw
    compressed: bool = False
    snapshot: bool = False
    subclusters: bool = False
    encrypted: bool = False  # made by us: the builder knows no ciphers
    tables: int = 1  # L2 tables before the one of the last ten clusters

    @property
    def cluster_sectors(self) -> int:
        return (1 << self.cluster_bits) // SECTOR

    @property
    def per_table(self) -> int:
        """How many clusters an L2 table maps; without subclusters a refcount table of one has as many entries."""
        return (1 << self.cluster_bits) // (16 if self.subclusters else 8)

    @property
    def incompatible(self) -> int:
        return EXTENDED_L2 if self.subclusters else 0

    @property
    def per_block(self) -> int:
        return (8 << self.cluster_bits) >> self.refcount_order

    @property
    def nsectors(self) -> int:
        """The disk; its last cluster is partial where a cluster has sectors."""
        return (self.tables * self.per_table + 10) * self.cluster_sectors - (1 if self.cluster_bits > 9 else 0)

    @property
    def room(self) -> int:
        """Clusters left in a refcount block that is nearly full."""
        return {9: 40, 10: 60, 14: 6, 16: 3}[self.cluster_bits]

    def has(self, action: str) -> bool:
        """Whether *action* makes sense."""
        match action:
            case "copy":
                return self.backing or self.snapshot
            case "decompress":
                return self.compressed
            case "table-growth":
                return self.cluster_bits < 14
            case _:
                return True


SORTS = {
    sort.name: sort
    for sort in (
        Sort("lazy", lazy=True),
        Sort("accurate"),
        Sort("v2", version=2),
        Sort("v2-backing", version=2, backing=True),
        Sort("backing", backing=True),
        Sort("backing-lazy", backing=True, lazy=True),
        Sort("compressed-base", backing=True, compressed_backing=True),
        Sort("compressed-base-lazy", backing=True, compressed_backing=True, lazy=True),
        Sort("compressed", compressed=True),
        Sort("compressed-lazy", compressed=True, lazy=True),
        Sort("snapshot", snapshot=True),
        Sort("snapshot-lazy", snapshot=True, lazy=True),
        Sort("512", cluster_bits=9),
        Sort("512-lazy", cluster_bits=9, lazy=True),
        Sort("width-1", cluster_bits=9, refcount_order=0),
        Sort("width-64", cluster_bits=9, refcount_order=6),
        Sort("64k", cluster_bits=16),
        Sort("parts", cluster_bits=14, subclusters=True),
        Sort("parts-lazy", cluster_bits=14, subclusters=True, backing=True, lazy=True),
        Sort("parts-snapshot", cluster_bits=14, subclusters=True, backing=True, snapshot=True),
        Sort("64k-backing-lazy", cluster_bits=16, backing=True, lazy=True),
    )
}
OVERLAYS = {
    sort.name: sort
    for sort in (
        Sort("overlay", backing=True, backing_clusters=100),
        Sort("overlay-lazy", backing=True, backing_clusters=100, lazy=True),
        Sort("parts-overlay", cluster_bits=14, subclusters=True, backing=True, backing_clusters=100, lazy=True),
        Sort("encrypted", encrypted=True, lazy=True),
        Sort("encrypted-overlay", encrypted=True, backing=True, backing_clusters=100),
        Sort("encrypted-parts", cluster_bits=14, encrypted=True, subclusters=True, backing=True, backing_clusters=100),
    )
}  # for copies by a data plane
MANY_TABLES = {
    sort.name: sort
    for sort in (
        Sort("many-tables", cluster_bits=9, tables=90),
        Sort("many-tables-overlay", cluster_bits=9, tables=90, backing=True, backing_clusters=90 * 64),
    )
}  # more than the smallest cache holds

ACTIONS = (
    "allocate",
    "overwrite",
    "copy",
    "decompress",
    "unaligned",
    "discard",
    "zeroes",
    "flush",
    "two-writes",
    "write-discard",
    "l1-growth",
    "l2-table",
    "block",
    "table-growth",
    "reopen",
)


def steps_of(sort: Sort, sequence: tuple[str, ...]) -> list[Step]:
    """What the guest asks for, action by action."""
    return [step_of(sort, action, sequence[:index].count(action)) for index, action in enumerate(sequence)]


def step_of(sort: Sort, action: str, before: int) -> Step:
    """The requests of *action*, which are under way at the same time; it came *before* times before."""
    size = sort.cluster_sectors
    half = max(1, size // 2)
    match action:
        case "allocate":
            return [Action("write", 9 * size, 2 * size)]
        case "overwrite":
            return [Action("write", 0, size)]
        case "copy" | "decompress":
            return [Action("write", (4 + before) * size + half - (size == 1), half)]
        case "unaligned":
            return [Action("write", 2 * size - half, size + 2 * half)]
        case "discard":
            return [Action("discard", 0, 6 * size)]
        case "zeroes":
            return [Action("zero", 9 * size - half, 2 * size + half)]
        case "two-writes":
            return [Action("write", 12 * size, size), Action("write", 13 * size - half, half)]
        case "write-discard":
            return [Action("write", size, size), Action("discard", 0, 2 * size)]
        case "l1-growth":
            return [Action("grow", sort.nsectors + (before + 1) * sort.per_table * size)]
        case "l2-table":
            return [Action("write", (sort.per_table + 1) * size, half)]
        case "block" | "table-growth":
            return [Action("write", FILL_AT * size, (sort.room + 1) * size)]
        case _:
            return [Action(action)]


def with_neighbours(sort: Sort, step: Step, draw: random.Random) -> Step:
    """*step*, and writes of single sectors into the first and the last cluster of its requests."""
    size = sort.cluster_sectors
    ends = [end for one in step if one.nsectors for end in (one.sector, one.sector + one.nsectors - 1)]
    firsts = [end // size * size for end in ends]
    sectors = [draw.randrange(first, min(first + size, sort.nsectors)) for first in firsts for _ in range(NEIGHBOURS)]
    return [*step, *(Action("write", sector, 1) for sector in sectors)]


def sequences(sort: Sort, length: int) -> Iterator[tuple[str, ...]]:
    """Every sequence of *length* actions that makes sense."""
    return product([action for action in ACTIONS if sort.has(action)], repeat=length)


def fullness(sequence: tuple[str, ...]) -> str:
    """Which image a sequence starts from: with room, with a full refcount block, or with a full refcount table."""
    return "table" if "table-growth" in sequence else "block" if "block" in sequence else "room"


@dataclass(frozen=True)
class Beginning:
    """An image before anything happened, and what its guest sees in the first SHOWN clusters."""

    image: SimulatedFile
    backing: SimulatedFile | None
    contents: bytes
    beyond: dict[int, bytes]  # other sectors that are not zeros


@cache
def beginning(sort: Sort, full: str) -> Beginning:
    """The image; copy it before use."""
    if sort.encrypted:
        return encrypted_beginning(sort)
    size = sort.nsectors * SECTOR
    cluster_size = 1 << sort.cluster_bits
    recipe = Recipe(
        size=size,
        version=sort.version,
        cluster_bits=sort.cluster_bits,
        refcount_order=sort.refcount_order,
        incompatible=sort.incompatible,
        compatible=LAZY if sort.lazy else 0,
        backing=BACKING if sort.backing else None,
    )
    fill(sort, recipe)
    under = content(7, sort.backing_clusters * cluster_size - SECTOR) if sort.backing else b""
    hosts = full_hosts(sort, full)
    for ahead, host in enumerate(hosts):
        recipe.data(sort.per_table + 2 + ahead, content(50 + ahead, cluster_size), at=host)
    with TemporaryDirectory() as directory:
        built = build(recipe, Path(directory) / "image")
        image = read_sparse(built.path)
    if hosts:
        fill_blocks(sort, image, built, hosts[-1])
    nshown = max(SHOWN, sort.backing_clusters)
    shown = Recipe(size=nshown * cluster_size, version=sort.version, cluster_bits=sort.cluster_bits)
    shown.incompatible = sort.incompatible
    shown.view = {index: cluster for index, cluster in recipe.view.items() if index < nshown}
    beyond = {}
    for ahead, _ in enumerate(hosts):
        data = content(50 + ahead, cluster_size)
        first = (sort.per_table + 2 + ahead) * sort.cluster_sectors
        for index in range(sort.cluster_sectors):
            beyond[first + index] = data[index * SECTOR : (index + 1) * SECTOR]
    return Beginning(image, backing_of(sort, under), shown.contents(under), beyond)


def encrypted_beginning(sort: Sort) -> Beginning:
    """The same for one that is encrypted: data, a zero cluster and one that keeps its host cluster."""
    size, driver = 1 << sort.cluster_bits, CrashDriver()
    file = SimulatedFile("image.qcow2", {}, 0)
    backing = backing_of(sort, content(7, sort.backing_clusters * size - SECTOR) if sort.backing else b"")
    options = Options(
        sort.nsectors * SECTOR,
        cluster_bits=sort.cluster_bits,
        lazy_refcounts=sort.lazy,
        has_subclusters=sort.subclusters,
        backing_name=BACKING if sort.backing else None,
        backing_format="raw" if sort.backing else None,
        encryption=ENCRYPTION,
    )
    driver.run(create(file, options))
    image = driver.run(open_image(file, backing))
    for index in (0, 1, 3):
        driver.run(image.write(index * size, MemoryBuffer(memoryview(bytearray(content(index, size))))))
    driver.run(image.write_zeroes(2 * size, size, unmap=True))
    driver.run(image.write_zeroes(3 * size, size, unmap=False))
    contents = driver.run(read_all(image))
    driver.run(image.close())
    file.memory = SimulatedMemory()
    return Beginning(file, backing, contents[: max(SHOWN, sort.backing_clusters) * size], {})


def backing_of(sort: Sort, under: bytes) -> SimulatedFile | None:
    """A file that shows *under*; compressed, its clusters are larger than those of the image over it."""
    if not sort.compressed_backing:
        return SimulatedFile.parse(BACKING, under) if sort.backing else None
    recipe = Recipe(size=len(under), cluster_bits=sort.cluster_bits + 1)
    for index in range(-(-len(under) // recipe.cluster_size)):
        recipe.compressed(index, under[index * recipe.cluster_size : (index + 1) * recipe.cluster_size])
    with TemporaryDirectory() as directory:
        return SimulatedFile.parse(BACKING, build(recipe, Path(directory) / "base").path.read_bytes())


def fill(sort: Sort, recipe: Recipe) -> None:
    """Put what the layout says where it belongs."""
    size = recipe.cluster_size
    for index in (0, 1):
        recipe.data(index, content(index, size))
    if sort.version >= 3:
        recipe.zero(2)
        recipe.preallocated_zero(3, content(99, size))
    for table in range(1, sort.tables):
        recipe.zero(table * sort.per_table)
    if sort.compressed:
        for index in (4, 5, 6):
            recipe.compressed(index, content(index, size))
    if sort.subclusters:
        recipe.parts(7, content(7, size), data=0x00F0FF07, zero=0x0F000030)
    if sort.snapshot:
        recipe.data(4, content(4, size))
        recipe.data(5, content(5, size))
        recipe.snapshot("kept")
        recipe.data(1, content(11, size))


def full_hosts(sort: Sort, full: str) -> list[int]:
    """Host clusters that hold data, so that the refcount block or table which counts the last one is nearly full."""
    match full:
        case "block":
            return [sort.per_block - sort.room - 1]
        case "table":
            return [
                *(index * sort.per_block for index in range(1, SCANNED_BLOCKS)),
                sort.per_table * sort.per_block - sort.room - 1,
            ]
        case _:
            return []


def fill_blocks(sort: Sort, image: SimulatedFile, built: Built, last_host: int) -> None:
    """Let every cluster in the blocks that are scanned for holes, up to *last_host*, count as used: leaks."""
    width = 1 << sort.refcount_order
    for index, host_offset in built.refcount_block_offsets.items():
        if index >= SCANNED_BLOCKS:
            continue
        block = bytearray(image.read(host_offset, 1 << sort.cluster_bits))
        for entry in range(min(sort.per_block, last_host - index * sort.per_block)):
            if width == 1:
                block[entry // 8] |= 1 << entry % 8
            else:
                start, nbytes = entry * width // 8, width // 8
                if not any(block[start : start + nbytes]):
                    block[start + nbytes - 1] = 1
        image.write(host_offset, bytes(block))


def read_sparse(path: Path) -> SimulatedFile:
    """The file, its holes never read."""
    size = path.stat().st_size
    image = SimulatedFile("image.qcow2", {}, size)
    step = 1 << 16
    with path.open("rb") as file:
        for start in data_chunks(file.fileno(), size, step):
            file.seek(start)
            piece = file.read(step)
            if any(piece):
                image.write(start, piece)
    image.size = size
    return image


def data_chunks(fd: int, size: int, step: int) -> Iterator[int]:
    """Offsets, multiples of *step*, of the chunks that hold data."""
    at = 0
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA) // step * step
        except OSError:
            return
        yield at
        at += step
