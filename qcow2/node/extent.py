"""Where each stretch of the disk comes from, through the whole chain: what `map` shows."""

from collections.abc import Callable, Coroutine, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

from qcow2.driver.operation import File, Occupied
from qcow2.engine.backing import Backing
from qcow2.plane.l2cache import Kind, Run

MAX_STEP = 1 << 40  # bytes asked for at once
BATCH = 256  # stretches found in one go
UNALLOCATED, ZERO_ALLOCATED, DATA, COMPRESSED = (
    int(kind) for kind in (Kind.UNALLOCATED, Kind.ZERO_ALLOCATED, Kind.DATA, Kind.COMPRESSED)
)


class Extent(NamedTuple):
    """A stretch of guest bytes with one origin."""

    guest_offset: int
    nbytes: int
    depth: int  # which file of the chain tells, 0 for the image itself
    file: File
    is_present: bool  # some file of the chain says something about it; else it reads as zeros for want of data
    is_zero: bool  # it reads as zeros, as the mapping or the host says; data may, too
    is_data: bool
    is_compressed: bool
    host_offset: int | None  # in `file`, of data and of what keeps its space without; None if it is not there as it is

    def is_continued_by(self, other: "Extent") -> bool:
        """Whether *other*, the next one, has the same origin and goes on where this one ends."""
        host_offset = None if self.host_offset is None else self.host_offset + self.nbytes
        return other.host_offset == host_offset and other[2:8] == self[2:8]


def merged(extents: Iterable[Extent]) -> Iterator[Extent]:
    """The same stretches in as few as possible."""
    pending: Extent | None = None
    for extent in extents:
        if pending is not None and pending.is_continued_by(extent):
            pending = pending._replace(nbytes=pending.nbytes + extent.nbytes)
        else:
            if pending is not None:
                yield pending
            pending = extent
    if pending is not None:
        yield pending


Found = Coroutine[Any, Any, list[Extent]]


def extents_of(
    image: Backing, start: int, end: int, run: Callable[[Callable[[], Found]], list[Extent]]
) -> Iterator[Extent]:
    """The extents of the disk from *start* to *end*, as long as possible; *run* runs what its argument begins.

    They are looked for a batch at a time, as the iteration goes on.
    """

    def pieces() -> Iterator[Extent]:
        offset = start
        while offset < end:
            found = run(partial(_batch, image, offset, end))
            if not found:
                return
            yield from found
            offset = found[-1].guest_offset + found[-1].nbytes

    return merged(pieces())


async def _batch(image: Backing, guest_offset: int, end: int) -> list[Extent]:
    """The next ones from *guest_offset* on; none past the end of the disk, which may have got shorter."""
    found: list[Extent] = []
    end = min(end, image.size)
    while guest_offset < end and len(found) < BATCH:
        extent = await find_extent(image, guest_offset, min(end - guest_offset, MAX_STEP))
        found.append(extent)
        guest_offset += extent.nbytes
    return found


async def find_extent(image: Backing, guest_offset: int, nbytes: int, depth: int = 0) -> Extent:
    """Describe the start of the range: a stretch of one origin, not always the longest."""
    run = await image.resolve(guest_offset, nbytes)
    if run.kind == UNALLOCATED:
        backing = image.backing
        if backing is not None and guest_offset < backing.size:
            inside = min(run.nbytes, backing.size - guest_offset)
            return await find_extent(backing, guest_offset, inside, depth + 1)
    extent = _extent_of(run, image, guest_offset, depth)
    if run.kind == DATA and await image.is_hollow():
        is_data, nbytes = await Occupied(image.data_file, run.host_offset, run.nbytes)
        return extent._replace(nbytes=nbytes, is_zero=not is_data)
    return extent


def _place_of(run: Run) -> int | None:
    """Where in the file it is, or would be."""
    if run.kind in (DATA, ZERO_ALLOCATED):
        return run.host_offset
    return run.host_offset or None if run.kind == UNALLOCATED else None


def _extent_of(run: Run, image: Backing, guest_offset: int, depth: int) -> Extent:
    kind = run.kind
    is_data = kind in (DATA, COMPRESSED)
    return Extent(
        guest_offset,
        run.nbytes,
        depth,
        image.data_file,
        kind != UNALLOCATED,
        not is_data,
        is_data,
        kind == COMPRESSED,
        None if image.is_encrypted else _place_of(run),
    )
