"""Internal snapshots by enumeration: a death at any moment leaves the old disk and snapshots, or the new ones, whole.

What the snapshots hold is judged as more sectors, past those of the disk: each name has as many as the disk.
"""

import re
from collections.abc import Callable

import pytest

from qcow2.engine.image import Image
from qcow2.engine.opened import OpenOptions
from qcow2.engine.snapshots import Snapshots
from qcow2.error import ImageError
from qcow2.judge.check import judge
from qcow2.judge.repair import RepairMode, repair
from qcow2.judge.report import Report
from tests.crash.driver import CrashDriver, SimulatedFile
from tests.crash.explorer import Run, Violation
from tests.crash.history import SECTOR, History
from tests.crash.images import KINDS, check_image, open_image, read_all, start
from tests.crash.mutant import without_syncs
from tests.crash.recovering import RecoveringExplorer
from tests.crash.workload import Guest, random_steps

NAMES = ("kept", "one", "two")
ABSENT = b"no such snapshot" * (SECTOR // 16)
STORIES = {
    "create": ["create one"],
    "create and delete": ["create one", "delete one"],
    "create twice, go back": ["create one", "create two", "apply one", "delete two"],
    "delete the first": ["create one", "create two", "delete one", "apply two"],
}


async def snapshots_of(image: Image, file: SimulatedFile, nsectors: int) -> bytes:
    """What each of NAMES holds."""
    found = b""
    there = {each.name for each in await image.snapshots()}
    for name in NAMES:
        if name in there:
            past = await Image.open(file, backing=image.backing, options=OpenOptions(snapshot=name))
            found += await read_all(past)
        else:
            found += ABSENT * nsectors
    return found


class RememberingGuest(Guest):
    """A guest whose disk has snapshots; each change of them is stable as soon as it is acknowledged."""

    def __init__(self, driver: CrashDriver, image: Image, history: History, file: SimulatedFile) -> None:
        super().__init__(driver, image, history)
        self.file = file
        self.nsectors = image.size // SECTOR

    async def change(self, what: str) -> None:
        verb, name = what.split()
        disk = await read_all(self.image)
        begun = self._note(what)
        versions = self.history.begin(await self._after(verb, name, disk), begun)
        if verb == "create":
            await self.image.create_snapshot(name, 0)
        elif verb == "apply":
            await self.image.apply_snapshot(name)
        else:
            await self.image.delete_snapshot(name)
        for version in versions:
            version.acked, version.is_stable = self._note(what), True

    async def _after(self, verb: str, name: str, disk: bytes) -> dict[int, bytes]:
        """The sectors that will be different."""
        first = self.nsectors * (1 + NAMES.index(name))
        if verb == "apply":
            content, first = await self._content(name), 0
        else:
            content = disk if verb == "create" else ABSENT * self.nsectors
        return {first + sector: content[sector * SECTOR : (sector + 1) * SECTOR] for sector in range(self.nsectors)}

    async def _content(self, name: str) -> bytes:
        past = await Image.open(self.file, backing=self.image.backing, options=OpenOptions(snapshot=name))
        return await read_all(past)

    def work(self, seed: int, steps: int) -> None:
        for step in random_steps(seed, self.nsectors, 1, steps=steps):
            for action in step:
                self.driver.spawn(self.act(action))
            self.driver.finish()


def perform(kind: str, story: list[str], seed: int, *, steps: int) -> Run:
    """A random workload before and after each change."""
    begun = start(kind)
    file = begun.image.copy()
    initial = file.copy()
    driver = CrashDriver(seed)
    image = driver.run(open_image(file, begun.backing, writethrough=True))
    nsectors = image.size // SECTOR
    history = History(begun.contents + driver.run(snapshots_of(image, file, nsectors)), writethrough=True)
    guest = RememberingGuest(driver, image, history, file)
    guest.work(seed, steps)
    for number, what in enumerate(story):
        driver.run(guest.change(what))
        guest.work(seed + 1 + number, steps)
    driver.run(guest.image.close())
    assert not guest.failures
    return Run(f"{kind} {story} seed={seed} steps={steps}", initial, file, driver.journal, history)


COPIED = re.compile(r"OFLAG_COPIED .*_entry=[89a-f][0-9a-f]{15}\b")  # the flag is set


async def require_sound_flags(file: SimulatedFile) -> None:
    """Raises: Violation if a COPIED flag is set where the counts, before any repair, say that others refer, too."""
    said: list[str] = []
    await judge(file, Report(said.append))
    if wrong := [line for line in said if COPIED.search(line)]:
        raise Violation(f"before a repair: {wrong}")


def remembering_opener(kind: str) -> Callable[[SimulatedFile], bytes]:
    """As the daemon opens it, but version 2, which has no dirty bit, is repaired first."""
    begun = start(kind)

    def open_state(file: SimulatedFile) -> bytes:
        try:
            return look(file)
        except (ImageError, OSError, ValueError, LookupError, ArithmeticError) as error:
            raise Violation(f"{type(error).__name__}: {error}") from error

    def look(file: SimulatedFile) -> bytes:
        driver = CrashDriver()
        if not KINDS[kind].lazy:
            driver.run(require_sound_flags(file))
        if KINDS[kind].version < 3:
            driver.run(repair(file, RepairMode.LEAKS))
        image = driver.run(open_image(file, begun.backing))
        driver.run(check_image(file))
        seen = driver.run(read_all(image)) + driver.run(snapshots_of(image, file, image.size // SECTOR))
        driver.run(image.close())
        driver.run(check_image(file))
        return bytes(seen)

    return open_state


def explore(kind: str, story: str, *, seed: int, steps: int = 1, stride: int = 1) -> int:
    run = perform(kind, STORIES[story], seed, steps=steps)
    return RecoveringExplorer(run, remembering_opener(kind), seed).explore(stride=stride)


@pytest.mark.sample(3)
@pytest.mark.parametrize("story", STORIES)
@pytest.mark.parametrize("kind", ["small", "small-lazy", "width-64"])
def test_every_point_on_small_clusters(kind: str, story: str) -> None:
    assert explore(kind, story, seed=3, stride=7) > 50


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", ["v2", "v2-backing", "compressed", "compressed-lazy", "snapshot", "snapshot-lazy"])
def test_points_on_larger_clusters(kind: str) -> None:
    assert explore(kind, "create twice, go back", seed=5, stride=29) > 20


@pytest.mark.parametrize("kind", ["small", "small-lazy"])
def test_the_explorer_objects_to_snapshots_without_barriers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_syncs(monkeypatch, Snapshots)
    with pytest.raises(Violation):
        explore(kind, "create twice, go back", seed=3, stride=1 if KINDS[kind].lazy else 3)
