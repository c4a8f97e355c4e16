"""External data files by enumeration: whatever a death leaves of the two files, each sector is allowed."""

import errno
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.operation import Operation, Sync, Write, Zero
from qcow2.engine.create import Options, create
from qcow2.engine.links import Links
from qcow2.engine.mapping import Mapping
from qcow2.engine.part import Part
from qcow2.engine.plain import Preallocation
from qcow2.engine.shedding import Shedder
from qcow2.engine.write import Writer
from qcow2.error import NotTried
from qcow2.format.header import read_header
from qcow2.judge.check import check
from tests.crash.driver import CrashDriver, Effect, Point, SimulatedFile, points
from tests.crash.history import SECTOR, ZEROS, Flush, History, pattern
from tests.crash.images import open_image, read_all
from tests.engine import ENCRYPTION, KEYS, Breaker, noise
from tests.extents import Plane, Served

NCLUSTERS = 5
ZERO_ENTRY = (1).to_bytes(8, "big")
ZERO_PARTS = (0xFFFFFFFF << 32).to_bytes(16, "big")


@dataclass(frozen=True)
class Sort:
    """An image whose data is in a file of its own."""

    is_raw: bool = False
    has_parts: bool = False  # subclusters
    encrypted: bool = False
    is_over: bool = False  # a backing file, which ends in the last cluster but one

    @property
    def cluster(self) -> int:
        return 1 << (14 if self.has_parts else 11)

    @property
    def size(self) -> int:
        return NCLUSTERS * self.cluster - SECTOR

    @property
    def options(self) -> Options:
        return Options(
            size=self.size,
            cluster_bits=self.cluster.bit_length() - 1,
            has_subclusters=self.has_parts,
            preallocation=Preallocation.METADATA if self.is_raw else Preallocation.OFF,
            backing_name="base" if self.is_over else None,
            backing_format="raw" if self.is_over else None,
            encryption=ENCRYPTION if self.encrypted else None,
            data_file_name="data",
            data_file_raw=self.is_raw,
        )

    def __str__(self) -> str:
        said = {"parts": self.has_parts, "encrypted": self.encrypted, "over a base": self.is_over}
        return ", ".join(["raw" if self.is_raw else "entries tell", *(name for name in said if said[name])])

    @property
    def base(self) -> SimulatedFile | None:
        """What shows where the image has nothing."""
        if not self.is_over:
            return None
        base = SimulatedFile.parse("base", noise((NCLUSTERS - 1) * self.cluster - SECTOR, 7))
        base.writable = False
        return base


RAW, TOLD = Sort(is_raw=True), Sort()
SORTS_APART = [Sort(*each) for each in itertools.product((False, True), repeat=4) if not (each[0] and each[3])]


def image_files(sort: Sort) -> tuple[SimulatedFile, SimulatedFile]:
    """An image and its data file, which holds something; of a raw one an entry says zeros, as QEMU may.

    If it is not raw its third cluster is a hole, and it ends in the fourth.
    """
    file, driver = SimulatedFile("disk", {}, 0), CrashDriver()
    driver.run(create(file, sort.options))
    size = sort.cluster
    data = SimulatedFile.parse("data", noise(sort.size, 5))
    if sort.is_raw:
        if not sort.encrypted:  # zeros of QEMU's are none there
            table = int.from_bytes(file.read(int.from_bytes(file.read(40, 8), "big"), 8), "big") & (1 << 56) - 1
            file.write(*((table + 16, ZERO_PARTS) if sort.has_parts else (table + 8, ZERO_ENTRY)))
            data.zero(size, size)
        if sort.has_parts and not sort.encrypted:  # so QEMU makes all of them
            file.write(table + 40, bytes(8))
            data.zero(2 * size, size)
        return file, data
    data.zero(2 * size, size)
    data.resize(3 * size + SECTOR)
    image = driver.run(open_image(file, sort.base, data=data))
    driver.run(image.write(0, MemoryBuffer(memoryview(bytearray(noise(2 * size, 6))))))
    driver.run(image.write_zeroes(size, size, unmap=False))
    driver.run(image.close())
    return file, data


def shown(sort: Sort, file: SimulatedFile, data: SimulatedFile) -> bytes:
    """What the next daemon finds, which opens *file* and *data* for writing."""
    driver = CrashDriver()
    return bytes(driver.run(read_all(driver.run(open_image(file, sort.base, data=data)))))


def held(sort: Sort, file: SimulatedFile, data: SimulatedFile, size: int) -> bytes:
    """The data file as a raw disk, deciphered if need be."""
    content = bytearray(data.read(0, size))
    if sort.encrypted:
        driver = CrashDriver()
        header = driver.run(read_header(file))
        driver.run(KEYS.cipher(file, *header.luks_area)).decrypt(0, content)
    return bytes(content)


class Run:
    """Requests side by side, and what they promised."""

    def __init__(self, seed: int, sort: Sort) -> None:
        self.sort = sort
        self.file, self.data = image_files(sort)
        self.initial = self.file.copy(), self.data.copy()
        self.history = History(shown(sort, self.file.copy(), self.data.copy()))
        self.driver = CrashDriver(seed)
        self._draw = random.Random(seed)
        base = sort.base
        image = self.driver.run(open_image(self.file, base, data=self.data))
        self._image = Served(image, Plane(self.driver, image, self.file, base, self.data))
        for worker in range(3):
            self.driver.spawn(self._requests(worker), lambda task: None)
        self.driver.finish()

    async def _requests(self, worker: int) -> None:
        for number in range(10):
            await self._request(worker * 100 + number)

    async def _request(self, number: int) -> None:
        draw, journal = self._draw, self.driver.journal
        nsectors = self.sort.size // SECTOR
        first = draw.randrange(nsectors)
        sectors = range(first, min(first + draw.choice([1, 2, 4, 8]), nsectors))
        offset, nbytes = first * SECTOR, len(sectors) * SECTOR
        self.driver.mark(number)  # no two requests begin at one position
        kind = draw.choice(["write", "write", "zeros", "unmap", "discard", "flush"])
        if kind == "flush":
            flush = Flush(len(journal))
            self.history.flushes.append(flush)
            await self._image.flush()
            flush.acked = len(journal)
            return
        contents = {sector: pattern(number, sector) if kind == "write" else ZEROS for sector in sectors}
        versions = self.history.begin(contents, len(journal), binding=kind != "discard")
        if kind == "write":
            await self._image.write(offset, MemoryBuffer(memoryview(bytearray(b"".join(contents.values())))))
        elif kind == "discard":
            await self._image.discard(offset, nbytes)
        else:
            await self._image.write_zeroes(offset, nbytes, unmap=kind == "unmap")
        for version in versions:
            version.acked = len(journal)

    def deaths(self, seed: int) -> Iterator[tuple[int, bool, SimulatedFile, SimulatedFile]]:
        return deaths(self.driver, self.initial, (self.file, self.data), seed)


Pair = tuple[SimulatedFile, SimulatedFile]


def deaths(
    driver: CrashDriver, initial: Pair, files: Pair, seed: int
) -> Iterator[tuple[int, bool, SimulatedFile, SimulatedFile]]:
    """Position, whether power was lost, and the two files, at each moment."""
    draw = random.Random(seed)
    for position, (one, other) in together(driver, initial, files):
        yield position, False, one.after_kill(), other.after_kill()
        yield position, True, one.keep(()), other.keep(())
        for _ in range(6):
            yield position, True, one.keep(some(one, draw)), other.keep(some(other, draw))


def together(driver: CrashDriver, initial: Pair, files: Pair) -> Iterator[tuple[int, tuple[Point, Point]]]:
    """Each moment at which one of the files has changed, with both."""
    ways = [points(driver.journal, start, file) for start, file in zip(initial, files, strict=True)]
    now = [Point(0, start, [], start.memory, 0) for start in initial]
    ahead = [next(way, None) for way in ways]
    while True:
        positions = [point.position if point is not None else None for point in ahead]
        known = [position for position in positions if position is not None]
        if not known:
            return
        position = min(known)
        for index, point in enumerate(ahead):
            if point is not None and point.position == position:
                now[index] = Point(position, point.stable.copy(), list(point.pending), point.memory, point.stores)
                ahead[index] = next(ways[index], None)
        yield position, (now[0], now[1])


def some(point: Point, draw: random.Random) -> list[Effect]:
    return [torn for _, effect in point.pending for torn in effect.tear() if draw.random() < 0.5]


def violations(seed: int, sort: Sort) -> tuple[int, list[str]]:
    """How many states were judged, and what is wrong with them."""
    run = Run(seed, sort)
    wrong, count = [], 0
    for position, power, file, data in run.deaths(seed):
        count += 1
        content = shown(sort, file.after_kill(), data.copy())
        allowed = run.history.allowed_everywhere(position, power=power)
        for sector in range(sort.size // SECTOR):
            found = content[sector * SECTOR : (sector + 1) * SECTOR]
            if found not in allowed.get(sector, {run.history.before(sector)}):
                wrong.append(f"{position}: sector {sector} is {found[:16]!r}")
        if sort.is_raw and held(sort, file, data, sort.size) != content:
            wrong.append(f"{position}: the data file is another disk")
        report = CrashDriver().run(check(file.copy()))
        if report.corruptions or report.check_errors:
            wrong.append(f"{position}: corrupt")
    return count, wrong


@pytest.mark.sample(2)
@pytest.mark.parametrize("sort", SORTS_APART, ids=str)
@pytest.mark.parametrize("seed", [0, 6])
def test_every_sector_is_allowed_after_every_death(seed: int, sort: Sort) -> None:
    count, wrong = violations(seed, sort)
    assert count > 100
    assert wrong == []


def wrong_after_resizing(sort: Sort, seed: int, *clusters: int) -> list[str]:
    """What is wrong with a disk that gets those lengths, but for a sector, one after the other, and dies."""
    files, driver = image_files(sort), CrashDriver(seed)
    initial = files[0].copy(), files[1].copy()
    disk = shown(sort, *(file.copy() for file in files))
    image = driver.run(open_image(files[0], sort.base, data=files[1]))
    stages = [(0, {disk})]
    for nclusters in clusters:
        size = nclusters * sort.cluster - SECTOR
        changed = disk[:size].ljust(size, b"\0")
        stages.append((len(driver.journal), {disk, changed}))
        driver.run(image.shrink(size) if size < image.size else image.grow(size))
        stages.append((len(driver.journal), {changed}))
        disk = changed
    wrong = []
    for position, power, file, data in deaths(driver, initial, files, seed):
        allowed = next(disks for begun, disks in reversed(stages) if begun < position or not begun)
        content = shown(sort, file.after_kill(), data.copy())
        where = f"{position} {'power' if power else 'kill'}: {len(content)}"
        if content not in allowed:
            wrong.append(f"{where}: neither the old disk nor the new one")
        if sort.is_raw and held(sort, file, data, len(content)) != content:
            wrong.append(f"{where}: the data file is another disk")
        report = CrashDriver().run(check(file.copy()))
        if report.corruptions or report.check_errors:
            wrong.append(f"{where}: corrupt")
    return wrong


@pytest.mark.sample(2)
@pytest.mark.parametrize("sort", SORTS_APART, ids=str)
def test_a_death_while_the_disk_is_resized_leaves_the_old_one_or_the_new_one(sort: Sort) -> None:
    assert wrong_after_resizing(sort, 1, 3, 7, 2, 6) == []


def test_the_explorer_objects_to_a_data_file_that_is_cut_before_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    async def shrink(self: Shedder, nbytes: int) -> None:
        await self._cut_data_file(nbytes)
        await self._stability.sync()
        await self._root.set_size(nbytes)

    monkeypatch.setattr(Shedder, "shrink", shrink)
    assert wrong_after_resizing(TOLD, 1, 1)


@pytest.mark.parametrize("goes_on", [True, False], ids=["goes on", "fails for good"])
@pytest.mark.parametrize("has_parts", [False, True])
def test_an_entry_whose_sync_was_not_tried_is_as_it_was(has_parts: bool, goes_on: bool) -> None:
    """In memory and in the file, and nobody waits for it; unless that one cannot be written any more."""
    sort = Sort(is_raw=True, has_parts=has_parts)
    file, data = image_files(sort)
    breaker = Breaker()
    driver = CrashDriver(fault=breaker)
    image = driver.run(open_image(file, None, data=data))
    driver.run(image.write(0, MemoryBuffer(memoryview(b"w" * SECTOR))))
    content, old, nwritten = driver.run(read_all(image)), file.copy(), 0

    def fault(operation: Operation) -> OSError | None:
        nonlocal nwritten
        if getattr(operation, "file", None) is not file:
            return None
        nwritten += isinstance(operation, Write)
        is_late = (isinstance(operation, Sync) and nwritten == 1) or (nwritten == 2 and not goes_on)
        return NotTried(errno.ECANCELED, "as told") if is_late else None

    breaker.fault = fault
    with pytest.raises(NotTried):
        driver.run(image.write(sort.cluster + SECTOR, MemoryBuffer(memoryview(b"x" * SECTOR))))
    breaker.fault = None
    assert not image.has_waiting_links
    assert driver.run(read_all(image)) == content
    if goes_on:
        assert file.content() == old.content()
        driver.run(image.write(sort.cluster, MemoryBuffer(memoryview(b"y" * SECTOR))))
        driver.run(image.flush())
        assert not image.has_waiting_links
        assert shown(sort, file, data)[sort.cluster :][:SECTOR] == b"y" * SECTOR
        driver.run(image.close())
    else:
        with pytest.raises(OSError, match="no more writes"):
            driver.run(image.flush())


def test_the_explorer_objects_to_entries_before_the_data_is_stable(monkeypatch: pytest.MonkeyPatch) -> None:
    async def link(self: Writer, run: object, first: int, nclusters: int, host_offset: int) -> None:
        await self._mapping.link(first * TOLD.cluster, self._mapping.entries.data(host_offset, nclusters))

    monkeypatch.setattr(Writer, "_link_over", link)
    assert any(violations(seed, TOLD)[1] for seed in range(4))


def test_the_explorer_objects_to_parts_before_the_data_is_stable(monkeypatch: pytest.MonkeyPatch) -> None:
    async def link(self: Links, guest_offset: int, old: object, entries: list[int], freed: object) -> None:
        await self._mapping.link(guest_offset, entries)

    monkeypatch.setattr(Links, "link", link)
    assert any(violations(seed, Sort(has_parts=True))[1] for seed in range(4))


def test_the_explorer_objects_to_holes_of_encrypted_data_that_an_entry_may_lead_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def give_back(self: Part, guest_offset: int, end: int) -> None:
        await Zero(self._data.file, guest_offset, end - guest_offset)

    monkeypatch.setattr(Part, "_give_back", give_back)
    assert any(violations(seed, Sort(encrypted=True))[1] for seed in range(8))


def test_the_explorer_objects_to_writes_in_place_before_the_entry_is_stable(monkeypatch: pytest.MonkeyPatch) -> None:
    async def link(self: Mapping, guest_offset: int, old_entries: list[int], entries: list[int]) -> None:
        await self._stability.sync()
        await self.link(guest_offset, entries)
        await self._stability.sync()

    monkeypatch.setattr(Mapping, "link_stable", link)
    assert any(violations(seed, RAW)[1] for seed in (69, 79))  # two writers meet in a cluster
