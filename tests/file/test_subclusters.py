"""Extended L2 entries: what QEMU writes we read, map and check, and QEMU agrees on what comes of our changes."""

import json
import random
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

import qcow2
from tests.oracle import assert_same_bytes, peers, qemu_img, qemu_io
from tests.program import qcow2_tool

CLUSTERS = [1 << 14, 1 << 16, 1 << 17, 1 << 21]


@dataclass(frozen=True)
class Change:
    """One change of a disk."""

    what: str  # write, zero, unmap, discard, compress
    offset: int
    nbytes: int
    byte: int = 0

    def command(self) -> str:
        """For qemu-io."""
        options = {"write": f"write -P {self.byte}", "compress": f"write -c -P {self.byte}", "discard": "discard"}
        verb = options.get(self.what, "write -z -u" if self.what == "unmap" else "write -z")
        return f"{verb} {self.offset} {self.nbytes}"

    def apply(self, model: bytearray) -> None:
        """To the bytes of the disk; a discard leaves them what they are or makes them zeros."""
        model[self.offset : self.offset + self.nbytes] = bytes([self.byte]) * self.nbytes


def changes(seed: int, size: int, cluster: int, count: int, kinds: str = "write zero unmap") -> list[Change]:
    """Random changes, of a sector and of many clusters, at odd places and at borders."""
    draw = random.Random(seed)
    unit = cluster // 32
    made = []
    if "compress" in kinds:  # first: QEMU writes no compressed cluster over another one
        chosen = draw.sample(range(size // cluster), size // cluster // 3)
        made += [Change("compress", index * cluster, cluster, draw.randint(1, 255)) for index in chosen]
    for _ in range(count):
        what = draw.choice(kinds.replace("compress", "").split())
        step = draw.choice([512, unit, unit, cluster])
        offset = draw.randrange(size // step) * step
        nbytes = min(size - offset, draw.randint(1, draw.choice([3, 40])) * draw.choice([512, unit]))
        byte = draw.randint(1, 255) if what == "write" else 0
        made.append(Change(what, offset, nbytes, byte))
    return made


def create(path: Path, size: int, cluster: int, *, backing: Path | None = None, more: str = "") -> None:
    """An image by qemu-img."""
    over = ["-b", str(backing), "-F", "qcow2"] if backing else []
    options = f"extended_l2=on,cluster_size={cluster}{more}"
    qemu_img("create", "-q", "-f", "qcow2", *over, "-o", options, path, str(size))


def read_all(path: Path, step: int = 1 << 20) -> bytes:
    with qcow2.open(str(path)) as disk:
        return b"".join(disk.read(at, min(step, disk.size - at)) for at in range(0, disk.size, step))


def qemu_map(path: Path) -> list[dict[str, object]]:
    """Merged as far as kinds go: the two cut their runs differently."""
    return merged(json.loads(qemu_img("map", "--output=json", path).stdout))


def our_map(path: Path) -> list[dict[str, object]]:
    done = qcow2_tool("map", "--output=json", path)
    assert done.returncode == 0, done.stderr
    return merged(json.loads(done.stdout))


def merged(extents: Iterable[dict[str, int]]) -> list[dict[str, object]]:
    runs: list[dict[str, object]] = []
    for extent in extents:
        same = ("depth", "zero", "data") if extent["data"] else ("zero", "data")
        what = {key: extent.get(key) for key in same}
        if extent["data"] and "offset" in extent:
            what["ahead"] = extent["offset"] - extent["start"]
        if runs and runs[-1]["what"] == what:
            runs[-1]["length"] += extent["length"]  # type: ignore[operator]
        else:
            runs.append({"start": extent["start"], "length": extent["length"], "what": what})
    return runs


def assert_agreed(path: Path, model: bytes | bytearray) -> None:
    """Everybody reads *model*, and nobody finds fault with the image."""
    assert_same_bytes(read_all(path), model)
    raw = path.with_suffix(".model")
    raw.write_bytes(model)
    for peer in peers():
        for words in (["compare", "-q", "-f", "qcow2", "-F", "raw", path, raw], ["check", "-f", "qcow2", path]):
            done = subprocess.run([peer, *map(str, words)], capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stdout + done.stderr
    done = qcow2_tool("check", path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("chain", ["alone", "overlay", "prealloc"])
def test_what_qemu_writes_is_read(tmp_path: Path, cluster: int, chain: str) -> None:
    size = min(12 * cluster + 3 * 512, 4 << 20)
    model = bytearray(size)
    backing = tmp_path / "base" if chain == "overlay" else None
    if backing:
        create(backing, size - 5 * 512, cluster)
        below = changes(cluster, size - 5 * 512, cluster, 12, "write zero compress")
        qemu_io(backing, *(change.command() for change in below))
        for change in below:
            change.apply(model)
    path = tmp_path / "image"
    create(path, size, cluster, backing=backing, more=",preallocation=metadata" if chain == "prealloc" else "")
    kinds = "write zero unmap" + (" compress" if chain == "alone" else "")
    made = changes(cluster + 1, size, cluster, 25, kinds)
    qemu_io(path, *(change.command() for change in made))
    for change in made:
        change.apply(model)
    assert_same_bytes(read_all(path), model)
    if size < 1 << 20:
        assert_same_bytes(read_all(path, 3 * 512), model)
    assert our_map(path) == qemu_map(path)
    assert qcow2_tool("check", path).returncode == 0
    assert json.loads(qcow2_tool("info", "--output=json", path).stdout)["format-specific"]["data"]["extended-l2"]


def make(path: Path, size: int, cluster: int, *, backing: Path | None = None, more: str = "") -> None:
    """An image by us."""
    over = ["-b", backing, "-F", "qcow2"] if backing else []
    done = qcow2_tool("create", "-q", "-o", f"extended_l2=on,cluster_size={cluster}{more}", *over, path, str(size))
    assert done.returncode == 0, done.stderr


def make_change(disk: qcow2.Disk, change: Change, model: bytearray) -> None:
    """Make *change*, and say in *model* what the disk holds then."""
    match change.what:
        case "write":
            disk.write(change.offset, bytes([change.byte]) * change.nbytes)
        case "discard":
            disk.discard(change.offset, change.nbytes)
            seen = disk.read(change.offset, change.nbytes)
            old = model[change.offset : change.offset + change.nbytes]
            wrong = [i for i in range(0, len(seen), 512) if seen[i : i + 512] not in (old[i : i + 512], bytes(512))]
            assert not wrong
            model[change.offset : change.offset + change.nbytes] = seen
            return
        case what:
            disk.write_zeroes(change.offset, change.nbytes, unmap=what == "unmap")
    change.apply(model)


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("chain", ["alone", "overlay", "changed", "snapshot", "lazy"])
def test_what_we_write_is_what_everybody_reads(tmp_path: Path, cluster: int, chain: str) -> None:
    size = min(12 * cluster + 3 * 512, 4 << 20)
    model = bytearray(size)
    path, base = tmp_path / "image", tmp_path / "base"
    if chain == "overlay":
        make(base, size - 5 * 512, cluster)
        with qcow2.open(str(base), writable=True) as disk:
            for change in changes(cluster, size - 5 * 512, cluster, 12):
                make_change(disk, change, model)
    make(path, size, cluster, backing=base if chain == "overlay" else None)
    if chain == "changed":
        for change in (made := changes(cluster + 7, size, cluster, 20, "write zero unmap compress")):
            change.apply(model)
        qemu_io(path, *(change.command() for change in made))
    for turn in range(3):
        if chain == "snapshot":
            qemu_img("snapshot", "-c", f"s{turn}", path)
            (tmp_path / f"s{turn}").write_bytes(model)
        with qcow2.open(str(path), writable=True, lazy_refcounts=chain == "lazy") as disk:
            for change in changes(cluster + turn, size, cluster, 30, "write write zero unmap discard"):
                make_change(disk, change, model)
                if change.byte % 5 == 0:
                    disk.flush()
            assert_same_bytes(disk.read(0, size), model)
        assert_agreed(path, model)
    if chain == "snapshot":
        for turn in range(3):
            with qcow2.open(str(path), snapshot=f"s{turn}") as disk:
                assert_same_bytes(disk.read(0, size), (tmp_path / f"s{turn}").read_bytes())
