"""Extended L2 entries: what QEMU writes we read, map and check, and QEMU agrees on what comes of our changes."""

import json
import random
import struct
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

import qcow2
from tests.builder import Built, Recipe, build
from tests.builder.record import EXTENDED_L2
from tests.calm import assert_few_in_python, calm
from tests.frontend import FrontEnd
from tests.oracle import assert_same_bytes, peers, qemu_img, qemu_io
from tests.patience import TIMEOUT
from tests.program import Daemon, qcow2_tool

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
            done = subprocess.run([peer, *map(str, words)], capture_output=True, text=True, timeout=TIMEOUT)
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


@pytest.mark.sample(8)
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


BOTH, LOOSE, STREAM = "data and zeros at once", "data but no cluster", "a stream with subclusters"
DAMAGE: dict[str, Callable[[Built], None]] = {
    BOTH: lambda built: built.poke(built.l2_entry_offset(0) + 8, struct.pack(">Q", 1 << 32 | 1)),
    LOOSE: lambda built: built.poke(built.l2_entry_offset(5), struct.pack(">QQ", 0, 1)),
    STREAM: lambda built: built.poke(built.l2_entry_offset(2) + 8, struct.pack(">Q", 1)),
}


def some_parts(path: Path) -> Built:
    """An image with whole clusters, parts of one and two streams."""
    recipe = Recipe(size=10 << 16, incompatible=EXTENDED_L2)
    recipe.data(0, b"zero" * 16384)
    recipe.parts(1, b"one." * 16384, data=0xFF, zero=0xFF00)
    recipe.compressed(2, b"two." * 16384)
    recipe.compressed(3, b"3333" * 16384)
    return build(recipe, path)


@pytest.mark.parametrize("damage", DAMAGE)
def test_check_finds_what_contradicts_itself_and_frees_nothing_of_it(tmp_path: Path, damage: str) -> None:
    built = some_parts(tmp_path / "image")
    assert_agreed(built.path, built.recipe.contents())
    DAMAGE[damage](built)
    assert qcow2_tool("check", built.path).returncode == 2
    counts = [built.refcount(cluster << 16) for cluster in range(9)]
    assert qcow2_tool("check", "-r", "all", built.path).returncode == 2
    assert [built.refcount(cluster << 16) for cluster in range(9)] == counts
    if damage == STREAM:  # who reads looks at the stream only
        assert_same_bytes(read_all(built.path), built.recipe.contents())


@pytest.mark.parametrize("damage", [BOTH, LOOSE])
def test_what_contradicts_itself_is_not_read(tmp_path: Path, damage: str) -> None:
    built = some_parts(tmp_path / "image")
    DAMAGE[damage](built)
    with qcow2.open(str(built.path)) as disk:
        with pytest.raises(qcow2.CorruptImage):
            disk.read((5 if damage == LOOSE else 0) << 16, 512)
        assert disk.read(1 << 16, 4) == b"one."


def test_a_disk_that_shrank_and_grew_shows_zeros(tmp_path: Path) -> None:
    built = some_parts(tmp_path / "image")
    expected = built.recipe.contents()[: (1 << 16) + 3 * 2048 + 512]
    done = qcow2_tool("resize", "-q", "--shrink", built.path, str(len(expected)))
    assert done.returncode == 0, done.stderr
    with qcow2.open(str(built.path), writable=True) as disk:
        disk.resize(20 << 16)
    assert_agreed(built.path, expected.ljust(20 << 16, b"\0"))


@pytest.mark.parametrize("options", ["", "preallocation=metadata"])
def test_a_copy_may_have_subclusters(tmp_path: Path, options: str) -> None:
    built = some_parts(tmp_path / "image")
    copy = tmp_path / "copy"
    wanted = ",".join(filter(None, ["extended_l2=on", options]))
    done = qcow2_tool("convert", "-O", "qcow2", "-o", wanted, built.path, copy)
    assert done.returncode == 0, done.stderr
    assert_agreed(copy, built.recipe.contents())
    assert json.loads(qcow2_tool("info", "--output=json", copy).stdout)["format-specific"]["data"]["extended-l2"]
    ours = json.loads(qcow2_tool("measure", "--output=json", "-O", "qcow2", "-o", wanted, "--size", "1G").stdout)
    assert ours == json.loads(qemu_img("measure", "--output=json", "-O", "qcow2", "-o", wanted, "--size", "1G").stdout)


@pytest.mark.parametrize(
    ("options", "said"), [("cluster_size=8k", "16384"), ("compat=0.10", "1.1")], ids=["small", "version 2"]
)
def test_what_cannot_have_subclusters_says_so(tmp_path: Path, options: str, said: str) -> None:
    done = qcow2_tool("create", "-o", f"extended_l2=on,{options}", tmp_path / "image", "1M")
    assert done.returncode == 1
    assert said in done.stderr


def test_an_overlay_is_committed_and_rebased(tmp_path: Path) -> None:
    size, cluster = 8 << 16, 1 << 16
    model = bytearray(size)
    base, path = tmp_path / "base", tmp_path / "image"
    for file, backing, seed in ((base, None, 1), (path, base, 2)):
        make(file, size, cluster, backing=backing)
        with qcow2.open(str(file), writable=True) as disk:
            for change in changes(seed, size, cluster, 20):
                make_change(disk, change, model)
    other = tmp_path / "other"
    make(other, size, cluster)
    done = qcow2_tool("rebase", "-b", other, "-F", "qcow2", path)
    assert done.returncode == 0, done.stderr
    assert_agreed(path, model)
    done = qcow2_tool("commit", path)
    assert done.returncode == 0, done.stderr
    assert_agreed(other, model)
    assert_agreed(path, model)


@pytest.mark.parametrize("cache", ["writeback", "writethrough"])
@calm
def test_a_daemon_writes_parts_of_clusters_over_a_backing_file_at_once(tmp_path: Path, cache: str) -> None:
    """Few writes enter Python; killed with links that wait, and started again, it has them all."""
    size, cluster, block = 64 << 20, 1 << 17, 4096
    below = random.Random(1).randbytes(1 << 20) * 64
    (tmp_path / "base").write_bytes(below)
    path = tmp_path / "image"
    options = f"extended_l2=on,cluster_size={cluster}"
    assert qcow2_tool("create", "-q", "-o", options, "-b", tmp_path / "base", "-F", "raw", path).returncode == 0
    model = bytearray(below)
    order = random.Random(3).sample(range(size // block), 400)
    order += [number + 1 for number in order[:200] if number % 32 < 31]
    with Daemon(path, "--stats", f"--cache={cache}") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            for at, number in enumerate(order):
                data = at.to_bytes(4, "big") * (block // 4)
                guest.write(number * block, data)
                model[number * block : (number + 1) * block] = data
                if at == len(order) // 2:
                    guest.flush()
        daemon.kill()
    with Daemon(path, "--stats", f"--cache={cache}") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            for number in order[:300]:
                data = b"again..." * (block // 8)
                guest.write(number * block + 512, data[: block - 512])
                model[number * block + 512 : (number + 1) * block] = data[: block - 512]
            for number in order:
                assert guest.read(number * block, block) == model[number * block : (number + 1) * block]
        daemon.stop()
        told = json.loads(daemon.process.stdout.read()) if daemon.process.stdout else {}
    assert_few_in_python(told, 100)
    assert qcow2_tool("check", "-r", "leaks", path).returncode == 0, "what the dead one had set aside"
    assert_agreed(path, model)


def test_parts_of_an_encrypted_disk(tmp_path: Path) -> None:
    """What is not written of a new cluster is no zeros there, so each part is completed."""
    path, raw, size = tmp_path / "image", tmp_path / "model", 10 << 16
    secret = ("--object", "secret,id=s,data=abc123")
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,extended_l2=on"
    assert qcow2_tool("create", "-q", *secret, "-o", options, path, str(size)).returncode == 0
    model = bytearray(size)
    for turn in range(2):
        with qcow2.open(str(path), writable=True, key=b"abc123") as disk:
            for change in changes(turn, size, 1 << 16, 40, "write write zero unmap discard"):
                make_change(disk, change, model)
            assert_same_bytes(disk.read(0, size), model)
    assert qcow2_tool("check", path).returncode == 0
    raw.write_bytes(model)
    image = f"driver=qcow2,file.filename={path},encrypt.key-secret=s"
    qemu_img("compare", "-q", *secret, "--image-opts", image, f"driver=raw,file.filename={raw}")
