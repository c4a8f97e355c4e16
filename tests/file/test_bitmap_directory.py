"""Bitmaps made, removed, cleared, enabled, disabled and merged: against a model, QEMU's tools, and every death."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

import qcow2
from qcow2.engine.bitmapdirectory import Change
from qcow2.engine.bitmapplan import BitmapPlan
from tests.bitmapreader import AUTO, Bitmap, bitmaps_of, read_bitmaps
from tests.builder import Recipe, build
from tests.builder.record import BACKING_FORMAT
from tests.crash.driver import CrashDriver, SimulatedFile, points
from tests.crash.explorer import subsets
from tests.crash.images import check_image, open_image, start
from tests.oracle import assert_clean, qemu_img, qemu_io, qemu_read
from tests.program import qcow2_tool, qcow2_tool_ok

SIZE = (3 << 20) + 512


class Model:
    """What the bitmaps of a disk should be."""

    def __init__(self, path: Path, seed: int) -> None:
        self.draw = random.Random(seed)
        self.path = path
        self.bitmaps: dict[str, tuple[int, bool, set[int]]] = {}  # granularity, enabled, dirty
        cluster_size = self.draw.choice([512, 4096, 65536])
        qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster_size}", path, str(SIZE))

    def step(self, disk: qcow2.Disk) -> None:
        names = list(self.bitmaps)
        kind = self.draw.choice(["add", "write", "write", "clear", "enable", "disable", "merge", "remove"])
        if kind == "add":
            if len(names) < 5:
                self.add(disk, f"{'b' * self.draw.randrange(1, 20)}{self.draw.random()}")
        elif kind == "write":
            self.write(disk)
        elif names:
            getattr(self, kind)(disk, self.draw.choice(names))

    def add(self, disk: qcow2.Disk, name: str) -> None:
        granularity, enabled = 1 << self.draw.randrange(9, 20), self.draw.random() < 0.7
        disk.bitmaps.add(name, granularity, enabled=enabled)
        self.bitmaps[name] = granularity, enabled, set()

    def write(self, disk: qcow2.Disk) -> None:
        start = self.draw.randrange(SIZE)
        nbytes = min(self.draw.choice([1, 512, 70_000]), SIZE - start)
        disk.write(start, b"x" * nbytes)
        for granularity, enabled, dirty in self.bitmaps.values():
            if enabled:
                dirty.update(range(start // granularity, (start + nbytes - 1) // granularity + 1))

    def clear(self, disk: qcow2.Disk, name: str) -> None:
        disk.bitmaps.clear(name)
        self.bitmaps[name][2].clear()

    def enable(self, disk: qcow2.Disk, name: str) -> None:
        disk.bitmaps.enable(name)
        self.bitmaps[name] = self.bitmaps[name][0], True, self.bitmaps[name][2]

    def disable(self, disk: qcow2.Disk, name: str) -> None:
        disk.bitmaps.disable(name)
        self.bitmaps[name] = self.bitmaps[name][0], False, self.bitmaps[name][2]

    def remove(self, disk: qcow2.Disk, name: str) -> None:
        disk.bitmaps.remove(name)
        del self.bitmaps[name]

    def merge(self, disk: qcow2.Disk, name: str) -> None:
        source = self.draw.choice(list(self.bitmaps))
        disk.bitmaps.merge(name, source)
        ours, theirs = self.bitmaps[name][0], self.bitmaps[source][0]
        for bit in set(self.bitmaps[source][2]):
            start, end = bit * theirs, min((bit + 1) * theirs, SIZE)
            self.bitmaps[name][2].update(range(start // ours, (end - 1) // ours + 1))

    def judge(self) -> None:
        found = bitmaps_of(self.path)
        assert {name: (each.granularity, each.flags, each.dirty) for name, each in found.items()} == {
            name: (granularity, AUTO if enabled else 0, dirty)
            for name, (granularity, enabled, dirty) in self.bitmaps.items()
        }
        assert_clean(self.path)
        facts = json.loads(qemu_img("info", "--output=json", self.path).stdout)["format-specific"]["data"]
        assert [each["name"] for each in facts.get("bitmaps", [])] == list(self.bitmaps)


@pytest.mark.parametrize("seed", range(5))
def test_random_changes_of_the_directory_and_the_disk(tmp_path: Path, seed: int) -> None:
    model = Model(tmp_path / "disk", seed)
    for _ in range(4):
        with qcow2.open(model.path, writable=True) as disk:
            for _ in range(12):
                model.step(disk)
            for name, (granularity, _, dirty) in model.bitmaps.items():
                seen = {
                    start // granularity
                    for start, nbytes in disk.bitmaps.dirty(name)
                    for start in range(start, start + nbytes, granularity)
                }
                assert seen == dirty
        model.judge()


def test_what_qemu_made_is_changed_by_the_tool_and_what_the_tool_made_by_qemu(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    qemu_img("create", "-q", "-f", "qcow2", path, "64M")
    qemu_img("bitmap", "--add", "-g", "32k", path, "theirs")
    qcow2_tool_ok("bitmap", "--add", "-g", "64k", path, "ours")
    qemu_io(path, "write 1M 512")
    qcow2_tool_ok("bitmap", "--merge", "ours", "--disable", path, "theirs")
    qemu_img("bitmap", "--clear", path, "ours")
    found = bitmaps_of(path)
    assert (found["theirs"].dirty, found["theirs"].flags) == ({32, 33}, 0)
    assert (found["ours"].dirty, found["ours"].flags) == (set(), AUTO)
    other = tmp_path / "other"
    qcow2_tool_ok("create", "-f", "qcow2", other, "64M")
    qcow2_tool_ok("bitmap", "--add", "--merge", "theirs", "-b", path, "-F", "qcow2", other, "merged")
    qemu_img("bitmap", "--remove", path, "theirs")
    qcow2_tool_ok("bitmap", "--remove", path, "ours")
    assert not bitmaps_of(path)
    qcow2_tool_ok("bitmap", "--add", other, "another")
    copy = tmp_path / "copy"
    copy.write_bytes(other.read_bytes())
    qcow2_tool_ok("bitmap", "--remove-all", copy)
    assert not bitmaps_of(copy)
    assert_clean(copy)
    qcow2_tool_ok("bitmap", "--remove", other, "another")
    assert bitmaps_of(other)["merged"].dirty == {16}
    assert_clean(path)
    assert_clean(other)
    assert "bitmaps" not in json.loads(qemu_img("info", "--output=json", path).stdout)["format-specific"]["data"]


REFUSED = {
    "Need at least one of": ["disk", "b0"],
    "Expecting filename and bitmap name": ["--add", "disk"],
    "granularity only supported with --add": ["--clear", "-g", "4k", "disk", "b0"],
    "source file only supported with --merge": ["--clear", "-b", "disk", "disk", "b0"],
    "add on bitmap b0 failed: Bitmap already exists: b0": ["--add", "disk", "b0"],
    "remove on bitmap b9 failed: Dirty bitmap 'b9' not found": ["--remove", "disk", "b9"],
    "Granularity must be power of 2": ["--add", "-g", "3k", "disk", "b1"],
    "Bitmap name cannot be empty": ["--add", "disk", ""],
    "Name length exceeds maximum (1023 characters)": ["--add", "disk", "x" * 1024],
    "Cannot store dirty bitmaps in qcow2 v2 files": ["--add", "old", "b0"],
    "Bitmaps are of different sizes": ["--merge", "b0", "-b", "small", "-F", "qcow2", "disk", "b0"],
    "clear on bitmap bad failed: Bitmap 'bad' is inconsistent": ["--clear", "dead", "bad"],
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_done_is_said_in_qemus_words_and_changes_nothing(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, size in (("disk", "1M"), ("small", "512k"), ("dead", "1M")):
        qemu_img("create", "-q", "-f", "qcow2", name, size)
        qemu_img("bitmap", "--add", name, "bad" if name == "dead" else "b0")
    qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", "old", "1M")
    content = bytearray(Path("dead").read_bytes())
    content[content.rindex(b"bad\0\0\0\0\0") - 9] |= 1
    Path("dead").write_bytes(content)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = qcow2_tool("bitmap", *REFUSED[text])
    assert done.returncode == 1
    assert text in done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


EXTENSIONS = {
    "none": [],
    "some": [(BACKING_FORMAT, b"raw"), (0xCAFE, b"odd")],
    "to the end of a sector": [(BACKING_FORMAT, b"raw"), (0xCAFE, bytes(352))],
    "across a sector": [(BACKING_FORMAT, b"raw"), (0xCAFE, bytes(368))],
}


@pytest.mark.parametrize("backing", ["base", "b" * 900])
@pytest.mark.parametrize("extensions", EXTENSIONS)
def test_the_rest_of_the_header_stays_as_it_is(tmp_path: Path, extensions: str, backing: str) -> None:
    (tmp_path / backing[:200]).write_bytes(bytes(1 << 20))
    recipe = Recipe(size=1 << 20, backing=backing[:200], extensions=EXTENSIONS[extensions], header_tail=b"\xab" * 24)
    if not extensions.startswith(("some", "to", "across")):
        recipe.extensions = [(BACKING_FORMAT, b"raw")]
    path = build(recipe, tmp_path / "disk").path
    before = qcow2_tool_ok("dump-header", path)
    with qcow2.open(path, writable=True) as disk:
        for index in range(3):
            disk.bitmaps.add(f"b{index}")
        disk.write(0, b"x")
    assert [each.dirty for each in bitmaps_of(path).values()] == [{0}] * 3
    assert len(qemu_read(path)) == 1 << 20
    with qcow2.open(path, writable=True) as disk:
        for index in (1, 0, 2):
            disk.bitmaps.remove(f"b{index}")
    after = qcow2_tool_ok("dump-header", path)
    without = [line for line in before.splitlines() if "backing_file_offset" not in line]
    assert [line for line in after.splitlines() if "backing_file_offset" not in line] == without
    assert_clean(path)


async def several(plan: BitmapPlan) -> None:
    await plan.add("old", 512, enabled=False)
    await plan.merge_own("old", "fine")
    await plan.clear("fine")
    await plan.remove("coarse")


CHANGES: dict[str, Change] = {
    "add": lambda plan: plan.add("new", 1024, enabled=True),
    "remove": lambda plan: plan.remove("fine"),
    "clear": lambda plan: plan.clear("coarse"),
    "disable": lambda plan: plan.enable("fine", on=False),
    "merge": lambda plan: plan.merge("coarse", bytes(6) + b"\xff", 9, plan._geometry.size),
    "several": several,
}


def seen(file: SimulatedFile, backing: SimulatedFile | None) -> dict[str, Bitmap]:
    """The bitmaps in *file*, which opens and is sound then."""
    found, driver = read_bitmaps(file.read), CrashDriver()
    driver.run(open_image(file, backing))
    driver.run(check_image(file))
    assert read_bitmaps(file.read) == found
    return found


@pytest.mark.sample(10)
@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("kind", ["bitmaps", "bitmaps-lazy", "bitmaps-backing", "small-backing", "small"])
def test_every_death_leaves_the_old_bitmaps_or_the_new_ones(kind: str, what: str) -> None:
    if "bitmaps" not in kind and what != "add":
        pytest.skip("it has none")
    begun = start(kind)
    file, driver = begun.image.copy(), CrashDriver(1)
    image = driver.run(open_image(file, begun.backing))
    driver.run(image.write(512, _buffer(b"x" * 512)))
    driver.run(image.settle())
    driver.run(image.flush())
    initial, first = file.copy(), len(driver.journal)
    before = seen(initial.copy(), begun.backing)
    driver.run(image.change_bitmaps(CHANGES[what]))
    after = seen(file.copy(), begun.backing)
    assert before != after
    draw, states = random.Random(0), 0
    for point in points(driver.journal[first:], initial, file):
        parts = [((n, i), part) for n, effect in point.pending for i, part in enumerate(effect.tear())]
        kept = [point.keep(effect for _, effect in some) for some in subsets(parts, 6, draw)]
        for state in (point.after_kill(), *kept):
            states += 1
            assert seen(state, begun.backing) in (before, after), point.position
    assert states > 3


def _buffer(data: bytes) -> Any:
    from qcow2.driver.buffer import MemoryBuffer

    return MemoryBuffer(memoryview(data))


def test_disk_of_no_bytes_gets_and_keeps_no_bitmap(tmp_path: Path) -> None:
    empty, small = tmp_path / "empty", tmp_path / "small"
    qcow2_tool_ok("create", empty, "0")
    qcow2_tool_ok("create", small, "1M")
    qcow2_tool_ok("bitmap", "--add", small, "b")
    done = qcow2_tool("bitmap", "--add", empty, "b")
    assert (done.returncode, "a disk of 0 bytes has no bitmaps" in done.stderr) == (1, True)
    with qcow2.open(small, "r+") as disk, pytest.raises(qcow2.UnsupportedImage, match="0 bytes has no bitmaps"):
        disk.resize(0, shrink=True)
    qcow2_tool_ok("snapshot", "-c", "of nothing", empty)
    qcow2_tool_ok("resize", empty, "1M")
    qcow2_tool_ok("bitmap", "--add", empty, "b")
    done = qcow2_tool("snapshot", "-a", "of nothing", empty)
    assert (done.returncode, "a disk of 0 bytes has no bitmaps" in done.stderr) == (1, True)
    qemu_img("info", empty)
    qemu_img("info", small)


@pytest.mark.parametrize("offset", [(1 << 63) | 65536, (1 << 64) - 65536])
def test_directory_beyond_any_file(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "disk"
    qcow2_tool_ok("create", path, "1M")
    qcow2_tool_ok("bitmap", "--add", path, "b")
    content = bytearray(path.read_bytes())
    extension = content.index(bytes.fromhex("23852875"))
    content[extension + 24 : extension + 32] = offset.to_bytes(8, "big")
    path.write_bytes(content)
    for command in ("info", "check"):
        assert "Traceback" not in qcow2_tool(command, path).stderr
    assert "leaves the file" in qcow2_tool("bitmap", "--clear", path, "b").stderr
    with qcow2.open(path) as disk:
        assert disk.read(0, 512) == bytes(512)


def test_change_of_the_bitmaps_voids_what_others_promise(tmp_path: Path) -> None:
    built = build(Recipe(size=SIZE, autoclear=1 << 5 | 1 << 2), tmp_path / "disk")
    qcow2_tool_ok("bitmap", "--add", built.path, "new")
    assert built.peek(88, 8) == (1).to_bytes(8, "big")
    with qcow2.open(built.path, writable=True) as disk:
        disk.write(0, b"x")
    assert len(bitmaps_of(built.path)["new"].dirty) == 1


def test_what_is_dirty_is_what_was_when_it_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a"
    qcow2.create(path, SIZE)
    with qcow2.open(path, "r+") as disk:
        disk.bitmaps.add("b", 65536)
        disk.write(70_000, b"x")
        dirty, known = disk.bitmaps.dirty("b"), iter(disk.bitmaps)
        disk.bitmaps.clear("b")
        disk.write(SIZE - 1, b"x")
        assert list(dirty) == [(65536, 65536)]
        late, disk_size = disk.bitmaps.dirty("b"), disk.size
        disk.resize(2 * SIZE)
        disk.bitmaps.remove("b")
        assert list(late) == [(3 << 20, disk_size - (3 << 20))]
        assert [bitmap.name for bitmap in known] == ["b"]


def test_a_bitmap_that_nobody_knows_is_refused_at_the_call(tmp_path: Path) -> None:
    path = tmp_path / "a"
    qcow2.create(path, SIZE)
    with qcow2.open(path, "r+") as disk, pytest.raises(ValueError, match="'b' not found"):
        disk.bitmaps.dirty("b")


def test_a_disk_that_gets_shorter_has_no_more_extents(tmp_path: Path) -> None:
    path = tmp_path / "a"
    qcow2.create(path, 8 << 20, cluster_size=512)
    with qcow2.open(path, "r+") as disk:
        for offset in range(0, 1 << 20, 1024):
            disk.write(offset, b"x")
        extents = disk.extents()
        next(extents)
        disk.resize(1 << 20, shrink=True)
        assert max(extent.guest_offset + extent.nbytes for extent in extents) <= 1 << 20
