"""Discards in quick succession, most of which the data plane serves alone while the reaper is at work."""

import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

import qcow2
from tests.builder import Recipe, build
from tests.builder.record import LAZY_REFCOUNTS
from tests.calm import assert_few_in_python, calm
from tests.frontend import DISCARD, OK, WRITE_ZEROES, FrontEnd
from tests.oracle import assert_clean
from tests.program import Daemon

CLUSTER = 4096
NCLUSTERS = 3000
SIZE = NCLUSTERS * CLUSTER
HALF = CLUSTER // 2


def mark(cluster: int) -> bytes:
    """What a cluster begins with."""
    return cluster.to_bytes(2, "big") * 256


def make_image(directory: Path, *, lazy: bool = False) -> Path:
    recipe = Recipe(size=SIZE, cluster_bits=12, compatible=LAZY_REFCOUNTS if lazy else 0)
    for cluster in range(NCLUSTERS):
        recipe.data(cluster, mark(cluster))
    return build(recipe, directory / "a").path


def segment(cluster: int, *, unmap: bool = False) -> bytes:
    return struct.pack("<QII", cluster * CLUSTER // 512, CLUSTER // 512, int(unmap))


def statuses(guest: FrontEnd, requests: Iterator[tuple[int, bytes]]) -> Iterator[int]:
    """How *requests*, kept 32 in flight, end."""
    in_flight = 0
    for kind, data in requests:
        guest.submit(kind, 0, data)
        in_flight += 1
        if in_flight == 32:
            done = [completion.status for completion in guest.wait()]
            in_flight -= len(done)
            yield from done
    while in_flight:
        done = [completion.status for completion in guest.wait()]
        in_flight -= len(done)
        yield from done


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "accurate"])
@pytest.mark.parametrize("cache", ["writeback", "writethrough"])
@calm
def test_most_of_many_discards_do_not_enter_python(tmp_path: Path, lazy: bool, cache: str) -> None:
    path = make_image(tmp_path, lazy=lazy)
    order = random.Random(4).sample(range(NCLUSTERS), 2000)
    zeroed = set(order[::5])
    with Daemon(path, "--stats", f"--cache={cache}") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            requests = (
                (WRITE_ZEROES, segment(cluster, unmap=True)) if cluster in zeroed else (DISCARD, segment(cluster))
                for cluster in order
            )
            assert list(statuses(guest, requests)) == [OK] * 2000
            for cluster in order[:100]:
                assert guest.read(cluster * CLUSTER, CLUSTER) == bytes(CLUSTER)
            for cluster in order[100:200]:  # some get a cluster that has just become free
                guest.write(cluster * CLUSTER + HALF, b"w" * HALF)
        daemon.stop()
        assert daemon.process.stdout is not None
        told = json.loads(daemon.process.stdout.read())
    assert_few_in_python(told, 1000)
    assert told["metadata_writes"] >= 2000
    assert_clean(path)
    gone, written = set(order), set(order[100:200])
    with qcow2.open(str(path)) as disk:
        for cluster in range(NCLUSTERS):
            seen = disk.read(cluster * CLUSTER, CLUSTER)
            assert seen[:512] == (bytes(512) if cluster in gone else mark(cluster))
            assert seen[HALF:] == (b"w" * HALF if cluster in written else bytes(HALF))
