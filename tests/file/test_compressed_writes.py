"""Compressed writes of the library: packed into shared clusters, read by QEMU, sound at every death."""

import random
from pathlib import Path

import pytest

import qcow2
from qcow2.driver.buffer import MemoryBuffer
from qcow2.engine.packing import Packer
from tests.crash.driver import CrashDriver, points
from tests.crash.explorer import subsets
from tests.crash.images import check_image, open_image, read_all, start
from tests.crash.mutant import without_syncs
from tests.oracle import assert_clean, qemu_img, qemu_read
from tests.program import qcow2_tool_ok

NCLUSTERS = 60


def text(draw: random.Random, nbytes: int) -> bytes:
    """What becomes smaller, or not."""
    if draw.random() < 0.2:
        return draw.randbytes(nbytes)
    return (b"%07d " % draw.randrange(10_000_000) * (nbytes // 8 + 1))[:nbytes]


OPTIONS = ["", "compression_type=zstd", "refcount_bits=1", "refcount_bits=2", "compat=0.10"]


@pytest.mark.parametrize(
    ("cluster_size", "options"),
    [(size, options) for size in (512, 65536) for options in OPTIONS] + [(16384, "extended_l2=on")],
)
def test_random_writes_compressed_and_not_are_what_qemu_reads(tmp_path: Path, cluster_size: int, options: str) -> None:
    path, draw = tmp_path / "disk", random.Random(cluster_size)
    size = NCLUSTERS * cluster_size - 512 * (cluster_size > 512)
    given = ",".join(filter(None, [f"cluster_size={cluster_size}", options]))
    qemu_img("create", "-q", "-f", "qcow2", "-o", given, path, str(size))
    content = bytearray(size)
    for _ in range(2):
        with qcow2.open(path, writable=True) as disk:
            for _ in range(25):
                start = draw.randrange(NCLUSTERS) * cluster_size
                nbytes = min(draw.randrange(1, 8) * cluster_size, size - start)
                kind = draw.choice(["packed", "packed", "write", "discard"])
                if kind == "packed":
                    data = b"".join(text(draw, min(cluster_size, nbytes - at)) for at in range(0, nbytes, cluster_size))
                    disk.write_compressed(start, data)
                elif kind == "write":
                    start, data = start + 100, text(draw, nbytes - 200)
                    disk.write(start, data)
                else:
                    data = bytes(nbytes)
                    disk.write_zeroes(start, nbytes)
                content[start : start + len(data)] = data
            assert disk.read(0, size) == content
        assert qemu_read(path) == bytes(content)
        assert_clean(path)


def test_payloads_share_host_clusters(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    qemu_img("create", "-q", "-f", "qcow2", path, "64M")
    before = path.stat().st_size
    with qcow2.open(path, writable=True) as disk:
        for cluster in range(100):
            disk.write_compressed(cluster << 16, b"%06d" % cluster * 10000 + bytes(5536))
    assert path.stat().st_size < before + (6 << 16)
    assert_clean(path)


def test_payloads_go_on_in_the_next_host_cluster(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    qemu_img("create", "-q", "-f", "qcow2", path, "64M")
    before, draw = path.stat().st_size, random.Random(1)
    content = b"".join(draw.randbytes(40 << 10) + bytes(24 << 10) for _ in range(64))
    with qcow2.open(path, writable=True) as disk:
        disk.write_compressed(0, content)
    assert path.stat().st_size < before + (64 * 41 << 10) + (3 << 16)
    assert qemu_read(path)[: len(content)] == content
    assert_clean(path)
    with qcow2.open(path, writable=True) as disk:
        disk.discard(0, disk.size)
    assert_clean(path)


@pytest.mark.parametrize(("compression", "levels"), [("zlib", (1, 12)), ("zstd", (1, 19))])
def test_levels(tmp_path: Path, compression: str, levels: tuple[int, int]) -> None:
    content = b"".join(b"%x " % (number * number) for number in range(40_000)).ljust(512 << 10, b"\0")[: 512 << 10]
    source = tmp_path / "source"
    source.write_bytes(content)
    sizes = []
    for level in levels:
        path = tmp_path / str(level)
        qcow2.create(path, size=len(content), compression=compression)
        with qcow2.open(path, writable=True) as disk:
            disk.write_compressed(0, content, level=level)
            with pytest.raises(ValueError, match=f"{compression} compression level 0 is not in"):
                disk.write_compressed(0, content, level=0)
        words = ("-c", "--compression-level", str(level), "-o", f"compression_type={compression}")
        qcow2_tool_ok("convert", "-f", "raw", "-O", "qcow2", *words, source, tmp_path / "new")
        qcow2.convert(
            source, tmp_path / "other", source_format="raw", compress=True, compression=compression, level=level
        )
        assert (tmp_path / "new").stat().st_size == (tmp_path / "other").stat().st_size
        assert qemu_read(path) == qemu_read(tmp_path / "new") == content
        sizes.append((path.stat().st_size, (tmp_path / "new").stat().st_size))
    assert sizes[0] > sizes[1]


def test_what_are_not_whole_clusters_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    with qcow2.open(path, writable=True) as disk:
        for offset, nbytes in ((0, 512), (512, 65536), (0, 65536 + 512)):
            with pytest.raises(ValueError, match="whole clusters"):
                disk.write_compressed(offset, bytes(nbytes))


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", ["small", "small-lazy", "small-backing", "snapshot", "compressed", "width-1"])
def test_every_death_leaves_each_cluster_as_it_was_or_as_it_is_written(kind: str) -> None:
    assert explore(kind) > 20


def test_an_entry_that_comes_before_its_payload_is_stable_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    without_syncs(monkeypatch, Packer)
    with pytest.raises((AssertionError, qcow2.CorruptImage)):
        explore("small")


def allow(allowed: list[set[bytes]], offset: int, data: bytes) -> None:
    for at in range(0, len(data), 512):
        allowed[(offset + at) // 512].add(data[at : at + 512])


def explore(kind: str, seed: int = 0) -> int:
    """Judge what deaths among compressed writes, random ones of a *seed*, leave; how many there were."""
    begun = start(kind)
    file, driver = begun.image.copy(), CrashDriver(1)
    image = driver.run(open_image(file, begun.backing))
    size = image.geometry.cluster_size
    old = driver.run(read_all(image))
    initial, first = file.copy(), len(driver.journal)
    draw = random.Random(seed)
    writes = [(0, b"a" * 4 * size), (2 * size, b"b" * size), (9 * size, b"c" * 2 * size)]
    for byte in b"efghij" if seed else b"":
        at, nclusters = draw.randrange(10), draw.randrange(1, 4)
        data = b"".join(draw.choice([bytes([byte]) * size, draw.randbytes(size)]) for _ in range(nclusters))
        writes.append((at * size, data[: (12 - at) * size]))
    allowed = [{old[at : at + 512]} for at in range(0, 12 * size, 512)]  # of a sector: noise is written in place
    for offset, data in writes:
        driver.run(image.write_compressed(offset, memoryview(data)))
        allow(allowed, offset, data)
    driver.run(image.write(3 * size, MemoryBuffer(memoryview(b"d" * size))))
    allow(allowed, 3 * size, b"d" * size)
    driver.run(image.close())
    states = 0
    for point in points(driver.journal[first:], initial, file):
        parts = [((n, i), part) for n, effect in point.pending for i, part in enumerate(effect.tear())]
        for state in (point.after_kill(), *(point.keep(e for _, e in some) for some in subsets(parts, 3, draw))):
            states += 1
            after = CrashDriver()
            opened = after.run(open_image(state, begun.backing))
            after.run(check_image(state))
            seen = after.run(read_all(opened))
            assert all(seen[at * 512 : at * 512 + 512] in allowed[at] for at in range(len(allowed))), point.position
    assert states > 20
    if not seed:
        seen = driver.run(read_all(driver.run(open_image(file, begun.backing))))
        assert seen[: 4 * size] == b"a" * 2 * size + b"b" * size + b"d" * size
    return states
