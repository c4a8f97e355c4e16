"""What the extent map does at once against what the engine does: two images, the same requests.

Of one the map answers what it can, of the other the engine all. Whenever the map refuses, nothing has changed; whenever
it does not, both images show, map, count and record the same. Where their clusters lie may differ, and whether zeros
that show anyway have an entry that says so.
"""

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from qcow2.driver.operation import Grace, Operation
from qcow2.judge.check import check
from qcow2.plane.l2cache import Kind
from tests.engine import Bench, noise, set_up
from tests.extents import DISCARD, FRESH, KEEP, UNMAP, UNTOUCHED, Plane

NCLUSTERS = 40
NREQUESTS = 150


@dataclass(frozen=True)
class Shape:
    """An image, and what `set_up` makes it of."""

    bits: int
    options: dict[str, Any]
    has_bitmap: bool

    @property
    def size(self) -> int:
        """Of the disk: its last cluster is a part of one."""
        return (NCLUSTERS << self.bits) - 3 * 512

    def make(self) -> Bench:
        """Such an image, of which one cluster is written."""
        bench = set_up(self.size, cluster_bits=self.bits, **self.options)
        if self.has_bitmap:
            bench.driver.run(bench.image.change_bitmaps(lambda bitmaps: bitmaps.add("kept", 4096, enabled=True)))
        bench.write(0, b"first".ljust(512, b"."))
        return bench


def shape(draw: random.Random) -> Shape:
    """An image of any kind."""
    version = draw.choice([2, 3, 3, 3])
    has_subclusters = version == 3 and draw.random() < 0.3
    bits = 14 if has_subclusters else draw.choice([12, 13])
    base = noise((NCLUSTERS // 2 << bits) + 512, 1) if draw.random() < 0.6 else None
    options = {
        "version": version,
        "lazy": version == 3 and draw.random() < 0.5,
        "base": base,
        "log_capacity": draw.choice([0, 64]) if version == 3 else 0,
        "has_subclusters": has_subclusters,
        "encrypted": draw.random() < 0.2,
    }
    if version == 3 and draw.random() < 0.3:
        options["data"] = b""
    return Shape(bits, options, has_bitmap=version == 3 and draw.random() < 0.5)


def runs(bench: Bench, start: int, end: int) -> list[tuple[int, int]]:
    """What the image maps there, sector by sector: kind, and whether it may be written over.

    Where zeros show through, an entry that says so and none are the same: the two need not choose alike.
    """
    found = []
    for sector in range(start, end, 512):
        run = bench.driver.run(bench.image.resolve(sector, 512))
        kind = run.kind
        if kind == Kind.UNALLOCATED and bench.driver.run(bench.image.reads_as_zeros(sector, 512)):
            kind = Kind.ZERO_PLAIN
        found.append((kind, run.copied if kind == Kind.DATA else 0))
    return found


def state(bench: Bench) -> tuple[bytes, bytes, bytes]:
    """All that outlives the process."""
    data = b"" if bench.data is None else bench.data.content()
    return bench.file.content(), bytes(bench.file.memory.content), data


def ask(draw: random.Random, size: int, cluster_size: int) -> tuple[int, bytes | None, int, int]:
    """Guest offset, data if it is a write, bytes, and else how to clear."""
    step = draw.choice([512, 512, 2048, cluster_size])
    offset = draw.randrange(size // step) * step
    nbytes = min(draw.randint(1, 6) * step, size - offset)
    if draw.random() < 0.7:
        nbytes = min(nbytes, cluster_size - offset % cluster_size)
        return offset, draw.randbytes(nbytes), nbytes, 0
    return offset, None, nbytes, draw.choice([DISCARD, UNMAP, KEEP])


def answer(bench: Bench, offset: int, data: bytes | None, nbytes: int, how: int) -> None:
    """The engine's way."""
    image = bench.image
    if data is not None:
        bench.write(offset, data)
    elif how == DISCARD:
        bench.driver.run(image.discard(offset, nbytes))
    else:
        bench.driver.run(image.write_zeroes(offset, nbytes, unmap=how == UNMAP))


def bits(bench: Bench) -> list[bytes]:
    """What its bitmaps say."""
    stored = bench.driver.run(bench.image.bitmaps())
    return [bench.driver.run(bench.image.bitmap_bits(each)) for each in stored]


def counts(bench: Bench, *, with_copies: bool) -> tuple[int, ...]:
    """What is counted of clusters."""
    told = bench.image.statistics
    return told.clusters_allocated, told.clusters_freed, told.l2_tables, told.copies if with_copies else 0


@pytest.mark.parametrize("seed", range(24))
def test_the_map_does_what_the_engine_would(seed: int) -> None:
    draw = random.Random(seed)
    kind = shape(draw)
    served, plain = kind.make(), kind.make()
    plane = Plane(served.driver, served.image, served.file, served.base, served.data)
    nserved = 0
    for _ in range(NREQUESTS):
        offset, data, nbytes, how = request = ask(draw, kind.size, 1 << kind.bits)
        before = state(served)
        if plane.write(offset, data) if data is not None else plane.clear(offset, nbytes, how):
            nserved += 1
        else:
            assert state(served) == before, "what is refused has changed nothing"
            answer(served, *request)
        answer(plain, *request)
        assert served.read(offset, nbytes) == plain.read(offset, nbytes)
        if not kind.options["has_subclusters"]:  # of a cluster of zeros the engine may have made data as a whole
            assert runs(served, offset, offset + nbytes) == runs(plain, offset, offset + nbytes)
        if draw.random() < 0.05:
            for bench in (served, plain):
                bench.driver.run(bench.image.flush())
    assert bits(served) == bits(plain)
    assert served.content() == plain.content()
    # The engine looks at whole clusters of which the map may see a part, or at what of a data file is untouched.
    are_alike = not kind.options["has_subclusters"] and served.data is None
    if are_alike:
        assert runs(served, 0, kind.size) == runs(plain, 0, kind.size)
    for bench in (served, plain):
        bench.close()
        report = bench.driver.run(check(bench.file))
        assert (report.corruptions, report.leaks) == (0, 0)
    if not kind.options["has_subclusters"]:
        assert counts(served, with_copies=are_alike) == counts(plain, with_copies=are_alike)
    assert nserved


@dataclass
class Flights:
    """Writes to places that are held: they end in any order, at the latest when the engine waits for a grace."""

    draw: random.Random
    plane: Plane
    under_way: list[tuple[Any, int, bytes]] = field(default_factory=list)  # place, guest offset, data
    ended: int = 0

    def begin(self, offset: int, data: bytes) -> bool:
        """False: the map has no place whose name is in a table."""
        if self.plane.translate(offset, len(data), is_write=True).kind != FRESH:
            return False
        place = self.plane.take(offset, len(data))
        if place is None:
            return False
        if place.memory:
            self.plane.conclude(place, UNTOUCHED)
            return False
        self.plane.hold(place)
        self.under_way.append((place, offset, data))
        return True

    def end_one(self) -> None:
        place, _, data = self.under_way.pop(self.draw.randrange(len(self.under_way)))
        assert self.plane.land(place, data)
        self.ended += 1

    def end_all(self) -> None:
        while self.under_way:
            self.end_one()

    def end_those_in(self, start: int, end: int) -> None:
        """What overlaps is over before it is asked for: else the two may end in either order."""
        if any(offset < end and start < offset + len(data) for _, offset, data in self.under_way):
            self.end_all()

    def on_grace(self, operation: Operation) -> None:
        if isinstance(operation, Grace):
            self.end_all()


@pytest.mark.parametrize("seed", range(16))
def test_places_that_are_held_end_as_what_the_engine_would(seed: int) -> None:
    draw = random.Random(seed)
    kind = shape(draw)
    served, plain = kind.make(), kind.make()
    flights = Flights(draw, Plane(served.driver, served.image, served.file, served.base, served.data))
    served.breaker.fault = flights.on_grace
    for _ in range(NREQUESTS):
        offset, data, nbytes, _ = request = ask(draw, kind.size, 1 << kind.bits)
        flights.end_those_in(offset, offset + nbytes)
        if data is None or not flights.begin(offset, data):
            answer(served, *request)
        answer(plain, *request)
        while len(flights.under_way) > draw.randrange(6):
            flights.end_one()
    flights.end_all()
    assert served.content() == plain.content()
    assert bits(served) == bits(plain)
    for bench in (served, plain):
        bench.close()
        report = bench.driver.run(check(bench.file))
        assert (report.corruptions, report.leaks) == (0, 0)
