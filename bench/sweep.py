"""Series of cases along one axis: queue depth, queues, image size."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from bench.case import FILLED, FRESH, GIB, TIB, Case, Images
from bench.load import Job
from bench.recipe import Recipe
from vhost.option import CacheMode

DEPTHS = (1, 2, 4, 8, 16, 32, 64, 128)
QUEUES = (1, 2, 3, 4)
SIZES = {"1G": GIB, "16G": 16 * GIB, "128G": 128 * GIB, "1T": TIB, "4T": 4 * TIB}


@dataclass(frozen=True, slots=True)
class Sweep:
    """Cases that differ in one number, which the plot shows on the axis *label*."""

    name: str
    title: str
    label: str
    points: tuple[tuple[float, Case], ...]


def _along_depth(name: str, title: str, case: Case) -> Sweep:
    points = (
        (
            depth,
            replace(case, name=f"{name}-{depth}", title=f"{title}, depth {depth}", job=replace(case.job, depth=depth)),
        )
        for depth in DEPTHS
    )
    return Sweep(name, title, "requests in flight", tuple(points))


def _along_queues() -> Sweep:
    def points() -> Iterator[tuple[float, Case]]:
        for queues in QUEUES:
            job = Job(GIB, read_percent=100, depth=32, queues=queues)
            yield (
                queues,
                Case(f"queues-{queues}", f"warm reads, {queues} queues of depth 32", FILLED, job, Images.SHARED),
            )

    return Sweep("queues", "warm 4 KiB random reads, depth 32 on each queue", "queues", tuple(points()))


def _along_size() -> Sweep:
    def points() -> Iterator[tuple[float, Case]]:
        for name, nbytes in SIZES.items():
            recipe = Recipe(nbytes, "compat=1.1,preallocation=metadata", name=f"{name}, all mapped")
            job = Job(nbytes, read_percent=100, depth=32)
            yield nbytes / GIB, Case(f"size-{name}", f"{name} image, 4 KiB random reads", recipe, job, Images.SHARED)

    return Sweep("size", "4 KiB random reads of a mapped, sparse image, depth 32", "image size, GiB", tuple(points()))


SWEEPS = (
    _along_depth(
        "depth-read", "warm 4 KiB random reads", Case("", "", FILLED, Job(GIB, read_percent=100), Images.SHARED)
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
    _along_queues(),
    _along_size(),
)
