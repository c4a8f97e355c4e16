"""A disk that is mirrored, and then its copy that is served: a death before shows the one, a death after the other."""

from collections.abc import Callable

import pytest

from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.operation import Buffer
from qcow2.engine.create import Options, create
from qcow2.engine.image import Image
from qcow2.job import mirror as mirroring
from qcow2.job.mirror import Mirror
from qcow2.job.pace import Pace
from tests.crash.driver import CrashDriver, SimulatedFile
from tests.crash.explorer import Explorer, Run, Violation
from tests.crash.history import History
from tests.crash.images import KINDS, open_image, read_all, start
from tests.crash.judge import open_state
from tests.crash.workload import Guest, Step, random_steps

SHAPES = {"small": 9, "small-backing": 10, "parts-backing": 9, "compressed": 12}  # and cluster bits of the copy


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small disk has many."""
    monkeypatch.setattr(mirroring, "CHUNK", 4096)
    monkeypatch.setattr(mirroring, "UNIT", 512)
    monkeypatch.setattr(mirroring, "PIECE", 2048)


class Mirrored:
    """What a guest uses while a disk is mirrored: changes go through the mirror, all else is the disk's."""

    def __init__(self, disk: Image, mirror: Mirror) -> None:
        self.write, self.write_zeroes, self.discard = mirror.write, mirror.write_zeroes, mirror.discard
        self.read, self.flush = disk.read, disk.flush


class Move:
    """A disk whose guest goes on while it is copied, and then on the copy."""

    def __init__(self, name: str, seed: int, *, only_top: bool) -> None:
        kind, begun = KINDS[name], start(name)
        self.below = begun.backing
        self.driver = CrashDriver(seed)
        self.file, self.target = begun.image.copy(), SimulatedFile("target", {}, 0)
        backing = ("base.raw", "raw") if only_top else (None, None)
        size = kind.nsectors * 512
        bits = SHAPES[name]
        CrashDriver().run(
            create(self.target, Options(size, 3, bits, backing_name=backing[0], backing_format=backing[1]))
        )
        self.initial = self.file.copy(), self.target.copy()
        self.disk: Image = self.driver.run(open_image(self.file, begun.backing))
        self.copy: Image = self.driver.run(open_image(self.target, begun.backing if only_top else None))
        self.history = History(begun.contents)
        self.guest = Guest(self.driver, self.disk, self.history)
        self.mirror = Mirror(self.disk, self.copy, only_top=only_top, is_new=True)
        self.under = begun.backing if only_top else None
        self.steps = random_steps(seed, kind.nsectors, kind.cluster_sectors, steps=8, depth=3)

    def run(self, flush: Callable[[Mirror], object] = Mirror.flush) -> int:
        """Live through it -> the position at which the path was turned."""
        self._act(self.steps[:2])
        self.guest.image = Mirrored(self.disk, self.mirror)
        self.driver.spawn(self.mirror.catch_up(Pace(), width=3))
        self._act(self.steps[2:6])
        assert self.mirror.is_in_step
        assert self.driver.run(read_all(self.copy)) == self.driver.run(read_all(self.disk))
        self.driver.run(flush(self.mirror))
        self.driver.mark("turned")
        turned = len(self.driver.journal)
        self.guest.image = self.copy
        self._act(self.steps[6:])
        assert not self.guest.failures
        return turned

    def _act(self, steps: list[Step]) -> None:
        for step in steps:
            for action in step:
                self.driver.spawn(self.guest.act(action))
            self.driver.finish()

    def explore(self, seed: int, turned: int) -> int:
        """Judge what deaths leave -> how many states that were."""
        before, after = self.initial
        run = Run("before", before, self.file, self.driver.journal[:turned], self.history)
        states = Explorer(run, lambda file: open_state(file, self.below, read_all), seed).explore(stride=15)
        run = Run("after", after, self.target, self.driver.journal, self.history)
        return states + Explorer(run, lambda file: open_state(file, self.under, read_all), seed).explore(
            since=turned, stride=2
        )


@pytest.mark.sample(2)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "only_top"),
    [
        ("small", False),
        ("small-backing", False),
        ("small-backing", True),
        ("parts-backing", True),
        ("compressed", False),
    ],
)
def test_a_death_shows_the_disk_or_its_copy(name: str, only_top: bool, seed: int) -> None:
    move = Move(name, seed, only_top=only_top)
    turned = move.run()
    assert move.explore(seed, turned) > 100


def test_the_explorer_objects_to_a_path_that_is_turned_before_the_copy_is_stable() -> None:
    async def forget(mirror: Mirror) -> None:
        """Make nothing stable."""

    found = 0
    for seed in (3, 5):
        move = Move("small", seed, only_top=False)
        turned = move.run(forget)
        try:
            move.explore(seed, turned)
        except Violation:
            found += 1
    assert found


def test_the_guest_objects_to_a_write_that_is_answered_before_the_copy_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: what is written after a place was copied goes to the disk alone."""

    async def write(self: Mirror, guest_offset: int, source: Buffer) -> None:
        await move.disk.write(guest_offset, MemoryBuffer(memoryview(source.load())))

    monkeypatch.setattr(Mirror, "write", write)
    move = Move("small", 1, only_top=False)
    with pytest.raises(AssertionError):
        move.run()
