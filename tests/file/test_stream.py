"""`qcow2.stream`: the image shows the same over less of its chain, whatever is written meanwhile, wherever it ends."""

import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import qcow2
from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.file import HostFile
from qcow2.driver.operation import Spawn
from qcow2.engine.create import Options, create
from qcow2.engine.fetching import Fetcher
from qcow2.engine.image import Image
from qcow2.engine.opened import OpenOptions
from qcow2.engine.stability import Stability
from qcow2.job.crew import Windows
from qcow2.job.pace import Pace
from qcow2.job.stream import stream
from qcow2.judge.check import check
from qcow2.judge.repair import repair
from qcow2.library.hostfile import require_way
from qcow2.node.raw import RawImage
from tests.crash.driver import CrashDriver, SimulatedFile
from tests.crash.moments import states
from tests.engine import noise
from tests.file.test_rebase import format_of
from tests.file.test_rebase import image as random_image
from tests.oracle import assert_clean, qemu_img, qemu_io, qemu_read

MIB = 1 << 20


@pytest.mark.parametrize("seed", range(8))
def test_any_chain_shows_the_same_over_any_of_its_images(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    sizes = [draw.choice((512, MIB + 512, 3 * MIB, 4 * MIB)) for _ in range(4)]
    chain = [random_image(draw, tmp_path / "0", None, sizes[0])]
    for depth in (1, 2, 3):
        chain.append(random_image(draw, tmp_path / str(depth), chain[-1], sizes[depth]))
    top, base = chain[-1], draw.choice([None, *chain[:-1]])
    before = qemu_read(top)
    qcow2.stream(top, base)
    assert qemu_read(top) == before
    assert_clean(top)
    info = json.loads(qemu_img("info", "--output=json", top).stdout)
    assert info.get("full-backing-filename") == (None if base is None else str(base))
    assert info.get("backing-filename-format") == (None if base is None else format_of(base))
    for path in chain[:-1]:
        if path != base:
            path.unlink()
    if base is None:
        assert qemu_read(top) == before


def test_names_are_told_from_the_top_image(tmp_path: Path) -> None:
    for directory in ("a", "a/b"):
        (tmp_path / directory).mkdir()
    for path, under in (("a/b/base", None), ("a/middle", "b/base"), ("top", "a/middle")):
        qcow2.create(tmp_path / path, size=MIB, **({} if under is None else {"backing": under}))  # type: ignore[arg-type]
    qcow2.stream(tmp_path / "top", tmp_path / "a/b/base")
    with qcow2.open(tmp_path / "top") as disk:
        assert disk.info["backing-filename"] == "a/b/base"


def as_json(path: Path) -> str:
    return f"json:{json.dumps({'driver': 'qcow2', 'file.filename': str(path)})}"


def as_file(path: Path) -> str:
    return f"file:{path}"


def as_local(path: Path) -> str:
    return f"file:{os.path.relpath(path)}"  # starts where the process does


@pytest.mark.parametrize("name", [as_json, as_file, as_local, str])
@pytest.mark.parametrize("where", ["middle", "base"])
def test_names_that_do_not_start_at_the_image_lead_to_the_base(
    tmp_path: Path, where: str, name: Callable[[Path], str]
) -> None:
    base, middle, top = tmp_path / "sub/base", tmp_path / "sub/middle", tmp_path / "top"
    base.parent.mkdir()
    qcow2.create(base, size=MIB)
    qemu_io(base, "write -P 1 0 1M")
    names = (name(middle), "base") if where == "middle" else ("sub/middle", name(base))
    qcow2.create(middle, size=MIB, backing=base, backing_format="qcow2")
    qcow2.create(top, size=MIB, backing=middle, backing_format="qcow2")
    qemu_io(middle, "write -P 2 64k 64k")
    for image, under in ((middle, names[1]), (top, names[0])):
        qemu_img("rebase", "-u", "-b", under, "-F", "qcow2", image)
    before = qemu_read(top)
    qcow2.stream(top, base)
    middle.unlink()
    assert qemu_read(top) == before
    with qcow2.open(top) as disk:
        assert disk.read(0, MIB) == before


def test_a_base_that_its_name_leads_to_no_more_is_refused(tmp_path: Path) -> None:
    base, top = tmp_path / "base", HostFile(str(tmp_path / "top"), -1, writable=False)
    qcow2.create(base, size=MIB)
    with HostFile.open(str(base)) as file:
        require_way(top, "base", file)
        base.rename(tmp_path / "moved")
        with pytest.raises(qcow2.ImageError, match=r"the backing file name 'base' would not lead to \S+/base"):
            require_way(top, "base", file)


def test_snapshots_that_show_through_are_refused(tmp_path: Path) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    qcow2.create(base, size=MIB)
    qcow2.create(top, size=MIB, backing=base)
    with qcow2.open(top, "r+") as disk:
        disk.create_snapshot("one")
    before = top.read_bytes()
    with pytest.raises(qcow2.UnsupportedImage, match="1 internal snapshots would show another disk"):
        qcow2.stream(top)
    assert top.read_bytes() == before


def test_bitmaps_know_no_change(tmp_path: Path) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    qcow2.create(base, size=MIB)
    qemu_io(base, "write -P 1 0 1M")
    qcow2.create(top, size=MIB, backing=base)
    with qcow2.open(top, "r+") as disk:
        disk.bitmaps.add("b")
    qcow2.stream(top)
    with qcow2.open(top) as disk:
        assert list(disk.bitmaps.dirty("b")) == []
    assert qemu_read(top) == b"\1" * MIB


SIZE = 64 << 9
KINDS = {
    "plain": Options(size=SIZE, cluster_bits=10),
    "lazy": Options(size=SIZE, cluster_bits=10, lazy_refcounts=True),
    "version 2": Options(size=SIZE, cluster_bits=9, version=2),
    "subclusters": Options(size=1 << 17, cluster_bits=14, has_subclusters=True),
}


class World:
    """A raw file under a shorter image under the one that is streamed, on a simulated host."""

    def __init__(self, kind: str) -> None:
        options = KINDS[kind]
        self.size = options.size
        self.base = SimulatedFile.parse("base", noise(options.size, 1))
        self.middle, self.top = SimulatedFile("middle", {}, 0), SimulatedFile("top", {}, 0)
        driver = CrashDriver(1)
        between = Options(size=options.size * 3 // 4, cluster_bits=9, backing_name="base", backing_format="raw")
        driver.run(create(self.middle, between))
        driver.run(create(self.top, replace(options, backing_name="middle", backing_format="qcow2")))
        _, middle, top = self.open(driver, middle_is_top=True)
        draw = random.Random(3)
        for image in (middle, top):
            assert isinstance(image, Image)
            for index in range(6):
                start = draw.randrange(image.size) >> 9 << 9
                nbytes = min(image.size - start, draw.randrange(1, 12) << 9)
                if index % 3:
                    driver.run(image.write(start, MemoryBuffer(memoryview(noise(nbytes, index)))))
                else:
                    driver.run(image.write_zeroes(start, nbytes, unmap=True))
            driver.run(image.close())
        self.content = self.read(self.top)

    def open(self, driver: CrashDriver, *, middle_is_top: bool = False) -> tuple[RawImage, Image, Image]:
        base = driver.run(RawImage.open(self.base))
        below = OpenOptions(writable=middle_is_top)
        middle = driver.run(Image.open(self.middle, backing=base, options=below))
        return base, middle, driver.run(Image.open(self.top, backing=middle, options=OpenOptions(writable=True)))

    def read(self, top: SimulatedFile) -> bytes:
        """What a guest sees of *top*, sound for our check, once it was repaired if need be."""
        driver, file = CrashDriver(), top.copy()
        driver.run(repair(file))
        assert not driver.run(check(file)).corruptions
        base = driver.run(RawImage.open(self.base))
        backing: Image | RawImage | None = base
        name = driver.run(Image.open(file)).header.backing_name
        if name == "middle":
            backing = driver.run(Image.open(self.middle.copy(), backing=base))
        image = driver.run(Image.open(file, backing=backing if name else None))
        target = bytearray(image.size)
        driver.run(image.read(0, MemoryBuffer(memoryview(target))))
        return bytes(target)


@pytest.mark.sample(3)
@pytest.mark.parametrize("is_whole", [True, False], ids=["whole", "onto base"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_moment_shows_the_same_disk(kind: str, is_whole: bool) -> None:
    world = World(kind)
    initial, driver = world.top.copy(), CrashDriver(7)
    base, _, top = world.open(driver)
    driver.run(stream(top, None if is_whole else base, Pace(), Windows(3, 4096)))
    driver.run(top.put_over(None if is_whole else base, *((None, None) if is_whole else ("base", "raw"))))
    target = bytearray(world.size)
    driver.run(top.read(0, MemoryBuffer(memoryview(target))))
    assert bytes(target) == world.content
    driver.run(top.close())
    assert world.read(world.top) == world.content
    for state in states(driver, initial, world.top, 1, samples=3):
        assert world.read(state) == world.content


@pytest.mark.parametrize("mutant", ["no barriers", "nothing fetched"])
def test_the_moments_object(monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    async def nothing(*arguments: object) -> None:
        """Do not."""

    if mutant == "no barriers":
        monkeypatch.setattr(Stability, "sync", nothing)
    else:
        monkeypatch.setattr(Fetcher, "fetch", nothing)
    with pytest.raises(AssertionError):
        test_every_moment_shows_the_same_disk("plain", is_whole=True)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_meanwhile_stays(kind: str, seed: int) -> None:
    world, draw = World(kind), random.Random(seed)
    driver = CrashDriver(seed)
    base, _, top = world.open(driver)
    expected = bytearray(world.content)
    starts = draw.sample(range(0, world.size, 512), 24)

    async def write() -> None:
        for start in starts:
            if draw.random() < 0.7:
                data = draw.randbytes(512)
                expected[start : start + 512] = data
                await top.write(start, MemoryBuffer(memoryview(data)))
            else:
                expected[start : start + 512] = bytes(512)
                await top.write_zeroes(start, 512, unmap=True)

    async def both() -> None:
        await Spawn(write())
        await stream(top, base if seed % 2 else None, Pace(), Windows(2, 2048))

    driver.run(both())
    driver.finish()
    driver.run(top.put_over(base if seed % 2 else None, *(("base", "raw") if seed % 2 else (None, None))))
    driver.run(top.close())
    assert world.read(world.top) == bytes(expected)
