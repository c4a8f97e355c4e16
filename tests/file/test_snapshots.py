"""Internal snapshots through the library and the tool, judged by QEMU's tools."""

import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import qcow2
from tests.builder import Recipe, build
from tests.program import qcow2_tool

SIZES = (512, 4096, 65536)
NCLUSTERS = 200


def qemu_img(*words: str | Path) -> str:
    return subprocess.run(["qemu-img", *words], check=True, capture_output=True, text=True).stdout


def require_sound(path: Path) -> None:
    qemu_img("check", "-q", "-f", "qcow2", path)


def snapshot_content(path: Path, name: str) -> bytes:
    target = path.with_suffix(".raw")
    qemu_img("convert", "-l", f"snapshot.name={name}", "-f", "qcow2", "-O", "raw", path, target)
    return target.read_bytes()


class Story:
    """A disk, what it and its snapshots should hold, and random changes of both."""

    def __init__(self, path: Path, seed: int) -> None:
        self.draw = random.Random(seed)
        self.path = path
        cluster_size, version = self.draw.choice(SIZES), self.draw.choice(["1.1", "0.10"])
        self.refcount_bits = self.draw.choice([2, 8, 16, 64]) if version == "1.1" else 16
        options = f"cluster_size={cluster_size},compat={version}"
        if version == "1.1":
            options += f",refcount_bits={self.refcount_bits},lazy_refcounts={self.draw.choice(['on', 'off'])}"
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(NCLUSTERS * cluster_size))
        self.cluster_size = cluster_size
        self.content = bytearray(NCLUSTERS * cluster_size)
        self.kept: dict[str, bytes] = {}
        self.disk = qcow2.open(path, writable=True)

    def step(self, number: int) -> None:
        what = self.draw.choice(["write", "write", "write", "discard", "create", "apply", "delete", "reopen"])
        getattr(self, what)(number)
        assert self.disk.read(0, self.disk.size) == self.content

    def write(self, number: int) -> None:
        start = self.draw.randrange(len(self.content))
        data = bytes([number + 1]) * self.draw.randrange(1, min(6 * self.cluster_size, len(self.content) - start) + 1)
        self.disk.write(start, data)
        self.content[start : start + len(data)] = data

    def discard(self, number: int) -> None:
        start = self.draw.randrange(NCLUSTERS) * self.cluster_size
        nbytes = min(self.draw.randrange(1, 20) * self.cluster_size, len(self.content) - start)
        self.disk.discard(start, nbytes)
        self.content[start : start + nbytes] = bytes(nbytes)

    def create(self, number: int) -> None:
        if self.done(self.disk.create_snapshot, f"s{number}"):
            self.kept[f"s{number}"] = bytes(self.content)

    def apply(self, number: int) -> None:
        if self.kept:
            name = self.draw.choice(list(self.kept))
            if self.done(self.disk.apply_snapshot, name):
                self.content[:] = self.kept[name]

    def done(self, act: Callable[[str], object], name: str) -> bool:
        """Whether *act* could be done, which only narrow refcounts forbid."""
        if self.refcount_bits > 2:
            act(name)
            return True
        try:
            act(name)
        except OSError as error:
            if "referenced too often" not in str(error):
                raise
            return False
        return True

    def delete(self, number: int) -> None:
        if self.kept:
            name = self.draw.choice(list(self.kept))
            self.disk.delete_snapshot(name)
            del self.kept[name]

    def reopen(self, number: int) -> None:
        self.disk.close()
        require_sound(self.path)
        self.disk = qcow2.open(self.path, writable=True)


@pytest.mark.parametrize("seed", range(8))
def test_random_changes_of_disk_and_snapshots(tmp_path: Path, seed: int) -> None:
    story = Story(tmp_path / "disk", seed)
    for number in range(40):
        story.step(number)
    story.disk.close()
    require_sound(story.path)
    for name, content in story.kept.items():
        assert snapshot_content(story.path, name) == content
        with qcow2.open(story.path, snapshot=name) as past:
            assert past.read(0, past.size) == content


def test_the_disk_is_as_long_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    with qcow2.open(path, writable=True) as disk:
        disk.write(0, b"old")
        disk.create_snapshot("short")
        disk.resize(3 << 30)
        disk.write((3 << 30) - 4, b"far!")
        disk.create_snapshot("long")
        disk.apply_snapshot("short")
        assert disk.size == 1 << 20
        assert disk.read(0, 3) == b"old"
        disk.apply_snapshot("long")
        assert disk.read((3 << 30) - 4, 4) == b"far!"
        disk.apply_snapshot("short")
        disk.resize(3 << 30)
        assert disk.read(3, 1 << 20) == bytes(1 << 20)
        assert disk.read((3 << 30) - 4, 4) == bytes(4)
    require_sound(path)


def test_what_others_say_of_a_snapshot_is_kept(tmp_path: Path) -> None:
    """VM state past the disk's end, and extra data that nobody knows."""
    path = tmp_path / "disk"
    qemu_img("create", "-q", "-f", "qcow2", path, "64M")
    with qcow2.open(path, writable=True) as disk:
        disk.create_snapshot("theirs")
    with path.open("r+b") as file:
        file.seek(60)
        _, offset = struct.unpack(">IQ", file.read(12))
        file.seek(offset)
        entry = bytearray(file.read(40 + 24 + 1 + 6))
        entry[12:14], entry[36:40] = struct.pack(">H", 1), struct.pack(">I", 40)
        entry[24:32], entry[40:48] = struct.pack(">Q", 7_000_000), struct.pack(">Q", 12345)
        entry[64:64] = b"something unknow"
        file.seek(offset)
        file.write(entry)
    with qcow2.open(path, writable=True) as disk:
        disk.create_snapshot("ours")
        theirs, ours = disk.snapshots()
        assert (theirs.vm_state_size, theirs.record.vm_clock_nsec) == (12345, 7_000_000)
        assert theirs.extra.endswith(b"something unknow")
        assert (ours.id, ours.name, ours.disk_size) == ("2", "ours", 64 << 20)
    require_sound(path)
    assert "theirs" in qemu_img("snapshot", "-l", path)


def test_compressed_clusters_are_counted_where_they_lie(tmp_path: Path) -> None:
    recipe = Recipe(size=64 * 4096, cluster_bits=12)
    for cluster in range(12):
        recipe.compressed(cluster, random.Random(cluster).randbytes(1500) + bytes(2596))
    built = build(recipe, tmp_path / "disk")
    with qcow2.open(built.path, writable=True) as disk:
        before = disk.read(0, disk.size)
        disk.create_snapshot("packed")
        disk.write(0, b"x" * 5 * 4096)
        disk.create_snapshot("half")
        disk.delete_snapshot("packed")
        disk.apply_snapshot("half")
        assert disk.read(0, disk.size) == b"x" * 5 * 4096 + before[5 * 4096 :]
    require_sound(built.path)


def test_a_name_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    with qcow2.open(path, writable=True) as disk:
        disk.create_snapshot("one")
        for act in (disk.apply_snapshot, disk.delete_snapshot):
            with pytest.raises(FileNotFoundError, match="'two' not found"):
                act("two")
            with pytest.raises(TypeError, match="not by None"):
                act(None)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="256 bytes, limit 255"):
            disk.create_snapshot("n" * 256)
        with pytest.raises(ValueError, match="has a zero byte"):
            disk.create_snapshot("a\0b")
        with pytest.raises(FileNotFoundError):
            disk.delete_snapshot("1")  # an id, which only `apply_snapshot` takes
        disk.apply_snapshot("1")
    with qcow2.open(path) as disk, pytest.raises(OSError, match="read-only"):
        disk.create_snapshot("two")
    with pytest.raises(qcow2.UnsupportedImage, match="read only"):
        qcow2.open(path, writable=True, snapshot="one")


@pytest.mark.parametrize(
    "words",
    [
        ["-l"],
        ["-c", "new"],
        ["-a", "one"],
        ["-a", "2"],
        ["-a", "none"],
        ["-d", "one"],
        ["-d", "2"],
        ["-d", "none"],
        ["-d", "one", "-q"],
    ],
    ids=" ".join,
)
def test_the_tool_does_and_says_what_qemu_img_does(tmp_path: Path, words: list[str]) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    qemu_img("create", "-q", "-f", "qcow2", ours, "1M")
    for name in ("one", "two", "one"):
        qemu_img("snapshot", "-c", name, ours)
    theirs.write_bytes(ours.read_bytes())
    done = qcow2_tool("snapshot", *words, ours)
    judge = subprocess.run(["qemu-img", "snapshot", *words, theirs], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (judge.returncode, judge.stdout)
    complaint = "".join(line for line in done.stderr.splitlines(keepends=True) if "warning: 2 snapshots" not in line)
    assert complaint.removeprefix("qcow2: ") == judge.stderr.removeprefix("qemu-img: ")
    lists = [[line.split()[:2] for line in qemu_img("snapshot", "-l", path).splitlines()] for path in (ours, theirs)]
    assert lists[0] == lists[1]
    require_sound(ours)
