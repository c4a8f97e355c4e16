"""Growing by enumeration: a death at any moment leaves the old disk or the new one, whole, and what is new is zeros.

The size is judged as one more sector, past those that are watched, so the laws of any other sector hold for it.
"""

from collections.abc import Callable
from itertools import pairwise

import pytest

from qcow2.driver.buffer import MemoryBuffer
from qcow2.engine.growth import Grower
from qcow2.engine.image import Image
from tests.crash.driver import CrashDriver, SimulatedFile
from tests.crash.explorer import Explorer, Run, Violation
from tests.crash.history import SECTOR, History
from tests.crash.images import BITMAPS, KINDS, open_image, start
from tests.crash.judge import opener
from tests.crash.mutant import without_syncs
from tests.crash.workload import Guest, random_steps

KINDS_OF_1K = [name for name, kind in KINDS.items() if kind.cluster_bits <= 10]
WATCHED = 800  # sectors


def size_sector(nsectors: int) -> bytes:
    """What stands for a disk of that many sectors."""
    return (b"%15d\n" % nsectors) * (SECTOR // 16)


class GrowingGuest(Guest):
    """A guest whose disk grows, stable as soon as that is acknowledged; *watched* sectors of it are looked at."""

    def __init__(self, driver: CrashDriver, image: Image, history: History, watched: int) -> None:
        super().__init__(driver, image, history)
        self.watched = watched

    async def grow(self, nsectors: int) -> None:
        (version,) = self.history.begin({self.watched: size_sector(nsectors)}, self._note(("grow", nsectors)))
        await self.image.grow(nsectors * SECTOR)
        version.acked = self._note(("grown", nsectors))

    def work(self, seed: int, steps: int) -> None:
        nsectors = min(self.watched, self.image.size // SECTOR)
        for step in random_steps(seed, nsectors, 1, steps=steps):
            for action in step:
                self.driver.spawn(self.act(action))
            self.driver.finish()


def perform(kind: str, sizes: list[int], seed: int, *, writethrough: bool, steps: int = 2) -> Run:
    """A random workload on the disk, growth, a workload on the longer disk, and so on."""
    begun = start(kind)
    old, watched = (KINDS | BITMAPS)[kind].nsectors, min(WATCHED, sizes[-1])
    file = begun.image.copy()
    initial = file.copy()
    driver = CrashDriver(seed)
    history = History(begun.contents.ljust(watched * SECTOR, b"\0") + size_sector(old), writethrough=writethrough)
    image = driver.run(open_image(file, begun.backing, writethrough=writethrough))
    guest = GrowingGuest(driver, image, history, watched)
    guest.work(seed, steps)
    for smaller, larger in pairwise([old, *sizes]):
        driver.run(guest.grow(larger))
        guest.work(seed + smaller, steps)
    driver.run(guest.image.close())
    assert not guest.failures
    return Run(f"{kind} {sizes} seed={seed} steps={steps}", initial, file, driver.journal, guest.history)


def sized_opener(kind: str, watched: int) -> Callable[[SimulatedFile], bytes]:
    """As `opener`, for the front of the disk, which seems to go on with zeros, and then its size."""

    async def look(image: Image) -> bytes:
        target = bytearray(min(image.size, watched * SECTOR))
        await image.read(0, MemoryBuffer(memoryview(target)))
        return bytes(target).ljust(watched * SECTOR, b"\0") + size_sector(image.size // SECTOR)

    return opener(kind, look)


def explore(
    kind: str, sizes: list[int], *, seed: int, writethrough: bool = True, steps: int = 2, stride: int = 1
) -> int:
    run = perform(kind, sizes, seed, writethrough=writethrough, steps=steps)
    return Explorer(run, sized_opener(kind, min(WATCHED, sizes[-1])), seed).explore(stride=stride)


@pytest.mark.sample(2, of="deaths while a disk grows")
@pytest.mark.parametrize("writethrough", [False, True], ids=["writeback", "writethrough"])
@pytest.mark.parametrize("kind", KINDS_OF_1K)
def test_every_point_of_growing_twice(kind: str, writethrough: bool) -> None:
    assert explore(kind, [300, 700], seed=3, writethrough=writethrough) > 100


@pytest.mark.sample(2, of="deaths while a disk grows")
@pytest.mark.parametrize("kind", KINDS_OF_1K)
def test_every_point_of_growing_a_disk_that_nobody_writes(kind: str) -> None:
    assert explore(kind, [300, 700], seed=0, steps=0) > 20


@pytest.mark.sample(2, of="deaths while a disk grows")
@pytest.mark.parametrize(("kind", "nsectors"), [("width-64", 300_000), ("small", 1_050_000), ("small-lazy", 1_050_000)])
def test_points_of_growing_to_an_l1_table_that_several_refcount_blocks_count(kind: str, nsectors: int) -> None:
    assert explore(kind, [700, nsectors], seed=4, steps=1, stride=3) > 50


@pytest.mark.sample(2, of="deaths while a disk grows")
@pytest.mark.parametrize("kind", ["snapshot", "snapshot-lazy", "v2-backing"])
def test_points_of_growing_on_larger_clusters(kind: str) -> None:
    assert explore(kind, [KINDS[kind].nsectors + 3, 5000], seed=5, stride=5) > 50


@pytest.mark.parametrize("kind", ["small", "longer-backing"])
def test_the_explorer_objects_to_growing_without_barriers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_syncs(monkeypatch, Grower)
    with pytest.raises(Violation):
        explore(kind, [300, 700], seed=3)
