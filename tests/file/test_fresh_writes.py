"""Writes to clusters that hold nothing yet, which the data plane serves alone: correct, one cluster each, honest."""

import json
import random
import resource
from pathlib import Path

import pytest

import qcow2
from tests.builder import Recipe, build
from tests.builder.record import LAZY_REFCOUNTS
from tests.calm import assert_few_in_python, calm
from tests.frontend import IOERR, OK, OUT, FrontEnd
from tests.load import Load
from tests.oracle import assert_clean
from tests.program import Daemon, qcow2_tool_ok

SIZE = 256 << 20
CLUSTER = 65536
BLOCK = 4096


def make_image(directory: Path, *, lazy: bool = False, cluster_bits: int = 16) -> Path:
    recipe = Recipe(size=SIZE, cluster_bits=cluster_bits, compatible=LAZY_REFCOUNTS if lazy else 0)
    return build(recipe, directory / "a").path


def stop(daemon: Daemon) -> dict[str, int]:
    """End the daemon cleanly -> its counters."""
    daemon.stop()
    assert daemon.process.stdout is not None
    told: dict[str, int] = json.loads(daemon.process.stdout.read())
    return told


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "accurate"])
@pytest.mark.parametrize("cache", ["writeback", "writethrough", "none", "directsync"])
@calm
def test_few_fresh_writes_enter_python(tmp_path: Path, lazy: bool, cache: str) -> None:
    path = make_image(tmp_path, lazy=lazy)
    order = random.Random(3).sample(range(SIZE // CLUSTER), 500)
    with Daemon(path, "--stats", f"--cache={cache}") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            for cluster in order:
                guest.write(cluster * CLUSTER + BLOCK, cluster.to_bytes(2, "big") * (BLOCK // 2))
        told = stop(daemon)
    assert_few_in_python(told, 100)
    assert told["clusters_allocated"] == 500
    assert told["metadata_writes"] > 500
    assert_clean(path)
    with qcow2.open(str(path)) as disk:
        for cluster in order:
            expected = bytes(BLOCK) + cluster.to_bytes(2, "big") * (BLOCK // 2) + bytes(BLOCK)
            assert disk.read(cluster * CLUSTER, 3 * BLOCK) == expected


def test_adjacent_writes_at_once_share_one_new_cluster(tmp_path: Path) -> None:
    path = make_image(tmp_path, lazy=True)
    blocks = list(range(16 * 64))
    with Daemon(path, "--stats") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            guest.write(SIZE - CLUSTER, b"e" * BLOCK)
            for start in range(0, len(blocks), 32):
                for block in blocks[start : start + 32]:
                    guest.submit(OUT, block * BLOCK, block.to_bytes(2, "big") * (BLOCK // 2))
                statuses: list[int] = []
                while len(statuses) < 32:
                    statuses += [done.status for done in guest.wait()]
                assert statuses == [OK] * 32
        told = stop(daemon)
    assert told["clusters_allocated"] == 65
    with qcow2.open(str(path)) as disk:
        assert disk.read(0, len(blocks) * BLOCK) == b"".join(
            block.to_bytes(2, "big") * (BLOCK // 2) for block in blocks
        )


@pytest.mark.parametrize("lazy", ["on", "off"])
def test_no_file_is_longer_than_was_measured_because_it_is_open(tmp_path: Path, lazy: str) -> None:
    path, options = tmp_path / "a", f"lazy_refcounts={lazy},cluster_size=4k"
    measured = json.loads(qcow2_tool_ok("measure", "-O", "qcow2", "--output=json", "-o", options, "--size", "8M"))
    qcow2_tool_ok("create", "-q", "-o", options, path, "8M")
    with Daemon(path) as daemon, FrontEnd(daemon.socket_path) as guest:
        for number in random.Random(3).sample(range(128), 128):
            guest.write(number * 16 * BLOCK, b"x" * (16 * BLOCK))
        assert path.stat().st_size <= measured["fully-allocated"]


@calm
def test_one_write_over_several_new_clusters(tmp_path: Path) -> None:
    path = make_image(tmp_path, cluster_bits=12)
    data = random.Random(1).randbytes(10 * BLOCK)
    with Daemon(path, "--stats") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            guest.write(0, b"first" + bytes(507))
            for start in range(1, 200, 12):
                guest.write(start * BLOCK + 512, data)
        told = stop(daemon)
    assert_few_in_python(told, 17)
    assert_clean(path)
    with qcow2.open(str(path)) as disk:
        for start in range(1, 200, 12):
            assert disk.read(start * BLOCK, 11 * BLOCK) == bytes(512) + data + bytes(BLOCK - 512)


@pytest.mark.parametrize("cluster_bits", [12, 16])
def test_writes_race_with_discards_and_zeroes_of_the_same_clusters(tmp_path: Path, cluster_bits: int) -> None:
    path = make_image(tmp_path, lazy=True, cluster_bits=cluster_bits)
    with Daemon(path) as daemon:
        with FrontEnd(daemon.socket_path, queues=2) as guest:
            load = Load(guest, 128, seed=cluster_bits, depth=32, base=bytes(SIZE), zeroes=True)
            load.run(3000)
            load.drain()
        daemon.stop()
    with qcow2.open(str(path)) as disk:
        load.verify(disk)
    assert_clean(path)


def test_data_that_the_host_does_not_take_fails_that_request_alone(tmp_path: Path) -> None:
    path = make_image(tmp_path)
    with Daemon(path) as daemon:
        pid = daemon.process.pid
        with FrontEnd(daemon.socket_path) as guest:
            for cluster in range(8):  # the stock has some more by then
                guest.write(cluster * CLUSTER, b"g" * BLOCK)
            guest.flush()  # or metadata that is under way does not fail alone
            before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (CLUSTER, before[1]))
            assert guest.do(OUT, 9 * CLUSTER, b"f" * BLOCK).status == IOERR
            resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
            assert guest.read(9 * CLUSTER, BLOCK) == bytes(BLOCK)
            for cluster in range(9, 40):
                guest.write(cluster * CLUSTER, b"h" * BLOCK)
            guest.flush()
        daemon.stop()
    assert_clean(path)
    with qcow2.open(str(path)) as disk:
        assert disk.read(9 * CLUSTER, BLOCK) == b"h" * BLOCK
