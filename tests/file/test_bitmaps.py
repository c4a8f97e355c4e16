"""Persistent dirty bitmaps are kept through every change, every death, and other programs; judged by an own reader."""

import random
import struct
import subprocess
from pathlib import Path

import pytest

import qcow2
from qcow2.format import layout
from tests.bitmapreader import AUTO, IN_USE, bitmaps_of
from tests.builder import Recipe, build
from tests.oracle import assert_clean, qemu_img, qemu_io
from tests.program import TOOL, qcow2_tool, qcow2_tool_ok

SIZE = (9 << 20) + 1536


def require_sound(path: Path, *, leaks: bool = False) -> None:
    done = subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", path], capture_output=True, check=False)
    assert done.returncode in ((0, 3) if leaks else (0,))


class Story:
    """A disk, what its bitmaps should hold, and random changes, deaths and other programs."""

    def __init__(self, path: Path, seed: int) -> None:
        self.draw = random.Random(seed)
        self.path = path
        lazy = self.draw.choice(["on", "off"])
        options = f"cluster_size={self.draw.choice([512, 4096, 65536])},lazy_refcounts={lazy}"
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(SIZE))
        self.granularities = {f"b{index}": 1 << self.draw.randrange(9, 24) for index in range(3)}
        for name, granularity in self.granularities.items():
            qemu_img("bitmap", "--add", "-g", str(granularity), path, name)
        qemu_img("bitmap", "--add", "--disable", path, "off")
        self.dirty: dict[str, set[int]] = {name: set() for name in self.granularities}
        self.was_killed = False

    def note(self, offset: int, nbytes: int) -> None:
        for name, granularity in self.granularities.items():
            if nbytes:
                self.dirty[name].update(range(offset // granularity, (offset + nbytes - 1) // granularity + 1))

    def change(self, disk: qcow2.Disk) -> None:
        offset = self.draw.randrange(SIZE // 512) * 512
        nbytes = min(self.draw.choice([512, 4096, 100_000, 3 << 20]), SIZE - offset)
        match self.draw.choice(["write", "write", "zero", "discard", "flush"]):
            case "write":
                disk.write(offset, bytes([self.draw.randrange(256)]) * nbytes)
            case "zero":
                disk.write_zeroes(offset, nbytes, unmap=self.draw.random() < 0.5)
            case "discard":
                disk.discard(offset, nbytes)
            case _:
                disk.flush()
                nbytes = 0
        self.note(offset, nbytes)

    def live(self, *, dies: bool) -> None:
        disk = qcow2.open(self.path, writable=True)
        for _ in range(10):
            self.change(disk)
        if not dies:
            disk.close()
            self.judge()
            return
        disk.abandon()
        for name, bitmap in bitmaps_of(self.path).items():
            assert bitmap.is_valid
            assert bitmap.dirty >= self.dirty.get(name, set())
        self.was_killed = True
        qcow2.open(self.path, writable=True).close()
        self.judge()

    def judge(self) -> None:
        bitmaps = bitmaps_of(self.path)
        assert {name: bitmap.dirty for name, bitmap in bitmaps.items()} == {**self.dirty, "off": set()}
        assert {name: bitmap.flags for name, bitmap in bitmaps.items()} == {**dict.fromkeys(self.dirty, AUTO), "off": 0}
        require_sound(self.path, leaks=self.was_killed)

    def let_qemu_write(self) -> None:
        offset = self.draw.randrange(SIZE // 512) * 512
        qemu_io(self.path, f"write {offset} 512")
        self.note(offset, 512)
        self.judge()


@pytest.mark.parametrize("seed", range(6))
def test_bitmaps_hold_exactly_what_changed_after_closes_kills_and_qemu(tmp_path: Path, seed: int) -> None:
    story = Story(tmp_path / "disk", seed)
    story.live(dies=False)
    story.let_qemu_write()
    story.live(dies=True)
    story.let_qemu_write()
    story.live(dies=False)


def with_bitmap(path: Path) -> Path:
    qemu_img("create", "-q", "-f", "qcow2", path, "64M")
    qemu_img("bitmap", "--add", path, "b0")
    return path


def test_after_a_kill_another_program_finds_whole_zones_and_no_more(tmp_path: Path) -> None:
    path = with_bitmap(tmp_path / "disk")
    disk = qcow2.open(path, writable=True)
    disk.write(20 << 20, b"x")
    disk.abandon()
    assert bitmaps_of(path)["b0"].dirty == set(range(20 << 4, 24 << 4))
    qemu_io(path, "write 0 512")
    assert bitmaps_of(path)["b0"].dirty == {0, *range(20 << 4, 24 << 4)}
    qcow2.open(path, writable=True).close()  # the bits of the dead process are of another state
    assert bitmaps_of(path)["b0"].dirty == {0, *range(20 << 4, 24 << 4)}


@pytest.mark.parametrize("more", ["", ",data_file_raw=on"], ids=["entries tell", "raw"])
def test_a_kill_costs_no_bit_of_an_image_with_a_data_file(tmp_path: Path, more: str) -> None:
    path = tmp_path / "disk"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path / 'data'}{more}", path, "16M")
    qemu_img("bitmap", "--add", path, "b0")
    disk = qcow2.open(path, writable=True)
    disk.write(5 << 20, b"x")
    disk.discard(13 << 20, 1 << 17)
    disk.abandon()
    assert bitmaps_of(path)["b0"].dirty == {*range(4 << 4, 8 << 4), *range(12 << 4, 16 << 4)}
    qcow2.open(path, writable=True).close()
    assert bitmaps_of(path)["b0"].dirty == {5 << 4, 13 << 4, (13 << 4) + 1}


def test_an_extension_of_a_kind_that_nobody_knows_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = with_bitmap(tmp_path / "disk")
    content = bytearray(path.read_bytes())
    where = content.index(struct.pack(">II", 0x23852875, 24)) + 8
    content[where + 4 : where + 8] = struct.pack(">I", 0x200)
    path.write_bytes(content)
    done = qcow2_tool("check", path)
    assert (done.returncode, "reserved field is 0x200, not 0" in done.stdout + done.stderr) == (1, True)
    assert subprocess.run(["qemu-img", "check", "-q", path], capture_output=True, check=False).returncode == 1
    with qcow2.open(path, writable=True) as disk:
        assert "reserved field is 0x200, not 0" in caplog.text
        assert disk.read(0, 512) == bytes(512)


def test_zones_in_which_nothing_changes_any_more_cool(tmp_path: Path) -> None:
    path = with_bitmap(tmp_path / "disk")
    disk = qcow2.open(path, writable=True)
    disk.write(0, b"x")
    for _ in range(200):
        disk.write(20 << 20, b"x")
    disk.write(40 << 20, b"x")
    for _ in range(200):
        disk.write(20 << 20, b"x")
    disk.write(60 << 20, b"x")
    disk.abandon()
    hot = [*range(20 << 4, 24 << 4), *range(60 << 4, 64 << 4)]
    assert bitmaps_of(path)["b0"].dirty >= {0, *hot, 40 << 4}
    assert len(bitmaps_of(path)["b0"].dirty) < len(hot) + 64 + 8
    qcow2.open(path, writable=True).close()


def test_zones_become_hot_ahead_of_changes_that_go_in_order(tmp_path: Path) -> None:
    path = with_bitmap(tmp_path / "disk")
    disk = qcow2.open(path, writable=True)
    for zone in (3, 4):
        disk.write(zone << 22, b"x")
    disk.abandon()
    assert bitmaps_of(path)["b0"].dirty == set(range(3 << 6, 12 << 6))
    qcow2.open(path, writable=True).close()
    assert bitmaps_of(path)["b0"].dirty == {3 << 6, 4 << 6}


def test_without_shared_memory_a_kill_costs_the_hot_zones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = with_bitmap(tmp_path / "disk")
    disk = qcow2.open(path, writable=True, log_directory=str(tmp_path / "none"))
    disk.write(20 << 20, b"x")
    assert any("no shared memory for its bitmaps" in message for message in caplog.messages)
    disk.abandon()
    qcow2.open(path, writable=True, log_directory=str(tmp_path / "none")).close()
    assert bitmaps_of(path)["b0"].dirty == set(range(20 << 4, 24 << 4))


def test_looking_changes_nothing(tmp_path: Path) -> None:
    path = with_bitmap(tmp_path / "disk")
    before = path.read_bytes()
    for writable in (False, True):
        with qcow2.open(path, writable=writable) as disk:
            disk.read(0, 512)
            disk.flush()
        assert path.read_bytes() == before


def test_going_back_to_a_snapshot_reports_all_of_the_disk(tmp_path: Path) -> None:
    path = with_bitmap(tmp_path / "disk")
    with qcow2.open(path, writable=True) as disk:
        disk.create_snapshot("one")
        disk.write(0, b"x")
        disk.apply_snapshot("one")
    assert bitmaps_of(path)["b0"].dirty == set(range(1024))
    require_sound(path)


def test_going_back_to_a_snapshot_of_another_size_takes_the_bitmaps_along(tmp_path: Path) -> None:
    path = with_bitmap(tmp_path / "disk")
    with qcow2.open(path, writable=True) as disk:
        disk.create_snapshot("one")
        disk.resize(100 << 30)
        disk.create_snapshot("two")
        disk.apply_snapshot("one")
        assert list(disk.bitmaps.dirty("b0")) == [(0, 64 << 20)]
        disk.apply_snapshot("two")
        disk.bitmaps.clear("b0")
        disk.write(99 << 30, b"x")
        assert list(disk.bitmaps.dirty("b0")) == [(99 << 30, 65536)]
    require_sound(path)
    assert bitmaps_of(path)["b0"].dirty == {99 << 14}


def test_a_bitmap_that_a_dead_qemu_left_stays_as_it_is(tmp_path: Path) -> None:
    path = with_bitmap(tmp_path / "disk")
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write 0 512", "-c", "abort", path], capture_output=True, check=False
    )
    with qcow2.open(path, writable=True) as disk:
        disk.write(1 << 20, b"x")
    assert bitmaps_of(path)["b0"].flags == IN_USE | AUTO
    require_sound(path, leaks=True)


BROKEN = {
    "type": (16, b"\2", "is of type 2"),
    "flags": (12, b"\0\0\0\x82", "has flags 0x82"),
    "table size": (8, b"\0\0\0\2", "has a table of 2 entries"),
    "granularity": (17, b"\x3f", "has granularity_bits 63"),
    "table": (0, b"\0\0\0\0\0\0\0\0", "has a table that cannot lie at 0x0"),
}


@pytest.mark.parametrize("field", BROKEN)
def test_one_that_cannot_be_kept_is_said_at_open_and_given_up_before_the_first_change(
    tmp_path: Path, field: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = Recipe(size=1 << 20, bitmaps=[("good", 16), ("bad", 16)], are_bitmaps_clean=True)
    path = build(made, tmp_path / "disk").path
    where = path.read_bytes().rindex(b"bad\0\0\0\0\0") - layout.BitmapRecord.FORMAT.size
    at, value, text = BROKEN[field]
    with path.open("r+b") as file:
        file.seek(where + at)
        file.write(value)
    before = path.read_bytes()
    with qcow2.open(path, writable=True) as disk:
        assert path.read_bytes() == before
        assert [message for message in caplog.messages if "bitmap 'bad' " + text in message]
        disk.write(0, b"x")
    content = path.read_bytes()
    assert content[where + 15] & IN_USE
    entry = content.index(b"good\0\0\0\0") - layout.BitmapRecord.FORMAT.size
    assert content[entry + 15] == AUTO


def test_who_finds_no_room_is_told_what_the_host_says(tmp_path: Path) -> None:
    """Not that there is no gap in the file, which was looked for after that."""
    image = tmp_path / "disk"
    qcow2_tool_ok("create", image, "16M")
    limit = image.stat().st_size
    command = ["prlimit", f"--fsize={limit}:", TOOL, "bitmap", "--add", image, "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "qcow2: Operation add on bitmap x failed: File too large\n")
    assert_clean(image)


@pytest.mark.parametrize("is_there", [False, True], ids=["missing", "in use"])
def test_a_bitmap_of_an_overlay_needs_nothing_under_it(tmp_path: Path, is_there: bool) -> None:
    base, top, other = (tmp_path / name for name in ("base", "top", "other"))
    qcow2.create(base, 1 << 20)
    for overlay in (top, other):
        qcow2.create(overlay, backing="base")
    with qcow2.open(base, writable=True):
        if not is_there:
            base.unlink()
        for overlay in (top, other):
            qcow2_tool_ok("bitmap", "--add", overlay, "kept")
        qcow2_tool_ok("bitmap", "--merge", "kept", "-b", other, "-F", "qcow2", top, "kept")
        qcow2_tool_ok("bitmap", "--add", "--remove", top, "gone")
    if is_there:
        with qcow2.open(top) as disk:
            assert [bitmap.name for bitmap in disk.bitmaps] == ["kept"]
        assert_clean(top)
