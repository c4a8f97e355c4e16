"""`qcow2 commit`: the base has what the overlay showed, and the overlay shows the same, wherever it is interrupted."""

import json
import random
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

import qcow2
from qcow2.driver.buffer import MemoryBuffer
from qcow2.engine.create import Options, create
from qcow2.engine.image import Image
from qcow2.engine.opened import OpenOptions
from qcow2.engine.stability import Stability
from qcow2.job.commit import commit
from qcow2.job.crew import Windows
from qcow2.job.pace import Pace
from qcow2.judge.check import check
from qcow2.judge.repair import repair
from tests.crash.driver import CrashDriver, SimulatedFile
from tests.crash.moments import states_together
from tests.engine import noise
from tests.file.test_rebase import format_of, scribble
from tests.file.test_rebase import image as random_image
from tests.oracle import assert_clean, assert_not_corrupt, held_by_qemu, qemu_img, qemu_io, qemu_read, read_header
from tests.program import TIMEOUT, TOOL, qcow2_tool, qcow2_tool_ok

MIB = 1 << 20


@pytest.mark.sample(4)
@pytest.mark.parametrize("seed", range(8))
def test_any_chain_into_any_of_its_images(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    sizes = [draw.choice((512, MIB + 512, 3 * MIB, 4 * MIB)) for _ in range(4)]
    chain = [random_image(draw, tmp_path / "0", None, sizes[0])]
    for depth in (1, 2, 3):
        chain.append(random_image(draw, tmp_path / str(depth), chain[-1], sizes[depth]))
    top, base = chain[-1], draw.choice(chain[:-1])
    before = qemu_read(top)
    words = draw.choice([(), ("-d",)]) if base is chain[-2] else ("-b", base)
    assert qcow2_tool_ok("commit", *words, top) == "Image committed.\n"
    assert qemu_read(top) == before
    committed = qemu_read(base, format_of(base))
    assert committed[: len(before)] == before
    for path in chain:
        if format_of(path) == "qcow2":
            assert_clean(path)
    if words == ():
        assert all(extent["depth"] > 0 for extent in json.loads(qemu_img("map", "--output=json", top).stdout))
        assert top.stat().st_size <= 5 * cluster_size(top)


def cluster_size(path: Path) -> int:
    return 1 << read_header(path).fields["cluster_bits"]


def test_snapshots_of_the_overlay_keep_what_they_hold(tmp_path: Path) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    qemu_img("create", "-q", "-f", "qcow2", base, "1M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    qemu_io(top, "write -P 1 0 1M")
    qemu_img("snapshot", "-c", "one", top)
    qemu_io(top, "write -P 2 0 512k")
    before = qemu_read(top)
    qcow2_tool_ok("commit", top)
    assert qemu_read(top) == qemu_read(base) == before
    assert qemu_read(top, snapshot="one") == b"\1" * MIB
    assert_clean(top)


def test_what_a_snapshot_sees_of_the_base_is_not_changed(tmp_path: Path) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    qemu_img("create", "-q", "-f", "qcow2", base, "1M")
    qemu_io(base, "write -P 1 0 1M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    qemu_img("snapshot", "-c", "one", top)
    qemu_io(top, "write -P 2 256k 64k")
    before = base.read_bytes(), top.read_bytes()
    for words in ((), ("-d",), ("-b", base)):
        done = qcow2_tool("commit", *words, top)
        assert (done.returncode, done.stdout) == (1, "")
        reason = f"at {256 << 10} it sees {base}, which would change; delete it first"
        assert done.stderr == f"qcow2: {top}: internal snapshot 'one' would show another disk: {reason}\n"
    assert (base.read_bytes(), top.read_bytes()) == before
    with pytest.raises(qcow2.UnsupportedImage, match="'one' would show another disk"):
        qcow2.commit(top)


@pytest.mark.parametrize("seed", range(8))
def test_commit_with_snapshots_is_refused_or_changes_none(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    chain = [random_image(draw, tmp_path / "0", None, draw.choice((MIB, 3 * MIB)))]
    chain.append(random_image(draw, tmp_path / "1", chain[0], draw.choice((MIB, 3 * MIB))))
    top, size = tmp_path / "2", draw.choice((MIB, 3 * MIB))
    qemu_img("create", "-q", "-f", "qcow2", "-b", chain[1], "-F", format_of(chain[1]), top, str(size))
    scribble(draw, top, size, "qcow2")
    qemu_img("snapshot", "-c", "one", top)
    for _ in range(draw.randrange(3)):
        start = draw.randrange(700 << 10) >> 9 << 9
        qemu_io(top, draw.choice(("write -P 9 {} 512", "write -z {} 64k", "discard {} 300k")).format(start))
    now, then = qemu_read(top), qemu_read(top, snapshot="one")
    words = draw.choice([(), ("-d",), ("-b", chain[0])])
    qcow2_tool("commit", *words, top)
    assert (qemu_read(top), qemu_read(top, snapshot="one")) == (now, then)


def test_a_snapshot_that_would_see_a_longer_base_counts(tmp_path: Path) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    qemu_img("create", "-q", "-f", "raw", base, "64k")
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top, "1M")
    qemu_img("snapshot", "-c", "one", top)
    qcow2_tool_ok("commit", top)  # zeros grow
    qemu_io(top, "write -P 2 512k 64k")
    done = qcow2_tool("commit", top)
    assert (done.returncode, f"at {512 << 10} it sees {base}" in done.stderr) == (1, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["base"], "Image does not have a backing file"),
        (["-b", "nosuch", "top"], "Did not find 'nosuch' in the backing chain of 'top'"),
        (["nosuch"], "Could not open 'nosuch': Could not open 'nosuch': No such file or directory"),
        (["-r", "x", "top"], "'x'"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    qemu_img("create", "-q", "-f", "qcow2", "base", "1M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top")
    done = qcow2_tool("commit", *words)
    assert (done.returncode, said in done.stderr) == (1, True), done.stderr


def test_a_base_in_use_is_refused(tmp_path: Path) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    qemu_img("create", "-q", "-f", "qcow2", base, "1M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    with held_by_qemu(base, read_only=True):
        done = qcow2_tool("commit", top)
    assert (done.returncode, "lock" in done.stderr) == (1, True)


def test_progress_and_quiet(tmp_path: Path) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    qemu_img("create", "-q", "-f", "raw", base, "1M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top)
    qemu_io(top, "write -P 1 0 1M")
    said = qcow2_tool_ok("commit", "-p", top)
    assert said.endswith("(100.00/100%)\nImage committed.\n")  # each \r is a line to who reads text
    assert qcow2_tool_ok("commit", "-p", "-q", top) == ""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_killed_commit_has_changed_nothing_that_is_seen(tmp_path: Path, number: signal.Signals) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    for path, under in ((base, ()), (top, ("-b", base, "-F", "qcow2"))):
        qemu_img("create", "-q", "-f", "qcow2", *under, path, "64M")
    content = random.Random(1).randbytes(64 * MIB)
    with qcow2.open(top, writable=True) as disk:
        disk.write(0, content)
    grown = base.stat().st_size + 4 * MIB
    with subprocess.Popen([TOOL, "commit", "-r", "64M", top], stderr=subprocess.PIPE, text=True) as process:
        ends = time.monotonic() + TIMEOUT
        while base.stat().st_size < grown and process.poll() is None:
            assert time.monotonic() < ends
        process.send_signal(number)
        process.communicate(timeout=TIMEOUT)
    assert process.returncode == -number
    with qcow2.open(top) as disk:
        assert disk.read(0, disk.size) == content
    assert_not_corrupt(top)
    if number is signal.SIGTERM:
        assert_clean(base)
        assert_clean(top)
    qcow2_tool_ok("commit", top)
    assert qemu_read(base) == content


BASE = Options(size=50 << 9, cluster_bits=10)
TOP = Options(size=60 << 9, cluster_bits=9, backing_name="base", backing_format="qcow2")
STORIES = {
    "accurate": (BASE, TOP),
    "lazy": (replace(BASE, lazy_refcounts=True), replace(TOP, lazy_refcounts=True)),
    "version 2": (replace(BASE, version=2), replace(TOP, version=2)),
    "other clusters": (replace(BASE, cluster_bits=11), TOP),
}


@pytest.mark.parametrize("story", STORIES)
def test_every_moment_shows_the_same_disk(story: str) -> None:
    """Both files are of one simulated host, whose journal has the order of all operations."""
    driver = CrashDriver(5)
    base, top = SimulatedFile("base", {}, 0), SimulatedFile("top", {}, 0)
    for file, options in zip((base, top), STORIES[story], strict=True):
        driver.run(create(file, options))
    expected = prepare(driver, base, top)
    initial = base.copy(), top.copy()
    driver = CrashDriver(5)
    below = driver.run(Image.open(base, options=OpenOptions(writable=True)))
    overlay = driver.run(Image.open(top, backing=below, options=OpenOptions(writable=True)))
    driver.run(commit(overlay, below, Pace(), Windows(3, 2048)))
    driver.run(below.close())
    driver.run(overlay.empty())
    driver.run(overlay.close())
    for state in states_together(driver, [(initial[0], base), (initial[1], top)], 1):
        assert shown(*state) == expected
    assert shown(base.copy(), top.copy()) == expected


def test_the_moments_object_to_a_commit_without_barriers(monkeypatch: pytest.MonkeyPatch) -> None:
    async def not_yet(self: Stability) -> None:
        """Nothing is stable."""

    monkeypatch.setattr(Stability, "sync", not_yet)
    with pytest.raises(AssertionError):
        test_every_moment_shows_the_same_disk("other clusters")


def prepare(driver: CrashDriver, base: SimulatedFile, top: SimulatedFile) -> bytes:
    below = driver.run(Image.open(base, options=OpenOptions(writable=True)))
    driver.run(below.write(0, MemoryBuffer(memoryview(noise(below.size, 3)))))
    driver.run(below.close())
    overlay = driver.run(Image.open(top, backing=below, options=OpenOptions(writable=True)))
    for start, nbytes in ((3 << 9, 512), (9 << 9, 7 << 9), (30 << 9, 2048), (55 << 9, 1024)):
        driver.run(overlay.write(start, MemoryBuffer(memoryview(noise(nbytes, start)))))
    driver.run(overlay.write_zeroes(20 << 9, 5 << 9, unmap=True))
    driver.run(overlay.close())
    content = bytearray(overlay.size)
    driver.run(overlay.read(0, MemoryBuffer(memoryview(content))))
    return bytes(content)


def shown(base: SimulatedFile, top: SimulatedFile) -> bytes:
    """What a guest sees of a state, sound for our check, once it was repaired if need be."""
    driver = CrashDriver()
    for file in (base, top):
        driver.run(repair(file))
        report = driver.run(check(file))
        assert not report.corruptions
    below = driver.run(Image.open(base))
    overlay = driver.run(Image.open(top, backing=below))
    content = bytearray(overlay.size)
    driver.run(overlay.read(0, MemoryBuffer(memoryview(content))))
    return bytes(content)


def test_commit_that_runs_full_says_so_of_the_file(tmp_path: Path) -> None:
    """Both images could be opened; the one below cannot take all."""
    base, top = tmp_path / "base", tmp_path / "top"
    qcow2.create(base, 8 << 20)
    qcow2.create(top, backing="base")
    with qcow2.open(top, writable=True) as disk:
        disk.write(0, b"x" * (6 << 20))
    command = ["prlimit", "--fsize=1000000", TOOL, "commit", top]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stderr) == (1, f"qcow2: Block job failed: {base}: File too large\n")
    with qcow2.open(top) as disk:
        assert disk.read(0, 6 << 20) == b"x" * (6 << 20)
