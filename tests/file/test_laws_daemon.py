"""The laws, through the socket: what a guest was told is done outlives a SIGKILL, syncs happen, failures are honest."""

import errno
import json
import os
import random
import struct
import subprocess
from collections.abc import Iterator
from fcntl import F_ADD_SEALS, F_SEAL_WRITE, fcntl, ioctl
from pathlib import Path

import pytest

import qcow2
from qcow2.driver.file import HostFile, run
from qcow2.driver.operation import Resize
from tests.blockguest import MIB, Guest
from tests.builder import Recipe, build
from tests.builder.record import BACKING_FORMAT, LAZY_REFCOUNTS
from tests.frontend import (
    DISCARD,
    F_CONFIG_WCE,
    F_DISCARD,
    F_FLUSH,
    F_WRITE_ZEROES,
    FLUSH,
    IN,
    IOERR,
    OK,
    OUT,
    WRITE_ZEROES,
    FrontEnd,
)
from tests.load import Load
from tests.oracle import assert_clean, assert_not_corrupt, qemu_check, qemu_img, read_header
from tests.patience import TIMEOUT
from tests.program import Daemon

SIZE = 32 << 20
BLOCK = 4096
NBLOCKS = SIZE // BLOCK
DEPTH = 32
FS_IOC_SHUTDOWN, SHUTDOWN_WITHOUT_LOG = 0x8004587D, 2  # from then on every write to the disk fails
MAX_LEAK = 12 << 20  # bytes: the run in use, the one reserved ahead, what was about to be freed


def make_image(directory: Path, *, lazy: bool, overlay: bool = False, cluster_bits: int = 16) -> tuple[Path, bytes]:
    """An empty image, or an overlay whose base shows in two of three clusters; and what the disk reads as."""
    recipe = Recipe(size=SIZE, cluster_bits=cluster_bits, compatible=LAZY_REFCOUNTS if lazy else 0)
    base = b""
    if overlay:
        below = Recipe(size=SIZE, cluster_bits=16)
        rng = random.Random(5)
        for index in range(SIZE >> 16):
            if index % 3:
                below.data(index, rng.randbytes(65536))
        build(below, directory / "base")
        base = below.contents()
        recipe.backing = "base"
        recipe.extensions = [(BACKING_FORMAT, b"qcow2")]
    return build(recipe, directory / "a").path, base


def counters(daemon: Daemon) -> dict[str, int]:
    """Stop the daemon cleanly and take the counters of `--stats`."""
    daemon.stop()
    assert daemon.process.stdout is not None
    told: dict[str, int] = json.loads(daemon.process.stdout.read())
    return told


# Law 1: acknowledged means process-safe


@pytest.mark.sample(2)
@pytest.mark.parametrize("cache", ["writeback", "writethrough"])
@pytest.mark.parametrize("overlay", [False, True], ids=["plain", "overlay"])
@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "accurate"])
def test_acknowledged_writes_outlive_the_daemon(tmp_path: Path, lazy: bool, overlay: bool, cache: str) -> None:
    """The lazy image is opened while the kernel may still be at work for the dead daemon."""
    path, base = make_image(tmp_path, lazy=lazy, overlay=overlay)
    for life in range(3):
        with Daemon(path, f"--cache={cache}") as daemon, FrontEnd(daemon.socket_path) as guest:
            load = Load(guest, NBLOCKS, seed=life, base=base, zeroes=True)
            load.run(random.Random(life).randrange(50, 700))
            daemon.kill(at_once=lazy)
            load.take_the_last()
        if not lazy:
            assert_not_corrupt(path)
        with qcow2.open(str(path), writable=True) as disk:
            load.verify(disk)
            base = disk.read(0, SIZE)
        code, report = qemu_check(path)  # now that no link waits: a cluster whose link does seems to leak
        assert code in (0, 3)
        assert report.get("leaks", 0) <= (life + 1) * MAX_LEAK >> 16
    if lazy:
        assert_clean(path)


def test_acknowledged_writes_outlive_the_daemon_with_several_queues(tmp_path: Path) -> None:
    path, base = make_image(tmp_path, lazy=True, overlay=True, cluster_bits=12)
    with Daemon(path) as daemon, FrontEnd(daemon.socket_path, queues=4) as guest:
        load = Load(guest, NBLOCKS, seed=9, depth=16, base=base, zeroes=True)
        load.run(2000)
        daemon.kill()
        load.take_the_last()
    with qcow2.open(str(path), writable=True) as disk:
        load.verify(disk)
    assert_clean(path)


def test_the_next_daemon_serves_what_the_killed_one_acknowledged(tmp_path: Path) -> None:
    path, base = make_image(tmp_path, lazy=True)
    for life in range(2):
        with Daemon(path, "--cache=writethrough") as daemon, FrontEnd(daemon.socket_path) as guest:
            load = Load(guest, 500, seed=life, base=base)
            load.run(400)
            daemon.kill(at_once=True)
            load.take_the_last()
        with Daemon(path) as daemon, FrontEnd(daemon.socket_path) as guest:
            load.verify(guest)
            base = b"".join(guest.read(block * BLOCK, BLOCK) for block in range(500))
            daemon.stop()
        assert_clean(path)


# Law 2: flushed means stable; a completion in writethrough waited for a sync of its own


@pytest.mark.parametrize("overlay", [False, True], ids=["plain", "overlay"])
@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "accurate"])
def test_each_lone_write_in_writethrough_has_its_sync(tmp_path: Path, lazy: bool, overlay: bool) -> None:
    """Over what a backing file shows there are two: before the link and after it."""
    path, _ = make_image(tmp_path, lazy=lazy, overlay=overlay)
    with Daemon(path, "--cache=writethrough", "--stats") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            for index in range(1, 150, 3):
                guest.write(index * 65536, b"x" * BLOCK)
        assert counters(daemon)["syncs"] >= (100 if overlay else 50)


def test_writes_over_a_backing_file_in_writethrough_share_what_python_does(tmp_path: Path) -> None:
    path, base = make_image(tmp_path, lazy=True, overlay=True)
    require_nowait(path)
    expected = bytearray(base)
    clusters = [cluster for cluster in range(SIZE >> 16) if cluster % 3]
    with Daemon(path, "--cache=writethrough", "--stats") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            guest.write(clusters[0] * 65536, b"x" * BLOCK)  # begins the log
            for first in range(0, len(clusters), DEPTH):
                batch = clusters[first : first + DEPTH]
                write_together(guest, [cluster * 65536 for cluster in batch])
                for cluster in batch:
                    expected[cluster * 65536 : cluster * 65536 + BLOCK] = b"x" * BLOCK
        told = counters(daemon)
    assert told["python_requests"] < len(clusters) * 2 // 3
    assert told["syncs"] < len(clusters)
    assert_clean(path)
    with qcow2.open(str(path)) as disk:
        assert disk.read(0, SIZE) == expected


def write_together(guest: FrontEnd, guest_offsets: list[int]) -> None:
    """Write a block to each; the daemon finds all of them at once, however seldom it and we may run."""
    with guest.queues[0].together():
        for guest_offset in guest_offsets:
            guest.submit(OUT, guest_offset, b"x" * BLOCK)
    ended: list[int] = []
    while len(ended) < len(guest_offsets):
        ended += [completion.status for completion in guest.wait()]
    assert set(ended) == {OK}


def require_nowait(path: Path) -> None:
    """Skip where the host does not read without waiting: there Python copies."""
    with path.open("rb") as file:
        try:
            os.preadv(file.fileno(), [bytearray(512)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            pass
        except OSError:
            pytest.skip("this file system does not read without waiting")


def test_without_the_flush_feature_each_lone_write_has_its_sync(tmp_path: Path) -> None:
    path, _ = make_image(tmp_path, lazy=True)
    with Daemon(path, "--cache=writeback", "--stats") as daemon:
        with FrontEnd(daemon.socket_path, features=0) as guest:
            for index in range(50):
                guest.write(index * 65536, b"x" * BLOCK)
        assert counters(daemon)["syncs"] >= 50


def test_each_lone_discard_in_writethrough_has_its_sync(tmp_path: Path) -> None:
    path, _ = make_image(tmp_path, lazy=True)
    with Daemon(path, "--cache=writethrough", "--stats") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            guest.write(0, b"x" * (40 * BLOCK))
            for index in range(20):
                guest.discard(index * 65536, 65536)
                guest.write_zeroes((20 + index) * 65536, 65536, unmap=True)
        assert counters(daemon)["syncs"] >= 41


def test_each_flush_after_a_write_has_its_sync(tmp_path: Path) -> None:
    path, _ = make_image(tmp_path, lazy=True)
    with Daemon(path, "--stats") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            for index in range(30):
                guest.write(index * 65536, b"x" * BLOCK)
                guest.flush()
        assert counters(daemon)["syncs"] >= 30


def test_writeback_without_flushes_hardly_syncs(tmp_path: Path) -> None:
    """The dirty bit and the reservations; what is left would be a sync an allocation."""
    path, _ = make_image(tmp_path, lazy=True)
    with Daemon(path, "--stats") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            for index in range(200):
                guest.write(index * 65536, b"x" * BLOCK)
        assert counters(daemon)["syncs"] < 40


def test_many_writers_in_writethrough_share_their_syncs(tmp_path: Path) -> None:
    path, _ = make_image(tmp_path, lazy=True)
    rounds = 47
    with Daemon(path, "--cache=writethrough", "--stats") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            for first in range(0, rounds * DEPTH, DEPTH):
                write_together(guest, [block * BLOCK for block in range(first, first + DEPTH)])
        assert counters(daemon)["syncs"] < rounds * DEPTH // 4


def test_switching_the_write_cache_off_syncs_before_it_is_acknowledged(tmp_path: Path) -> None:
    """Counted by stopping right after the switch: fewer syncs than with the switch means it did none."""
    told = []
    for switch in (False, True):
        (tmp_path / str(switch)).mkdir()
        path, _ = make_image(tmp_path / str(switch), lazy=True)
        features = F_FLUSH | F_CONFIG_WCE
        with Daemon(path, "--stats") as daemon:
            with FrontEnd(daemon.socket_path, features=features) as guest:
                guest.write(0, b"x" * BLOCK)
                if switch:
                    guest.set_writeback(False)
                    for index in range(10):
                        guest.write(index * BLOCK, b"y" * BLOCK)
                    guest.set_writeback(True)
                    guest.write(0, b"z" * BLOCK)
            told.append(counters(daemon)["syncs"])
    assert told[1] - told[0] >= 11


# Law 5: no early reuse


@pytest.mark.parametrize("cache", ["writeback", "none"])
@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "accurate"])
def test_late_writes_never_land_in_the_next_owner_of_a_cluster(tmp_path: Path, lazy: bool, cache: str) -> None:
    """Overlapping writes and discards of one block at the same time: each block shows its own bytes, or zeros.

    The disk is small, so that what is freed is soon reserved again; past the page cache a write takes its time.
    """
    nblocks, nbytes = 32, 65536
    path = build(Recipe(size=nblocks * nbytes, compatible=LAZY_REFCOUNTS if lazy else 0), tmp_path / "a").path
    rng = random.Random(1)
    with Daemon(path, f"--cache={cache}") as daemon, FrontEnd(daemon.socket_path) as guest:
        in_flight = 0
        for _ in range(3000):
            while in_flight > 60:
                in_flight -= len(guest.wait())
            block = rng.randrange(nblocks)
            if rng.randrange(3):
                guest.submit(OUT, block * nbytes, b"%15d " % block * (nbytes // 16))
            else:
                guest.submit(DISCARD, 0, segment(block * nbytes, nbytes))
            in_flight += 1
        while in_flight:
            in_flight -= len(guest.wait())
        for block in range(nblocks):
            seen = guest.read(block * nbytes, nbytes)
            sectors = {seen[at : at + 512] for at in range(0, nbytes, 512)}
            assert sectors <= {bytes(512), b"%15d " % block * 32}
        daemon.stop()
    assert_clean(path)


def test_freed_clusters_are_punched(tmp_path: Path) -> None:
    path, _ = make_image(tmp_path, lazy=True)
    with Daemon(path) as daemon, FrontEnd(daemon.socket_path) as guest:
        for index in range(100):
            guest.write(index * 65536, b"x" * 65536)
        guest.flush()
        full = path.stat().st_blocks * 512
        for index in range(0, 100, 10):
            guest.discard(index * 65536, 10 * 65536)
        daemon.stop()
    assert full > 100 * 65536
    assert path.stat().st_blocks * 512 < 20 * 65536
    assert_clean(path)


# Law 7: failures are final and honest


@pytest.fixture
def memory_file(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """An image in a memfd: sealed against writes at a moment's notice, it fails them all with EPERM."""
    path, _ = make_image(tmp_path, lazy=False)
    fd = os.memfd_create("image", os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, path.read_bytes())
        yield Path(f"/proc/{os.getpid()}/fd/{fd}"), fd
    finally:
        os.close(fd)


class MemoryDaemon(Daemon):
    """A daemon whose image has no directory for a socket beside it."""

    def __init__(self, image: Path, directory: Path, *options: str) -> None:
        super().__init__(image, *options)
        self.socket_path = directory / "s"

    def __enter__(self) -> "MemoryDaemon":
        super().__enter__()
        self.forbid_mappings()  # F_SEAL_WRITE demands that there are none
        return self


def segment(guest_offset: int, nbytes: int) -> bytes:
    return (guest_offset // 512).to_bytes(8, "little") + (nbytes // 512).to_bytes(4, "little") + bytes(4)


def test_a_file_that_fails_writes_is_told_to_the_guest(tmp_path: Path, memory_file: tuple[Path, int]) -> None:
    path, fd = memory_file
    with MemoryDaemon(path, tmp_path) as daemon, FrontEnd(daemon.socket_path) as guest:
        guest.write(0, b"x" * 65536)
        fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE)
        assert guest.do(OUT, 0, b"y" * BLOCK).status == IOERR
        assert guest.do(WRITE_ZEROES, 0, segment(0, 65536)).status == IOERR
        assert guest.do(DISCARD, 0, segment(0, 65536)).status == IOERR
        assert guest.do(OUT, 0, b"y" * BLOCK).status == IOERR
        assert guest.do(FLUSH).status == IOERR
        assert guest.do(IN, 0, nbytes=BLOCK).data == b"x" * BLOCK


def test_of_many_discards_none_is_well_after_a_failed_one(tmp_path: Path, memory_file: tuple[Path, int]) -> None:
    """The data plane serves most of them."""
    path, fd = memory_file
    with MemoryDaemon(path, tmp_path) as daemon, FrontEnd(daemon.socket_path) as guest:
        for cluster in range(160):
            guest.write(cluster * 65536, b"x" * 65536)
        ended: list[int] = []
        for cluster in range(150):
            guest.submit(DISCARD, 0, segment(cluster * 65536, 65536))
            if cluster == 80:
                fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE)
            while cluster - len(ended) >= 31:
                ended += [completion.status for completion in guest.wait()]
        while len(ended) < 150:
            ended += [completion.status for completion in guest.wait()]
        first = ended.index(IOERR)
        assert 40 <= first <= 82
        assert set(ended[:first]) == {OK}
        assert set(ended[82:]) == {IOERR}
        assert guest.do(OUT, 0, b"y" * BLOCK).status == IOERR
        assert guest.do(IN, 155 * 65536, nbytes=BLOCK).data == b"x" * BLOCK


def test_a_failed_data_write_changes_no_mapping(tmp_path: Path, memory_file: tuple[Path, int]) -> None:
    path, fd = memory_file
    with MemoryDaemon(path, tmp_path) as daemon, FrontEnd(daemon.socket_path) as guest:
        guest.write(0, b"x" * BLOCK)
        fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE)
        assert guest.do(OUT, 65536, b"y" * BLOCK).status == IOERR
        assert guest.do(IN, 65536, nbytes=BLOCK).data == bytes(BLOCK)
        assert guest.do(IN, 0, nbytes=BLOCK).status == OK


def options_of_ext4(tmp_path: Path) -> list[str]:
    device = tmp_path / "device"
    with device.open("wb") as file:
        file.truncate(6 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", device], check=True)
    return ["-o", "loop", str(device)]


@pytest.fixture(params=["tmpfs", "ext4"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB; of the two only ext4 can set space aside."""
    if os.geteuid():
        pytest.skip("mounting a small file system takes root")
    directory = tmp_path / "small"
    directory.mkdir()
    options = ["-o", "size=6m", "none"] if request.param == "tmpfs" else options_of_ext4(tmp_path)
    mounted = subprocess.run(["mount", "-t", request.param, *options, directory], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"this machine does not mount a {request.param}")
    yield directory
    subprocess.run(["umount", "-l", directory], check=True)


@pytest.mark.parametrize("small_disk", ["ext4"], indirect=True)
def test_what_cannot_be_written_ahead_of_a_sync_is_a_failed_sync(small_disk: Path) -> None:
    with (small_disk / "disk").open("w+b", buffering=0) as file:
        file.truncate(MIB)
        with Guest(file.fileno()) as guest:
            assert guest.ask_all([guest.post(OUT, data=bytes(512)), guest.post(FLUSH)])[1].status == OK
            assert guest.ask(OUT, data=b"x" * 512).status == OK
            ioctl(file, FS_IOC_SHUTDOWN, struct.pack("I", SHUTDOWN_WITHOUT_LOG))
            answers = guest.ask_all([guest.post(FLUSH) for _ in range(8)])
            assert [answer.status for answer in answers] == [IOERR] * 8
            assert guest.counters.syncs == 1
            guest.worker.stop()
            assert guest.sync_errors == [errno.EIO]


@pytest.mark.parametrize("small_disk", ["ext4"], indirect=True)
def test_space_that_is_not_enough_is_not_kept(small_disk: Path) -> None:
    async def reserve(file: HostFile, nbytes: int) -> None:
        await Resize(file, nbytes, reserve=True)

    with HostFile.open(str(small_disk / "file"), create=True) as file:
        run(reserve(file, 2 << 20))
        blocks = os.fstat(file.fd).st_blocks
        assert blocks * 512 >= 2 << 20
        with pytest.raises(OSError) as refusal:
            run(reserve(file, 20 << 20))
        assert refusal.value.errno == errno.ENOSPC
        assert (file.size(), os.fstat(file.fd).st_blocks) == (2 << 20, blocks)


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "accurate"])
def test_a_full_host_loses_nothing(small_disk: Path, lazy: bool) -> None:
    path, _ = make_image(small_disk, lazy=lazy)
    held = []
    with Daemon(path) as daemon, FrontEnd(daemon.socket_path) as guest:
        failures = 0
        for index in range(SIZE // 65536):
            status = guest.do(OUT, index * 65536, bytes([index % 255 + 1]) * 65536).status
            if status == OK:
                held.append(index)
            else:
                assert status == IOERR
                failures += 1
        assert failures
        assert len(held) > 40
        for index in held:
            assert guest.read(index * 65536, 65536) == bytes([index % 255 + 1]) * 65536
        guest.flush()
        guest.discard(held[0] * 65536, 65536)
        guest.discard(held[1] * 65536, 65536)
        guest.flush()
        guest.write(held[2] * 65536, b"again" * 13107 + b"!")
        daemon.stop()
    assert not read_header(path).is_dirty
    assert_not_corrupt(path)
    with qcow2.open(str(path)) as disk:
        assert disk.read(held[0] * 65536, 131072) == bytes(131072)
        for index in held[3:]:
            assert disk.read(index * 65536, 65536) == bytes([index % 255 + 1]) * 65536


def test_a_full_host_takes_writes_again_once_there_is_room(small_disk: Path) -> None:
    path, _ = make_image(small_disk, lazy=False)
    with Daemon(path) as daemon, FrontEnd(daemon.socket_path) as guest:
        filler = small_disk / "filler"
        filler.write_bytes(bytes(3 << 20))
        full = next(i for i in range(SIZE >> 16) if guest.do(OUT, i << 16, b"x" * 65536).status != OK)
        filler.unlink()
        guest.write(full << 16, b"y" * 65536)
        daemon.stop()
    assert_clean(path)


# Law 10: we are alone on the image


def test_nobody_repairs_an_image_under_the_daemon(tmp_path: Path) -> None:
    path, _ = make_image(tmp_path, lazy=True)
    with Daemon(path) as daemon, FrontEnd(daemon.socket_path) as guest:
        guest.write(0, b"x" * BLOCK)
        said = qemu_img("check", "-r", "all", path, check=False)
        assert said.returncode == 1
        assert "lock" in said.stderr
        with pytest.raises(OSError, match="lock"):
            qcow2.open(str(path), writable=True)


def test_two_daemons_share_a_base_but_not_an_overlay(tmp_path: Path) -> None:
    path, base = make_image(tmp_path, lazy=True, overlay=True)
    recipe = Recipe(size=SIZE, backing="base", extensions=[(BACKING_FORMAT, b"qcow2")])
    other = build(recipe, tmp_path / "b").path
    features = F_FLUSH | F_DISCARD | F_WRITE_ZEROES
    with Daemon(path) as one, Daemon(other) as two:
        with FrontEnd(one.socket_path, features=features) as first, FrontEnd(two.socket_path) as second:
            assert first.read(65536, BLOCK) == second.read(65536, BLOCK) == base[65536 : 65536 + BLOCK]
            with Daemon(path) as three:
                three.process.wait(TIMEOUT)
                assert three.process.returncode == 1


def test_the_dirty_bit_stays_for_the_next_front_end(tmp_path: Path) -> None:
    path, _ = make_image(tmp_path, lazy=True)
    with Daemon(path) as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            guest.write(0, b"x" * BLOCK)
        with FrontEnd(daemon.socket_path) as guest:
            guest.write(1 << 20, b"y" * BLOCK)
            assert read_header(path).is_dirty
            daemon.kill()
    assert qemu_check(path)[0] == 2
