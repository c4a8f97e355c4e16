"""How qcow2 writers elsewhere lost data, each replayed against ours; the title of a test names the class of the bug."""

import errno
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import qcow2
from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.operation import Zero
from tests import engine
from tests.builder import Built, Recipe, build
from tests.builder.record import BACKING_FORMAT, COPIED, LAZY_REFCOUNTS
from tests.crash.driver import CrashDriver, SimulatedFile, points
from tests.crash.hostile import is_only_marked
from tests.crash.images import open_image
from tests.frontend import FLUSH, OK, FrontEnd
from tests.load import Load
from tests.oracle import (
    assert_clean,
    assert_not_corrupt,
    assert_same_bytes,
    assert_same_disk,
    qemu_check,
    qemu_img,
    qemu_read,
    read_header,
)
from tests.patience import TIMEOUT
from tests.program import Daemon
from tests.workload import Model, random_steps

CLUSTER = 4096


def filled(nclusters: int, *, refcount_order: int = 4, lazy: bool = False, layout: str = "packed") -> Recipe:
    """Every second cluster holds data."""
    recipe = Recipe(size=nclusters * CLUSTER, cluster_bits=12, refcount_order=refcount_order, layout=layout)  # type: ignore[arg-type]
    recipe.compatible = LAZY_REFCOUNTS if lazy else 0
    for index in range(0, nclusters, 2):
        recipe.data(index, bytes([index % 255 + 1]) * CLUSTER)
    return recipe


# Several queues: one state, not a clone for each (cloud-hypervisor 7660); warm overlay at depth (8621)


@pytest.mark.parametrize("warm", [False, True])
def test_many_queues_over_a_backing_file_keep_every_write(tmp_path: Path, warm: bool) -> None:
    base = filled(2048)
    build(base, tmp_path / "base")
    recipe = Recipe(size=base.size, backing="base", extensions=[(BACKING_FORMAT, b"qcow2")])
    recipe.compatible = LAZY_REFCOUNTS
    path = build(recipe, tmp_path / "a").path
    if warm:
        with qcow2.open(str(path), writable=True) as disk:
            disk.write(0, base.contents()[: base.size // 2])
    with Daemon(path) as daemon, FrontEnd(daemon.socket_path, queues=8) as guest:
        load = Load(guest, base.size // 1024, block_size=1024, depth=32, base=base.contents(), zeroes=True)
        load.run(4000)
        load.drain()
        load.verify(guest)
        daemon.stop()
    assert_clean(path)
    with qcow2.open(str(path)) as disk:
        load.verify(disk)


# Stale punch (8624): a late punch erases what has been put into a freed cluster meanwhile


def test_a_stale_punch_erases_nothing(tmp_path: Path) -> None:
    """Discards, flushes and allocations side by side, so that freed clusters find new owners at once.

    This host punches too fast to be late: the same with late punches is in test_laws_interleaving.py.
    """
    recipe = filled(256, lazy=True)
    path = build(recipe, tmp_path / "a").path
    with Daemon(path) as daemon, FrontEnd(daemon.socket_path, queues=4) as guest:
        flusher = guest.queues.pop()  # the load runs on the others
        load = Load(guest, 256, block_size=CLUSTER, depth=20, base=recipe.contents(), zeroes=True)
        for _ in range(40):
            flusher.submit(FLUSH)
            load.run(100)
            assert {done.status for done in flusher.reap()} <= {OK}
        load.drain()
        load.verify(guest)
        guest.queues.append(flusher)
        daemon.stop()
    assert_clean(path)
    assert_same_disk(path, load.expected())


# Free before allocate (8637) and publish before account (8748): a table that grows fails half way

FILL_UNTIL_FULL = """
import os, resource, signal, sys, qcow2
path, limit, end = sys.argv[1], int(sys.argv[2]), sys.argv[3]
disk = qcow2.open(path, writable=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for index in range(255):
    try:
        disk.write(index * 512, bytes([index % 255 + 1]) * 512)
    except OSError:
        break
    print(index, flush=True)
if end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
disk.close()
"""


@pytest.mark.sample(1)
@pytest.mark.parametrize("lazy", [False, True], ids=["accurate", "lazy"])
@pytest.mark.parametrize(("filled", "step"), [(100, 13_824), (3850, 48_640)], ids=["blocks", "table"])
def test_a_table_that_cannot_grow_leaves_the_old_one_in_charge(
    tmp_path: Path, filled: int, step: int, lazy: bool
) -> None:
    """64-bit refcounts of 512-byte clusters: a block counts 64 clusters, a table of one cluster counts 4096.

    The host takes *step* more bytes each time, so the failure wanders through the growth.
    """
    recipe = Recipe(size=(256 + filled) * 512, cluster_bits=9, refcount_order=6)
    recipe.compatible = LAZY_REFCOUNTS if lazy else 0
    for index in range(256, 256 + filled):
        recipe.data(index, b"older".ljust(512))
    seen = set()
    for number, extra in enumerate(range(0, 12 * step, step)):
        path = build(recipe, tmp_path / str(extra)).path
        held = fill_until_full(path, path.stat().st_size + extra, "kill" if number % 2 else "close")
        seen.add(held)
        if not lazy:
            assert_not_corrupt(path)
        with qcow2.open(str(path), writable=True) as disk:
            for index in range(held):
                assert disk.read(index * 512, 512) == bytes([index % 255 + 1]) * 512
            disk.write(0, b"there is room now".ljust(512) * 200)
            assert disk.read(256 * 512, filled * 512) == b"older".ljust(512) * filled
        assert_not_corrupt(path)
    assert len(seen) > 1


def fill_until_full(path: Path, limit: int, end: str) -> int:
    """Write sectors in a process whose files may not exceed *limit*; how many were acknowledged."""
    command = [sys.executable, "-c", FILL_UNTIL_FULL, str(path), str(limit), end]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == (-9 if end == "kill" else 0), done.stderr
    return len(done.stdout.splitlines())


# Long-run allocator reuse (8606): days of uptime, compressed clusters, resized while off


def test_a_long_life_with_compressed_clusters_and_resizes(tmp_path: Path) -> None:
    rng = random.Random(11)
    recipe = Recipe(size=400 * CLUSTER, cluster_bits=12, layout="scattered", compatible=LAZY_REFCOUNTS)
    for index in range(0, 400, 2):
        recipe.compressed(index, bytes(rng.choices(b"0123456789", k=2000)), skip=index % 3)
    path = build(recipe, tmp_path / "a").path
    model = Model(recipe.contents())
    for life in range(6):
        size = len(model.contents)
        with qcow2.open(str(path), writable=True) as disk:
            for step in random_steps(rng, size=size, cluster_size=CLUSTER, count=150):
                model.apply(step, disk)
        assert_clean(path)
        assert_same_disk(path, bytes(model.contents))
        if life % 2:
            qemu_img("resize", "-f", "qcow2", path, f"+{rng.randrange(1, 200) * CLUSTER}")
            grown = int(read_header(path).fields["size"])
            model.contents += bytes(grown - size)


# Header overwrite (8358): the first guest writes land in the first 64 KiB


TARGETS: dict[str, Callable[[Built], int]] = {
    "L1 table": lambda built: built.l1_offset,
    "refcount table": lambda built: built.refcount_table_offset,
    "refcount block": lambda built: built.refcount_block_offsets[0],
    "L2 table": lambda built: built.l2_offsets[0],
}


@pytest.mark.parametrize("target", ["header", *TARGETS])
@pytest.mark.parametrize("lazy", [False, True], ids=["accurate", "lazy"])
def test_metadata_that_nobody_counted_is_not_handed_out(tmp_path: Path, lazy: bool, target: str) -> None:
    """The refcount of a table says free; allocation must refuse or look elsewhere, never take it."""
    recipe = filled(64, lazy=lazy)
    built = build(recipe, tmp_path / "a")
    built.set_refcount(TARGETS[target](built) if target in TARGETS else 0, 0)
    with suppress(OSError, qcow2.ImageError), qcow2.open(str(built.path), writable=True) as disk:
        for index in range(1, 64, 2):
            disk.write(index * CLUSTER, b"\xff" * CLUSTER)
    seen = qemu_read(built.path)
    for index in range(64):
        now = seen[index * CLUSTER : (index + 1) * CLUSTER]
        assert now in (recipe.contents()[index * CLUSTER : (index + 1) * CLUSTER], b"\xff" * CLUSTER)


@pytest.mark.parametrize("target", TARGETS)
def test_a_crafted_mapping_does_not_let_the_guest_write_metadata(tmp_path: Path, target: str) -> None:
    built = build(filled(64), tmp_path / "a")
    built.set_l2(0, COPIED | TARGETS[target](built))
    length = built.path.stat().st_size
    before = built.peek(0, length)
    disk = qcow2.open(str(built.path), writable=True)
    with pytest.raises(qcow2.CorruptImage):
        disk.write(0, b"\xff" * 512)
    with pytest.raises(OSError, match="no more writes"):
        disk.close()
    assert is_only_marked(before, built.peek(0, length))  # corrupt, as QEMU does it


# Quiesce without metadata (b68e7f3d): the file is copied while the device is paused


@pytest.mark.parametrize("lazy", [False, True], ids=["accurate", "lazy"])
def test_a_copy_of_the_file_of_a_paused_device_holds_every_completed_write(tmp_path: Path, lazy: bool) -> None:
    recipe = Recipe(size=8 << 20, compatible=LAZY_REFCOUNTS if lazy else 0)
    path = build(recipe, tmp_path / "a").path
    with Daemon(path) as daemon, FrontEnd(daemon.socket_path) as guest:
        load = Load(guest, 2048, depth=32, zeroes=True)
        load.run(600)
        fetched = guest.stop_queue()
        load.take_the_last()
        assert load.completed == fetched  # the others have not begun
        shutil.copy(path, tmp_path / "copy")
    with qcow2.open(str(tmp_path / "copy"), writable=True) as disk:
        load.verify(disk)
    assert_not_corrupt(tmp_path / "copy")


# Write-zeroes on an overlay (8245): the bytes of the backing file reappear


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("deed", ["discard", "zeroes", "zeroes and unmap"])
def test_the_backing_file_never_reappears(tmp_path: Path, deed: str, version: int) -> None:
    base = Recipe(size=64 * CLUSTER, cluster_bits=12)
    for index in range(64):
        base.data(index, b"\xbb" * CLUSTER)
    build(base, tmp_path / "base")
    recipe = Recipe(size=base.size, cluster_bits=12, version=version, backing="base")
    recipe.extensions = [(BACKING_FORMAT, b"qcow2")]
    path = build(recipe, tmp_path / "a").path
    with qcow2.open(str(path), writable=True) as disk:
        disk.write(10 * CLUSTER, b"\xaa" * (8 * CLUSTER))
        start, nbytes = 5 * CLUSTER + 512, 20 * CLUSTER
        if deed == "discard":
            disk.discard(start, nbytes)
        else:
            disk.write_zeroes(start, nbytes, unmap="unmap" in deed)
        seen = disk.read(0, disk.size)
    assert_same_disk(path, seen)
    assert set(seen[10 * CLUSTER : 18 * CLUSTER]) <= {0, 0xAA}
    if deed != "discard":
        assert seen[start : start + nbytes] == bytes(nbytes)
    assert seen[: 5 * CLUSTER] == b"\xbb" * (5 * CLUSTER)
    assert_clean(path)


# L1 sized as one cluster: images of more than 4 TiB at 64 KiB clusters


@pytest.mark.parametrize("terabytes", [4, 5, 60])
def test_an_l1_table_of_several_clusters(tmp_path: Path, terabytes: int) -> None:
    size = terabytes << 40
    path = tmp_path / "a"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", path, str(size))
    places = [0, (4 << 40) - 512, size // 2, size - 512]
    with qcow2.open(str(path), writable=True) as disk:
        for place in places:
            disk.write(place, f"at {place}".encode().ljust(512))
    assert_clean(path)
    with qcow2.open(str(path)) as disk:
        for place in places:
            assert disk.read(place, 512) == f"at {place}".encode().ljust(512)


# Compressed cursor: packing exactly fills a host cluster, what comes next overwrites it. We write no compressed
# clusters, so there is no cursor; what can be wrong here is which host clusters such data occupies.


def test_compressed_data_that_ends_with_its_host_cluster_is_not_overwritten(tmp_path: Path) -> None:
    content = bytes(random.Random(2).choices(b"01234567", k=CLUSTER))
    probe = Recipe(size=CLUSTER, cluster_bits=12)
    probe.compressed(0, content)
    recipe = Recipe(size=64 * CLUSTER, cluster_bits=12)
    recipe.compressed(0, content, skip=2 * CLUSTER - len(probe.stream))
    recipe.compressed(1, content)
    path = build(recipe, tmp_path / "a").path
    assert (recipe.view[0].host_offset + recipe.view[0].nbytes) % CLUSTER == 0
    model = Model(recipe.contents())
    with qcow2.open(str(path), writable=True) as disk:
        for index in range(2, 64):
            disk.write(index * CLUSTER, b"\xff" * CLUSTER)
        model.contents[2 * CLUSTER :] = b"\xff" * (62 * CLUSTER)
        disk.write(100, b"partial")
        model.contents[100:107] = b"partial"
    assert_clean(path)
    assert_same_disk(path, bytes(model.contents))


# Crafted tables: refcounts that cannot be true. Offsets that are unaligned or past the end are the cases of
# tests/crash/hostile.py; names of backing files that are no files are in test_bad_input.py.


def test_a_count_that_is_too_low_does_not_wrap(tmp_path: Path) -> None:
    """A cluster of a 1-bit image counted once and referred to twice: nobody's letting go of it counts."""
    recipe = filled(16, refcount_order=0)
    built = build(recipe, tmp_path / "a")
    built.set_l2(2, built.l2(0) & ~COPIED)
    built.set_l2(0, built.l2(0) & ~COPIED)
    with qcow2.open(str(built.path), writable=True) as disk:
        old = disk.read(0, CLUSTER)
        disk.write(0, b"\xff" * CLUSTER)
        assert disk.read(2 * CLUSTER, CLUSTER) == old
        disk.write(2 * CLUSTER, b"\xee" * CLUSTER)
    with qcow2.open(str(built.path)) as disk:
        assert disk.read(0, CLUSTER) == b"\xff" * CLUSTER
        assert disk.read(2 * CLUSTER, CLUSTER) == b"\xee" * CLUSTER


# Dirty bit cleared too early (53ee9ebb): a reader that closes must not speak for a writer. Several handles that write
# cannot be: the second is locked out (law 10), and several queues share one.


def test_a_reader_that_closes_leaves_the_dirty_bit(tmp_path: Path) -> None:
    recipe = Recipe(size=1 << 20, compatible=LAZY_REFCOUNTS, incompatible=1)
    recipe.data(0, b"x")
    built = build(recipe, tmp_path / "a")
    built.set_refcount(recipe.view[0].host_offset, 0)
    with qcow2.open(str(built.path)), qcow2.open(str(built.path)):
        pass
    assert read_header(built.path).is_dirty
    assert qemu_check(built.path)[0] == 2


def test_memory_does_not_grow_with_what_was_read(tmp_path: Path) -> None:
    """A cache of 1 MiB over 4 MiB of L2 tables, every one of them touched."""
    path = tmp_path / "a"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k,preallocation=metadata", path, "2G")
    script = (
        "import sys, qcow2\n"
        "def resident():\n"  # not ru_maxrss, which begins with what the parent had
        "    with open('/proc/self/status') as status:\n"
        "        return next(int(line.split()[1]) for line in status if line.startswith('VmRSS'))\n"
        "with qcow2.open(sys.argv[1], cache_size=1 << 20) as disk:\n"
        "    disk.read(0, 512)\n"
        "    before = resident()\n"
        "    for place in range(0, disk.size, 1 << 21):\n"
        "        disk.read(place, 512)\n"
        "    print(resident() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2048


# Dropped I/O result (e737d61a): a punch that failed is reported as done, and what should be gone shows


def test_a_failed_punch_uncovers_nothing() -> None:
    bench = engine.set_up(64 * 512, seed=3)
    bench.write(0, b"\xaa" * (32 * 512))
    bench.breaker.fault = lambda operation: OSError(errno.EIO, "no punch") if isinstance(operation, Zero) else None
    bench.driver.run(bench.image.write_zeroes(512, 20 * 512, unmap=True))
    bench.driver.run(bench.image.discard(25 * 512, 7 * 512))
    bench.breaker.fault = None
    expected = b"\xaa" * 512 + bytes(20 * 512) + b"\xaa" * (4 * 512) + bytes(7 * 512)
    for cluster in range(32, 64):  # parts of clusters, so that what is under the rest shows
        bench.write(cluster * 512, b"\xbb" * 100)
        expected += (b"\xbb" * 100).ljust(512, b"\0")
    assert_same_bytes(bench.content(), expected)
    bench.close()
    assert_same_bytes(bench.reopened_content(), expected)


# Flush in name only (rublk): metadata is written after the last sync


@pytest.mark.parametrize("lazy", [False, True], ids=["accurate", "lazy"])
def test_nothing_is_pending_once_a_flush_is_done(lazy: bool) -> None:
    bench = engine.set_up(64 * 512, lazy=lazy)
    initial = SimulatedFile("disk", {}, 0)
    for start in range(0, 64 * 512, 8 * 512):
        bench.write(start, b"\xcc" * 1000)
        bench.driver.run(bench.image.flush())
    *_, last = points(bench.driver.journal, initial, bench.file)
    assert [effect for _, effect in last.pending if effect.kind == "write"] == []


# Metadata only in the process: SIGKILL of the backend while the guest lives


@pytest.mark.parametrize("lazy", [False, True], ids=["accurate", "lazy"])
def test_an_acknowledged_write_needs_no_process(lazy: bool) -> None:
    bench = engine.set_up(64 * 512, lazy=lazy, base=b"\x11" * (64 * 512))
    bench.write(512, b"\xdd" * 700)
    alone = CrashDriver()
    file = bench.file.after_kill()
    image = alone.run(open_image(file, bench.base))
    target = bytearray(64 * 512)
    alone.run(image.read(0, MemoryBuffer(memoryview(target))))
    assert_same_bytes(target, b"\x11" * 512 + b"\xdd" * 700 + b"\x11" * (61 * 512 + 324))
