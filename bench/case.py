"""What is measured: the rows of the speed we aim for, and the cases around them."""

from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase

from bench.load import Job, Kind, Order
from bench.recipe import Recipe
from vhost.option import CacheMode

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40


class Images(Enum):
    """How long an image lives."""

    SHARED = "one image, read by both servers"
    PER_SERVER = "one image for each server"
    PER_RUN = "a new image in every run"


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison. *target* is the ratio to QEMU that is aimed for, *limit* the name of the disk's own figure."""

    name: str
    title: str
    recipe: Recipe
    job: Job
    images: Images
    cache: CacheMode = CacheMode.WRITEBACK
    target: float | None = None
    limit: str | None = None
    on_tmpfs: bool = False
    options: tuple[str, ...] = ()  # of our daemon

    @property
    def warms_up(self) -> bool:
        """A job that visits everything once has nothing to repeat."""
        return self.job.order is not Order.ONCE

    @property
    def writable(self) -> bool:
        return self.images is not Images.SHARED


LAZY, ACCURATE = "compat=1.1,lazy_refcounts=on", "compat=1.1,lazy_refcounts=off"

# Much larger than what a run writes: a fast server must not find its own clusters again more often than a slow one.
FRESH = Recipe(64 * GIB, LAZY, name="fresh, lazy refcounts, 64 GiB")
FRESH_ACCURATE = Recipe(64 * GIB, ACCURATE, name="fresh, accurate refcounts, 64 GiB")
FILLED = Recipe(GIB, is_filled=True, name="1 GiB, all written")
OVERLAY = Recipe(2 * GIB, LAZY, base_nbytes=2 * GIB, name="overlay on 2 GiB, lazy refcounts")
SMALL_OVERLAY = Recipe(GIB, LAZY, base_nbytes=GIB, name="overlay on 1 GiB, lazy refcounts")
COMPRESSED = Recipe(512 * MIB, base_nbytes=512 * MIB, base_is_compressed=True, name="overlay on 512 MiB compressed")
FALLOCATED = Recipe(8 * GIB, "compat=1.1,preallocation=falloc", name="8 GiB, preallocated")
PARTS = "extended_l2=on,cluster_size=128k"
FRESH_PARTS = Recipe(64 * GIB, f"{LAZY},{PARTS}", name="fresh, lazy refcounts, 64 GiB, extended L2")
FILLED_PARTS = Recipe(GIB, f"compat=1.1,{PARTS}", is_filled=True, name="1 GiB, all written, extended L2")
OVERLAY_PARTS = Recipe(2 * GIB, f"{LAZY},{PARTS}", base_nbytes=2 * GIB, name="overlay on 2 GiB, extended L2")
OVERLAY_DATA_FILE = Recipe(
    2 * GIB, LAZY, base_nbytes=2 * GIB, has_data_file=True, name="overlay on 2 GiB, in a data file"
)
RAW = "data_file_raw=on"
FRESH_DATA_FILE = Recipe(64 * GIB, LAZY, has_data_file=True, name="fresh, 64 GiB, in a data file")
FRESH_RAW = Recipe(64 * GIB, f"{LAZY},{RAW}", has_data_file=True, name="fresh, 64 GiB, in a raw data file")
FILLED_DATA_FILE = Recipe(GIB, has_data_file=True, is_filled=True, name="1 GiB, all written, in a data file")
FILLED_RAW = Recipe(
    GIB, f"compat=1.1,{RAW}", has_data_file=True, is_filled=True, name="1 GiB, all written, in a raw data file"
)
FRESH_LUKS = Recipe(64 * GIB, LAZY, is_encrypted=True, name="fresh, lazy refcounts, 64 GiB, LUKS")
FILLED_LUKS = Recipe(GIB, is_encrypted=True, is_filled=True, name="1 GiB, all written, LUKS")
FILLED_BITMAPS = Recipe(GIB, is_filled=True, nbitmaps=3, name="1 GiB, all written, three bitmaps")
HUGE = Recipe(TIB, "compat=1.1,preallocation=metadata", name="1 TiB, 128 MiB of L2 tables")

ROWS = (
    Case(
        "writethrough-fresh-32",
        "writethrough, fresh lazy image, 4 KiB random writes, depth 32",
        FRESH,
        Job(FRESH.nbytes, depth=32),
        Images.PER_RUN,
        CacheMode.WRITETHROUGH,
        target=12,
        limit="group commit, fresh",
    ),
    Case(
        "writethrough-fresh-1",
        "writethrough, fresh lazy image, 4 KiB random writes, depth 1",
        FRESH,
        Job(FRESH.nbytes),
        Images.PER_RUN,
        CacheMode.WRITETHROUGH,
        target=1.7,
        limit="single commit, fresh",
    ),
    Case(
        "writeback-fresh-32",
        "writeback, fresh lazy image on tmpfs, 4 KiB random writes, depth 32",
        FRESH,
        Job(FRESH.nbytes, depth=32),
        Images.PER_RUN,
        target=10,
        on_tmpfs=True,
    ),
    Case(
        "read-32",
        "warm 4 KiB random reads, depth 32",
        FILLED,
        Job(GIB, read_percent=100, depth=32),
        Images.SHARED,
        target=2,
        limit="warm read, depth 32",
    ),
    Case(
        "overwrite-32",
        "warm 4 KiB random overwrites, depth 32",
        FILLED,
        Job(GIB, depth=32),
        Images.PER_SERVER,
        target=2,
        limit="warm overwrite, depth 32",
    ),
    Case(
        "read-1",
        "warm 4 KiB random reads, depth 1",
        FILLED,
        Job(GIB, read_percent=100),
        Images.SHARED,
        target=2,
        limit="warm read, depth 1",
    ),
    Case(
        "overwrite-1",
        "warm 4 KiB random overwrites, depth 1",
        FILLED,
        Job(GIB),
        Images.PER_SERVER,
        target=1.3,
        limit="warm overwrite, depth 1",
    ),
    Case(
        "overlay-write-1",
        "overlay, writeback, a 4 KiB write to each cluster of the base, depth 1",
        OVERLAY,
        Job(OVERLAY.nbytes, order=Order.ONCE),
        Images.PER_RUN,
        target=3,
        limit="64 KiB write, fresh",
    ),
    Case(
        "overlay-write-32",
        "overlay, writeback, a 4 KiB write to each cluster of the base, depth 32",
        OVERLAY,
        Job(OVERLAY.nbytes, order=Order.ONCE, depth=32),
        Images.PER_RUN,
        target=1.8,
        limit="64 KiB write, fresh",
    ),
    Case(
        "sequential-read",
        "cache=none, sequential 128 KiB reads, depth 16",
        FILLED,
        Job(GIB, read_percent=100, block_size=128 * KIB, order=Order.SEQUENTIAL, depth=16),
        Images.SHARED,
        CacheMode.NONE,
        target=1.1,
        limit="direct sequential read",
    ),
    Case(
        "sequential-write",
        "cache=none, fresh lazy image, sequential 128 KiB writes, depth 16",
        FRESH,
        Job(FRESH.nbytes, block_size=128 * KIB, order=Order.SEQUENTIAL, depth=16),
        Images.PER_RUN,
        CacheMode.NONE,
        target=1.1,
        limit="direct sequential write",
    ),
)

ASLEEP = ("--poll-us=0",)

EXTRAS = (
    Case(
        "read-1-asleep",
        "read-1, but our daemon never looks at its rings before it sleeps",
        FILLED,
        Job(GIB, read_percent=100),
        Images.SHARED,
        options=ASLEEP,
        target=1.3,
    ),
    Case(
        "overwrite-1-asleep",
        "overwrite-1, but our daemon never looks at its rings before it sleeps",
        FILLED,
        Job(GIB),
        Images.PER_SERVER,
        options=ASLEEP,
        target=1.3,
    ),
    Case(
        "writethrough-accurate-32",
        "writethrough, fresh accurate image, 4 KiB random writes, depth 32",
        FRESH_ACCURATE,
        Job(FRESH.nbytes, depth=32),
        Images.PER_RUN,
        CacheMode.WRITETHROUGH,
        limit="group commit, fresh",
        target=18,
    ),
    Case(
        "writethrough-accurate-1",
        "writethrough, fresh accurate image, 4 KiB random writes, depth 1",
        FRESH_ACCURATE,
        Job(FRESH.nbytes),
        Images.PER_RUN,
        CacheMode.WRITETHROUGH,
        limit="single commit, fresh",
    ),
    Case(
        "writethrough-overwrite-32",
        "writethrough, 4 KiB random overwrites, depth 32",
        FILLED,
        Job(GIB, depth=32),
        Images.PER_SERVER,
        CacheMode.WRITETHROUGH,
        limit="group commit, written",
        target=6,
    ),
    Case(
        "writethrough-overwrite-1",
        "writethrough, 4 KiB random overwrites, depth 1",
        FILLED,
        Job(GIB),
        Images.PER_SERVER,
        CacheMode.WRITETHROUGH,
        target=1.4,
        limit="single commit, written",
    ),
    Case(
        "overlay-writethrough-32",
        "overlay, writethrough, a 4 KiB write to each cluster of the base, depth 32",
        OVERLAY,
        Job(OVERLAY.nbytes, order=Order.ONCE, depth=32),
        Images.PER_RUN,
        CacheMode.WRITETHROUGH,
    ),
    Case(
        "overlay-writethrough-1",
        "overlay, writethrough, a 4 KiB write to each cluster of the base, depth 1",
        OVERLAY,
        Job(OVERLAY.nbytes, order=Order.ONCE),
        Images.PER_RUN,
        CacheMode.WRITETHROUGH,
    ),
    Case(
        "flush-8",
        "writeback, fresh lazy image, 4 KiB random writes, a FLUSH every 8, depth 8",
        FRESH,
        Job(FRESH.nbytes, depth=8, flush_every=8),
        Images.PER_RUN,
        target=4,
    ),
    Case(
        "flush-8-over",
        "writeback, 4 KiB random overwrites, a FLUSH every 8, depth 8",
        FILLED,
        Job(GIB, depth=8, flush_every=8),
        Images.PER_SERVER,
        target=2,
    ),
    Case(
        "sequential-read-cached",
        "writeback, sequential 128 KiB reads, depth 16",
        FILLED,
        Job(GIB, read_percent=100, block_size=128 * KIB, order=Order.SEQUENTIAL, depth=16),
        Images.SHARED,
        target=1.1,
    ),
    Case(
        "sequential-write-cached",
        "writeback, fresh lazy image, sequential 128 KiB writes, depth 16",
        FRESH,
        Job(FRESH.nbytes, block_size=128 * KIB, order=Order.SEQUENTIAL, depth=16),
        Images.PER_RUN,
        target=1.1,
    ),
    Case(
        "overlay-read-32",
        "overlay, warm 4 KiB random reads of the base, depth 32",
        OVERLAY,
        Job(GIB, read_percent=100, depth=32),
        Images.SHARED,
        limit="warm read, depth 32",
        target=2,
    ),
    Case(
        "compressed-cold",
        "compressed base, a 4 KiB read of each cluster, depth 32",
        COMPRESSED,
        Job(COMPRESSED.nbytes, read_percent=100, order=Order.ONCE, depth=32),
        Images.SHARED,
        target=1.8,
    ),
    Case(
        "compressed-repeated",
        "compressed base, 4 KiB random reads of the same 4 MiB, depth 32",
        COMPRESSED,
        Job(4 * MIB, read_percent=100, depth=32),
        Images.SHARED,
        target=15,
    ),
    Case(
        "queues-4-read",
        "warm 4 KiB random reads, 4 queues of depth 8",
        FILLED,
        Job(GIB, read_percent=100, depth=8, queues=4),
        Images.SHARED,
        limit="warm read, depth 32",
    ),
    Case(
        "queues-4-overwrite",
        "warm 4 KiB random overwrites, 4 queues of depth 8",
        FILLED,
        Job(GIB, depth=8, queues=4),
        Images.PER_SERVER,
        limit="warm overwrite, depth 32",
    ),
    Case(
        "mixed-32",
        "warm 4 KiB random, 70 % reads, 30 % overwrites, depth 32",
        FILLED,
        Job(GIB, read_percent=70, depth=32),
        Images.PER_SERVER,
    ),
    Case(
        "direct-read-32",
        "cache=none, 4 KiB random reads, depth 32",
        FILLED,
        Job(GIB, read_percent=100, depth=32),
        Images.SHARED,
        CacheMode.NONE,
        limit="direct read, depth 32",
        target=1.2,
    ),
    Case(
        "direct-overwrite-32",
        "cache=none, 4 KiB random overwrites, depth 32",
        FILLED,
        Job(GIB, depth=32),
        Images.PER_SERVER,
        CacheMode.NONE,
        limit="direct overwrite, depth 32",
        target=1.1,
    ),
    Case(
        "direct-fresh-32",
        "cache=none, fresh lazy image, 4 KiB random writes, depth 32",
        FRESH,
        Job(FRESH.nbytes, depth=32),
        Images.PER_RUN,
        CacheMode.NONE,
        target=3,
    ),
    Case(
        "direct-fresh-1",
        "cache=none, fresh lazy image, 4 KiB random writes, depth 1",
        FRESH,
        Job(FRESH.nbytes),
        Images.PER_RUN,
        CacheMode.NONE,
    ),
    Case(
        "huge-read-32",
        "1 TiB image, 4 KiB random reads, L2 tables four times the cache, depth 32",
        HUGE,
        Job(TIB, read_percent=100, depth=32),
        Images.SHARED,
    ),
    Case(
        "discard-32",
        "a discard of each cluster, depth 32",
        FALLOCATED,
        Job(FALLOCATED.nbytes, kind=Kind.DISCARD, block_size=64 * KIB, order=Order.ONCE, depth=32),
        Images.PER_RUN,
    ),
)


def warm(
    name: str, recipe: Recipe, what: str, block_size: int = 4 * KIB, depth: int = 32, target: float | None = None
) -> tuple[Case, Case]:
    """Reads and overwrites of an image that is all written."""
    title = f"{what}, warm {block_size // KIB} KiB random {{}}, depth {depth}"
    reads = Job(GIB, read_percent=100, block_size=block_size, depth=depth)
    writes = Job(GIB, block_size=block_size, depth=depth)
    return (
        Case(f"{name}-read-{depth}", title.format("reads"), recipe, reads, Images.SHARED, target=target),
        Case(
            f"{name}-overwrite-{depth}",
            title.format("overwrites"),
            recipe,
            writes,
            Images.PER_SERVER,
            target=target,
        ),
    )


def fresh(name: str, recipe: Recipe, what: str) -> Case:
    """Stable writes to an image that holds nothing."""
    title = f"writethrough, fresh, {what}, 4 KiB random writes, depth 32"
    job = Job(recipe.nbytes, depth=32)
    return Case(f"{name}-fresh-32", title, recipe, job, Images.PER_RUN, CacheMode.WRITETHROUGH, target=8)


def over_base(name: str, recipe: Recipe, what: str, depth: int, target: float | None) -> Case:
    """Random writes to an overlay, which meet clusters again."""
    title = f"overlay, writeback, {what}, 4 KiB random writes, depth {depth}"
    job = Job(recipe.nbytes, depth=depth)
    return Case(f"{name}-overlay-{depth}", title, recipe, job, Images.PER_RUN, target=target)


FEATURES = (
    over_base("parts", OVERLAY_PARTS, "extended L2, 128 KiB clusters", 1, 2),
    over_base("parts", OVERLAY_PARTS, "extended L2, 128 KiB clusters", 32, 3),
    over_base("data-file", OVERLAY_DATA_FILE, "in a data file", 1, None),
    over_base("data-file", OVERLAY_DATA_FILE, "in a data file", 32, None),
    over_base("plain", OVERLAY, "64 KiB clusters", 1, None),
    over_base("plain", OVERLAY, "64 KiB clusters", 32, None),
    *warm("parts", FILLED_PARTS, "extended L2"),
    *warm("data-file", FILLED_DATA_FILE, "data file"),
    *warm("raw-data-file", FILLED_RAW, "raw data file"),
    *warm("luks", FILLED_LUKS, "LUKS", target=1.5),
    *warm("luks-large", FILLED_LUKS, "LUKS", block_size=128 * KIB, depth=16, target=1.5),
    *warm("plain-large", FILLED, "plain", block_size=128 * KIB, depth=16),
    *warm("bitmaps", FILLED_BITMAPS, "three bitmaps"),
    fresh("parts", FRESH_PARTS, "extended L2"),
    fresh("data-file", FRESH_DATA_FILE, "data file"),
    fresh("raw-data-file", FRESH_RAW, "raw data file"),
    fresh("luks", FRESH_LUKS, "LUKS"),
)


class UnknownCase(Exception):
    """No case has such a name."""


def select(patterns: list[str], cases: tuple[Case, ...]) -> list[Case]:
    """The cases whose names match any of *patterns*, all without patterns, in their own order. Raises: UnknownCase."""
    for pattern in patterns:
        if not any(fnmatchcase(case.name, pattern) for case in cases):
            raise UnknownCase(f"no case is called {pattern!r}; --list names them all")
    return [case for case in cases if not patterns or any(fnmatchcase(case.name, pattern) for pattern in patterns)]
