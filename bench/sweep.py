"""Series of cases along one axis: queue depth, queues, image size, length of the backing chain."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from bench.case import Case, Images
from bench.load import Job, Kind, Order
from bench.recipe import Recipe
from bench.rows import FILLED, FRESH, GIB, KIB, SMALL_OVERLAY, TIB
from vhost.option import CacheMode

DEPTHS = (1, 2, 4, 8, 16, 32, 64, 128)
QUEUES = (1, 2, 3, 4, 8, 16)
EVEN = dict.fromkeys(DEPTHS, 1.0)  # no slower than QEMU anywhere
COPIES = EVEN | {1: 1.5, 32: 1.2}
SIZES = {"1G": GIB, "16G": 16 * GIB, "128G": 128 * GIB, "1T": TIB, "4T": 4 * TIB}
LARGEST = 15 * TIB  # all mapped it still fits into a file of ext4, in clusters of 2 MiB

CHAINS = (1, 2, 4, 8, 16, 32)
SCALE = ("size", "chain", "queues", "slow-path")  # what may be large; a crowd of requests is `bench.crowd`'s
MAPPED = Recipe(
    8 * GIB, "compat=1.1,lazy_refcounts=on,preallocation=metadata", name="8 GiB, all mapped, lazy refcounts"
)


@dataclass(frozen=True, slots=True)
class Sweep:
    """Cases that differ in one number, which the plot shows on the axis *label*.

    One that *shows_cost* plots our processor time per request against the requests that reach Python at a time.
    """

    name: str
    title: str
    label: str
    points: tuple[tuple[float, Case], ...]
    shows_cost: bool = False


def _along_depth(name: str, title: str, case: Case, targets: Mapping[int, float] | None = None) -> Sweep:
    def point(depth: int) -> Case:
        job, target = replace(case.job, depth=depth), (targets or {}).get(depth)
        return replace(case, name=f"{name}-{depth}", title=f"{title}, depth {depth}", job=job, target=target)

    return Sweep(name, title, "requests in flight", tuple((depth, point(depth)) for depth in DEPTHS))


def _along_queues() -> Sweep:
    def points() -> Iterator[tuple[float, Case]]:
        for queues in QUEUES:
            job = Job(GIB, read_percent=100, depth=32, queues=queues)
            title, target = f"warm reads, {queues} queues of depth 32", 1.6 if queues == 4 else None
            yield queues, Case(f"queues-{queues}", title, FILLED, job, Images.SHARED, target=target)

    return Sweep("queues", "warm 4 KiB random reads, depth 32 on each queue", "queues", tuple(points()))


def _along_size() -> Sweep:
    def points() -> Iterator[tuple[float, Case]]:
        for name, nbytes in SIZES.items():
            recipe = Recipe(nbytes, "compat=1.1,preallocation=metadata", name=f"{name}, all mapped")
            job = Job(nbytes, read_percent=100, depth=32)
            yield nbytes / GIB, Case(f"size-{name}", f"{name} image, 4 KiB random reads", recipe, job, Images.SHARED)
        recipe = Recipe(
            LARGEST, "compat=1.1,cluster_size=2M,preallocation=metadata", name="15T, all mapped, clusters of 2 MiB"
        )
        job, title = Job(LARGEST, read_percent=100, depth=32), "15T image, clusters of 2 MiB, 4 KiB random reads"
        yield LARGEST / GIB, Case("size-15T", title, recipe, job, Images.SHARED)

    return Sweep("size", "4 KiB random reads of a mapped, sparse image, depth 32", "image size, GiB", tuple(points()))


def _along_chain() -> Sweep:
    def points() -> Iterator[tuple[float, Case]]:
        for depth in CHAINS:
            recipe = Recipe(GIB, base_nbytes=GIB, chain=depth, name=f"{depth} overlays on 1 GiB")
            job = Job(GIB, read_percent=100, depth=32)
            yield (
                depth,
                Case(f"chain-{depth}", f"4 KiB random reads through {depth} overlays", recipe, job, Images.SHARED),
            )

    return Sweep("chain", "warm 4 KiB random reads of the base, depth 32", "overlays above it", tuple(points()))


def _each_cluster(name: str, title: str, kind: Kind) -> Sweep:
    job = Job(MAPPED.nbytes, kind=kind, block_size=64 * KIB, order=Order.ONCE)
    return _along_depth(name, title, Case("", "", MAPPED, job, Images.PER_RUN, on_tmpfs=True), EVEN)


def _copies(cache: CacheMode) -> Case:
    job = Job(SMALL_OVERLAY.nbytes, order=Order.ONCE)
    return Case("", "", SMALL_OVERLAY, job, Images.PER_RUN, cache, on_tmpfs=True)


def _slow_path() -> Sweep:
    """Copies that must be stable before their links, where a sync costs nothing."""
    case = _copies(CacheMode.WRITETHROUGH)
    title = "writethrough, a 4 KiB write to each cluster of an overlay, on tmpfs"
    return replace(_along_depth("slow-path", title, case, COPIES), label="requests taken at a time", shows_cost=True)


SWEEPS = (
    _along_depth(
        "depth-read",
        "warm 4 KiB random reads",
        Case("", "", FILLED, Job(GIB, read_percent=100), Images.SHARED),
        {1: 2, 4: 1.3, 32: 2, 128: 1.8},
    ),
    _along_depth("depth-overwrite", "warm 4 KiB random overwrites", Case("", "", FILLED, Job(GIB), Images.PER_SERVER)),
    _along_depth(
        "depth-writethrough",
        "writethrough, fresh lazy image, 4 KiB random writes",
        Case("", "", FRESH, Job(FRESH.nbytes), Images.PER_RUN, CacheMode.WRITETHROUGH),
    ),
    _along_depth(
        "depth-allocate",
        "writeback, fresh lazy image on tmpfs, 4 KiB random writes",
        Case("", "", FRESH, Job(FRESH.nbytes), Images.PER_RUN, on_tmpfs=True),
    ),
    _along_depth(
        "overlay-tmpfs",
        "overlay on tmpfs, writeback, a 4 KiB write to each cluster of the base",
        _copies(CacheMode.WRITEBACK),
        COPIES,
    ),
    _along_queues(),
    _along_size(),
    _along_chain(),
    _each_cluster("depth-discard", "a discard of each cluster, on tmpfs", Kind.DISCARD),
    _each_cluster("depth-zeroes", "write-zeroes of each cluster, which keep it, on tmpfs", Kind.WRITE_ZEROES),
    _slow_path(),
)
