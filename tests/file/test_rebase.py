"""`qcow2 rebase`: what the image shows is the same before, after, and wherever it is interrupted."""

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

import qcow2
from qcow2.driver.buffer import MemoryBuffer
from qcow2.engine.create import Options, create
from qcow2.engine.image import Image
from qcow2.engine.opened import OpenOptions
from qcow2.job.crew import Windows
from qcow2.job.pace import Pace
from qcow2.job.rebase import copy_difference
from qcow2.node.raw import RawImage
from qcow2.tool.rebase import change_header
from tests.bitmapreader import bitmaps_of
from tests.crash.driver import CrashDriver, SimulatedFile, points
from tests.engine import noise
from tests.oracle import assert_clean, assert_not_corrupt, qemu_img, qemu_io, qemu_read
from tests.program import TIMEOUT, TOOL, qcow2_tool, qcow2_tool_ok

MIB = 1 << 20


def image(draw: random.Random, path: Path, below: Path | None, size: int) -> Path:
    """An image with something in it; raw ones have none below."""
    if below is None and draw.random() < 0.3:
        qemu_img("create", "-q", "-f", "raw", path, str(size))
        scribble(draw, path, size, "raw")
        return path
    options = f"cluster_size={draw.choice(('512', '4k', '64k', '1M'))},compat={draw.choice(('0.10', '1.1'))}"
    under = ("-b", below, "-F", format_of(below)) if below else ()
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, *under, path, str(size))
    scribble(draw, path, size, "qcow2")
    return path


def scribble(draw: random.Random, path: Path, size: int, image_format: str) -> None:
    commands = []
    for _ in range(8):
        verb = draw.choice(["write -P 1", "write -P 2", "write -P 0", "write -z", "discard"])
        start = draw.randrange(size) >> 9 << 9
        commands.append(f"{verb} {start} {min(size - start, draw.choice((512, 5120, 70 << 10, 700 << 10)))}")
    qemu_io(path, *commands, options=("-f", image_format))


def format_of(path: Path) -> str:
    with path.open("rb") as file:
        return "qcow2" if file.read(4) == b"QFI\xfb" else "raw"


@pytest.mark.parametrize("seed", range(8))
def test_any_image_shows_the_same_over_any_other(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    sizes = [draw.choice((512, MIB + 512, 3 * MIB, 4 * MIB)) for _ in range(5)]
    base = image(draw, tmp_path / "base", None, sizes[0])
    middle = image(draw, tmp_path / "middle", base, sizes[1])
    other = image(draw, tmp_path / "other", draw.choice((None, base)), sizes[2])
    top = image(draw, tmp_path / "top", draw.choice((middle, base, other)), sizes[3])
    if format_of(top) == "raw":
        pytest.skip("a raw image has no backing file")
    before = qemu_read(top)
    new = draw.choice((None, base, middle, other))
    words = ("-b", "") if new is None else ("-b", new.name, "-F", format_of(new))
    qcow2_tool_ok("rebase", *words, top)
    assert qemu_read(top) == before
    assert_clean(top)
    info = json.loads(qemu_img("info", "--output=json", top).stdout)
    assert info.get("backing-filename") == (None if new is None else new.name)


@pytest.mark.parametrize("options", [[], ["-c"]])
def test_bitmaps_do_not_record_the_copies(tmp_path: Path, options: list[str]) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    qemu_img("create", "-q", "-f", "qcow2", base, "8M")
    qemu_io(base, f"write -P 7 {MIB} {MIB}")
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    qemu_img("bitmap", "--add", top, "b0")
    qemu_io(top, f"write -P 8 {4 * MIB} 65536")
    (before,) = bitmaps_of(top).values()
    assert before.dirty
    qcow2_tool_ok("rebase", *options, "-b", "", top)
    assert bitmaps_of(top) == {"b0": before}
    assert qemu_read(top)[MIB : 2 * MIB] == b"\7" * MIB


def test_what_is_the_same_in_both_is_not_copied(tmp_path: Path) -> None:
    for name, under in (("base", None), ("middle", "base"), ("top", "middle")):
        words = ("-b", under, "-F", "qcow2") if under else ()
        qemu_img("create", "-q", "-f", "qcow2", *words, tmp_path / name, "8M")
    qemu_io(tmp_path / "base", "write -P 1 0 8M")
    qemu_io(tmp_path / "middle", "write -P 1 0 1M", "write -P 2 1M 64k", "write -z 2M 64k")
    qcow2_tool_ok("rebase", "-b", "base", "-F", "qcow2", tmp_path / "top")
    extents = json.loads(qemu_img("map", "--output=json", tmp_path / "top").stdout)
    own = [(extent["start"], extent["length"]) for extent in extents if extent["depth"] == 0]
    assert own == [(MIB, 64 << 10), (2 * MIB, 64 << 10)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["top"], "Must specify backing file (-b) or use unsafe mode (-u)"),
        (["-b", "base", "top"], "Could not change the backing file to 'base': backing format must be specified"),
        (["-b", "nosuch", "-F", "raw", "top"], "Could not open new backing file 'nosuch': Could not open"),
        (["-b", "top", "-F", "qcow2", "top"], "lock"),
        (["-b", "", "nosuch"], "Could not open 'nosuch': Could not open 'nosuch': No such file or directory"),
        (["-b", "x" * 1024, "-F", "raw", "top"], "limit 1023"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "top"):
        qemu_img("create", "-q", "-f", "qcow2", tmp_path / name, "1M")
    before = (tmp_path / "top").read_bytes()
    done = qcow2_tool("rebase", *words)
    assert done.returncode == 1
    assert said in done.stderr
    assert (tmp_path / "top").read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_killed_rebase_has_changed_nothing_that_is_seen(tmp_path: Path, number: signal.Signals) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    base.write_bytes(random.Random(1).randbytes(64 * MIB))
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top)
    grown = top.stat().st_size + 4 * MIB
    with subprocess.Popen([TOOL, "rebase", "-b", "", top], stderr=subprocess.PIPE, text=True) as process:
        ends = time.monotonic() + TIMEOUT
        while top.stat().st_size < grown and process.poll() is None:
            assert time.monotonic() < ends
        process.send_signal(number)
        process.communicate(timeout=TIMEOUT)
    with qcow2.open(top, writable=True) as disk:
        assert disk.read(0, disk.size) == base.read_bytes()
    assert_not_corrupt(top)


@pytest.mark.parametrize("seed", [1, 2])
def test_every_moment_shows_the_old_disk(seed: int) -> None:
    """After a kill or a power loss: read as what is named below has it."""
    old, new = noise(60 << 9, seed), noise(40 << 9, seed)[: 20 << 9] + noise(30 << 9, seed + 1)
    bases = {"old": SimulatedFile.parse("old", old), "new": SimulatedFile.parse("new", new)}
    driver = CrashDriver(seed)
    file = SimulatedFile("top", {}, 0)
    options = Options(size=64 << 9, cluster_bits=10, backing_name="old", backing_format="raw")
    driver.run(create(file, options))
    driver = CrashDriver(seed)
    initial = file.copy()
    below = {name: driver.run(RawImage.open(base)) for name, base in bases.items()}
    top = driver.run(Image.open(file, backing=below["old"], options=OpenOptions(writable=True)))
    driver.run(top.write(5 << 9, MemoryBuffer(memoryview(b"x" * 512))))
    driver.run(top.flush())
    begun = len(driver.journal)
    driver.run(copy_difference(top, below["new"], Pace(), Windows(2, 4096)))
    driver.run(top.close())
    driver.run(change_header(file, "new", "raw"))
    expected = bytearray(old.ljust(64 << 9, b"\0"))
    expected[5 << 9 : 6 << 9] = b"x" * 512
    names = set()
    draw = random.Random(seed)
    for point in points(driver.journal, initial, file):
        if point.position <= begun:
            continue
        torn = [piece for _, effect in point.pending for piece in effect.tear()]
        for state in (
            point.after_kill(),
            point.keep(()),
            *(point.keep(piece for piece in torn if draw.random() < 0.5) for _ in range(4)),
        ):
            shown, name = look(state, bases)
            names.add(name)
            assert shown == bytes(expected)
    assert names == {"old", "new"}


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_what_is_copied_is_compressed_if_asked_for(tmp_path: Path, compression: str) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    base.write_bytes(b"".join(b"%07d " % number for number in range(100_000)) + bytes(300_512))
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"compression_type={compression}", "-b", base, "-F", "raw", top)
    qemu_io(top, "write -P 1 100k 512")
    before = qemu_read(top)
    qcow2_tool_ok("rebase", "-c", "-b", "", top)
    assert qemu_read(top) == before
    assert_clean(top)
    extents = json.loads(qcow2_tool_ok("map", "--output=json", top))
    assert [each["compressed"] for each in extents if each["data"]] == [True, False, True]
    assert top.stat().st_size < len(before) * 2 // 3


def test_no_compressed_copies_where_there_can_be_none(tmp_path: Path) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    base.write_bytes(b"x" * MIB)
    qcow2_tool_ok("create", "-o", f"data_file={tmp_path / 'data'}", "-b", base, "-F", "raw", top)
    before = top.read_bytes()
    done = qcow2_tool("rebase", "-c", "-b", "", top)
    assert (done.returncode, "no compressed clusters" in done.stderr) == (1, True)
    assert top.read_bytes() == before


def look(file: SimulatedFile, bases: dict[str, SimulatedFile]) -> tuple[bytes, str]:
    driver = CrashDriver()
    name = driver.run(Image.open(file.copy())).header.backing_name
    image = driver.run(Image.open(file.copy(), backing=driver.run(RawImage.open(bases[name]))))
    target = bytearray(image.size)
    driver.run(image.read(0, MemoryBuffer(memoryview(target))))
    return bytes(target), name


def test_rebase_that_would_change_snapshots_is_refused(tmp_path: Path) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    qcow2_tool_ok("create", base, "1M")
    qcow2_tool_ok("create", "-b", base, "-F", "qcow2", top)
    qcow2_tool_ok("snapshot", "-c", "one", top)
    before = top.read_bytes()
    done = qcow2_tool("rebase", "-b", "", top)
    assert (done.returncode, done.stdout) == (1, "")
    assert "1 internal snapshots would show another disk: delete them first" in done.stderr
    assert top.read_bytes() == before


def test_files_are_told_by_what_is_open(tmp_path: Path) -> None:
    """While the job reads, the path of the new base leads to the old one."""
    top, old, new = tmp_path / "top", tmp_path / "old", tmp_path / "new"
    for path, pattern in ((old, b"1"), (new, b"2")):
        path.write_bytes(pattern * MIB)
    qcow2.create(top, backing=old, backing_format="raw")

    def exchange(done: int, total: int) -> None:
        if not (tmp_path / "kept").exists():
            new.rename(tmp_path / "kept")
            new.hardlink_to(old)

    qcow2.rebase(top, new, backing_format="raw", progress=exchange)
    (tmp_path / "kept").replace(new)
    assert qemu_read(top) == b"1" * MIB


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_an_image_over_nothing_keeps_its_zeros_over_another(tmp_path: Path, compat: str) -> None:
    """Version 2 says them by mapping nothing; qemu-img 7.2 and 11.1 let the other show there."""
    path, other = tmp_path / "disk", tmp_path / "other"
    other.write_bytes(b"o" * (1 << 20))
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"compat={compat}", path, "2M")
    qemu_io(path, "write -P 7 100k 30k")
    qemu_img("convert", "-O", "raw", path, tmp_path / "before")
    qcow2_tool_ok("rebase", "-b", other, "-F", "raw", path)
    assert qemu_img("compare", "-f", "raw", "-F", "qcow2", tmp_path / "before", path).returncode == 0
    assert_clean(path)
