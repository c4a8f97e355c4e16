"""Whatever order the disk's operations land in, each block shows its own last bytes, and the image stays sound.

Requests overlap on purpose: writes, discards and write-zeroes of one block at the same time, over a small disk, so that
what one frees another soon takes. Law 5, and the classes "stale punch" and "long-run reuse" of the incidents.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.task import Task
from qcow2.engine.image import Image
from qcow2.engine.opened import OpenOptions
from tests.builder import Recipe, build
from tests.builder.record import LAZY_REFCOUNTS
from tests.latecomer import Latecomer, MemoryFile
from tests.oracle import assert_clean, assert_same_disk

CLUSTER = 512
NBLOCKS = 40


@dataclass
class Deed:
    """One request, and when it was under way."""

    task: Task
    content: bytes | None  # of its block; None: a discard, which may keep the old
    start: int
    end: int | None = None


class Workshop:
    """An image over late operations, and the history of each block."""

    def __init__(self, directory: Path, seed: int, *, lazy: bool, snapshot: bool) -> None:
        self.rng = random.Random(seed)
        recipe = Recipe(size=NBLOCKS * CLUSTER, cluster_bits=9, compatible=LAZY_REFCOUNTS if lazy else 0)
        recipe.layout = "scattered"
        recipe.seed = seed
        for block in range(0, NBLOCKS, 2):
            recipe.data(block, self.content_of(block))
        for block in range(1, NBLOCKS, 10):
            recipe.compressed(block, b"%d " % block * 100, skip=3)
        if snapshot:
            recipe.snapshot("kept")
        self.path = build(recipe, directory / "a").path
        self.base = recipe.contents()
        self.driver = Latecomer(MemoryFile(self.path.read_bytes()), seed)
        self.image: Image = self.driver.finish(
            self.driver.begin(Image.open(self.driver.file, options=OpenOptions(writable=True)))
        )
        self.history: dict[int, list[Deed]] = {block: [] for block in range(NBLOCKS)}
        self.under_way: list[Deed] = []
        self.serial = 0

    def content_of(self, block: int) -> bytes:
        self.serial = getattr(self, "serial", 0) + 1
        return b"%7d:%7d;" % (block, self.serial) * (CLUSTER // 16)

    def begin(self) -> None:
        block = self.rng.randrange(NBLOCKS)
        start = block * CLUSTER
        content: bytes | None
        match self.rng.randrange(6):
            case 0:
                content, coroutine = None, self.image.discard(start, CLUSTER)
            case 1:
                content = bytes(CLUSTER)
                coroutine = self.image.write_zeroes(start, CLUSTER, unmap=bool(self.rng.randrange(2)))
            case _:
                content = self.content_of(block)
                coroutine = self.image.write(start, MemoryBuffer(memoryview(bytearray(content))))
        deed = Deed(self.driver.begin(coroutine), content, self.driver.now)
        self.history[block].append(deed)
        self.under_way.append(deed)

    def step(self) -> None:
        self.driver.step()
        for deed in [deed for deed in self.under_way if deed.task.done]:
            if deed.task.error is not None:
                raise deed.task.error
            deed.end = self.driver.now
            self.under_way.remove(deed)

    def run(self, count: int, depth: int) -> None:
        for _ in range(count):
            while len(self.under_way) >= depth:
                self.step()
            self.begin()
        while self.under_way:
            self.step()

    def read(self, block: int) -> bytes:
        target = bytearray(CLUSTER)
        self.driver.finish(self.driver.begin(self.image.read(block * CLUSTER, MemoryBuffer(memoryview(target)))))
        return bytes(target)

    def allowed(self, block: int) -> set[bytes]:
        """The contents that no later request has replaced."""
        deeds = self.history[block]
        writes = [deed for deed in deeds if deed.content is not None]
        last = max((deed.start for deed in writes), default=-1)
        alive = {deed.content for deed in writes if deed.end is not None and deed.end >= last}
        if not writes:
            alive.add(self.base[block * CLUSTER : (block + 1) * CLUSTER])
        if any(deed.end is not None and deed.end >= last for deed in deeds if deed.content is None):
            alive.add(bytes(CLUSTER))
        return {content for content in alive if content is not None}


@pytest.mark.parametrize("snapshot", [False, True], ids=["alone", "shared"])
@pytest.mark.parametrize("lazy", [False, True], ids=["accurate", "lazy"])
@pytest.mark.parametrize("seed", range(12))
def test_each_block_shows_its_own_last_bytes(tmp_path: Path, seed: int, lazy: bool, snapshot: bool) -> None:
    workshop = Workshop(tmp_path, seed, lazy=lazy, snapshot=snapshot)
    for _ in range(3):
        workshop.run(60, depth=12)
        for block in range(NBLOCKS):
            assert workshop.read(block) in workshop.allowed(block), f"block {block}"
    seen = b"".join(workshop.read(block) for block in range(NBLOCKS))
    workshop.driver.finish(workshop.driver.begin(workshop.image.close()))
    workshop.path.write_bytes(workshop.driver.file.content)
    assert_clean(workshop.path)
    assert_same_disk(workshop.path, seen)
