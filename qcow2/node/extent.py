"""Where each stretch of the disk comes from, through the whole chain: what `map` shows."""

from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from qcow2.driver.operation import File, Occupied
from qcow2.engine.backing import Backing
from qcow2.plane.l2cache import Kind, Run

MAX_STEP = 1 << 40  # bytes asked for at once


@dataclass(frozen=True, slots=True)
class Extent:
    """A stretch of guest bytes with one origin."""

    guest_offset: int
    nbytes: int
    depth: int  # which file of the chain tells, 0 for the image itself
    file: File
    is_present: bool  # some file of the chain says something about it; else it reads as zeros for want of data
    is_zero: bool  # it reads as zeros, as the mapping or the host says; data may, too
    is_data: bool
    is_compressed: bool
    host_offset: int | None  # in `file`, of data and of what keeps its space without; None if compressed

    def is_continued_by(self, other: "Extent") -> bool:
        """Whether *other*, the next one, has the same origin and goes on where this one ends."""
        host_offset = None if self.host_offset is None else self.host_offset + self.nbytes
        moved = replace(self, guest_offset=other.guest_offset, nbytes=other.nbytes, host_offset=host_offset)
        return other == moved


def merged(extents: Iterable[Extent]) -> Iterator[Extent]:
    """The same stretches in as few as possible."""
    pending: Extent | None = None
    for extent in extents:
        if pending is not None and pending.is_continued_by(extent):
            pending = replace(pending, nbytes=pending.nbytes + extent.nbytes)
        else:
            if pending is not None:
                yield pending
            pending = extent
    if pending is not None:
        yield pending


def extents_of(
    image: Backing, start: int, end: int, run: Callable[[Callable[[], Coroutine[Any, Any, Extent]]], Extent]
) -> Iterator[Extent]:
    """The extents of the disk from *start* to *end*, as long as possible; *run* runs what its argument begins."""

    def pieces() -> Iterator[Extent]:
        offset = start
        while offset < end:
            extent = run(partial(find_extent, image, offset, min(end - offset, MAX_STEP)))
            yield extent
            offset += extent.nbytes

    return merged(pieces())


async def find_extent(image: Backing, guest_offset: int, nbytes: int, depth: int = 0) -> Extent:
    """Describe the start of the range: a stretch of one origin, not always the longest."""
    run = await image.resolve(guest_offset, nbytes)
    backing = image.backing
    if run.kind == Kind.UNALLOCATED and backing is not None and guest_offset < backing.size:
        inside = min(run.nbytes, backing.size - guest_offset)
        return await find_extent(backing, guest_offset, inside, depth + 1)
    extent = _extent_of(run, image, guest_offset, depth)
    if run.kind == Kind.DATA and await image.is_hollow():
        is_data, nbytes = await Occupied(image.data_file, run.host_offset, run.nbytes)
        return replace(extent, nbytes=nbytes, is_zero=not is_data)
    return extent


def _place_of(run: Run) -> int | None:
    """Where in the file it is, or would be."""
    if run.kind in (Kind.DATA, Kind.ZERO_ALLOCATED):
        return run.host_offset
    return run.host_offset or None if run.kind == Kind.UNALLOCATED else None


def _extent_of(run: Run, image: Backing, guest_offset: int, depth: int) -> Extent:
    is_data = run.kind in (Kind.DATA, Kind.COMPRESSED)
    return Extent(
        guest_offset=guest_offset,
        nbytes=run.nbytes,
        depth=depth,
        file=image.data_file,
        is_present=run.kind != Kind.UNALLOCATED,
        is_zero=not is_data,
        is_data=is_data,
        is_compressed=run.kind == Kind.COMPRESSED,
        host_offset=_place_of(run),
    )
