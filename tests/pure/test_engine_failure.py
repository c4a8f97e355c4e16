"""Failures are final and honest (law 7): what failed is reported, what is not known is never claimed."""

import contextlib
import errno
import itertools
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from qcow2.driver import operation as op
from qcow2.driver.buffer import MemoryBuffer
from qcow2.engine.image import Image
from qcow2.error import NotTried
from qcow2.format import layout
from qcow2.judge.repair import repair
from qcow2.node.raw import RawImage
from tests.crash.driver import CrashDriver, SimulatedFile
from tests.engine import Bench, Breaker, Fault, noise, open_again, set_up

pytestmark = pytest.mark.pure

CLUSTER = 4096


def bench_with_data(*, lazy: bool = False, base: bytes | None = None) -> Bench:
    bench = set_up(64 * CLUSTER, cluster_bits=12, lazy=lazy, base=base)
    bench.write(0, b"\1" * CLUSTER)
    return bench


def failing(code: int, wanted: Callable[[op.Operation], bool]) -> Fault:
    return lambda operation: OSError(code, "as told") if wanted(operation) else None


def is_data(operation: op.Operation) -> bool:
    return isinstance(operation, op.Write) and operation.data


def is_metadata(operation: op.Operation) -> bool:
    return isinstance(operation, op.Write) and not operation.data


def is_sync(operation: op.Operation) -> bool:
    return isinstance(operation, op.Sync)


def refused(bench: Bench, guest_offset: int = CLUSTER) -> int:
    """The error number that a write ends with."""
    with pytest.raises(OSError) as caught:
        bench.write(guest_offset, b"\2" * CLUSTER)
    assert caught.value.errno is not None
    return caught.value.errno


def test_failed_data_write_fails_alone_and_maps_nothing() -> None:
    bench = bench_with_data()
    writes = bench.image.statistics.metadata_writes
    bench.breaker.fault = failing(errno.EIO, is_data)
    assert refused(bench) == errno.EIO
    assert bench.image.statistics.metadata_writes == writes + 1  # the cluster was counted back, nothing was linked
    bench.breaker.fault = None
    assert bench.read(CLUSTER, CLUSTER) == bytes(CLUSTER)
    bench.write(CLUSTER, b"\2" * CLUSTER)
    assert bench.read(CLUSTER, CLUSTER) == b"\2" * CLUSTER


def test_what_a_failed_data_write_left_behind_is_never_seen() -> None:
    """Half of the data is in the cluster when the write fails; the cluster is handed out again as zeros."""
    bench = bench_with_data()

    def spoil(operation: op.Operation) -> OSError | None:
        if is_data(operation):
            assert isinstance(operation, op.Write)
            bench.file.write(operation.host_offset, b"\7" * 512)
            return OSError(errno.EIO, "as told")
        return None

    for cluster in range(1, 9):
        bench.breaker.fault = spoil
        assert refused(bench, cluster * CLUSTER) == errno.EIO
        bench.breaker.fault = None
    for cluster in range(1, 40):
        bench.write(cluster * CLUSTER + 1024, b"\2" * 512)
        assert bench.read(cluster * CLUSTER, CLUSTER) == bytes(1024) + b"\2" * 512 + bytes(CLUSTER - 1536)


@pytest.mark.parametrize("kind", [is_metadata, is_sync])
def test_after_a_failed_metadata_write_or_sync_nothing_is_written(kind: Callable[[op.Operation], bool]) -> None:
    bench = bench_with_data(base=noise(64 * CLUSTER))
    bench.breaker.fault = failing(errno.EIO, kind)
    assert refused(bench) == errno.EIO
    bench.breaker.fault = None
    assert refused(bench) == errno.EIO
    assert refused(bench, 0) == errno.EIO
    assert bench.read(0, CLUSTER) == b"\1" * CLUSTER
    with pytest.raises(OSError):
        bench.driver.run(bench.image.flush())
    with pytest.raises(OSError):
        bench.close()


def is_dirty(bench: Bench) -> bool:
    word = bench.file.read(layout.HEADER_INCOMPATIBLE_OFFSET, 8)
    return bool(int.from_bytes(word, "big") & layout.Incompatible.DIRTY)


def test_dirty_bit_is_set_by_the_first_allocation_and_cleared_by_close_alone() -> None:
    bench = set_up(64 * CLUSTER, cluster_bits=12, lazy=True)
    assert not is_dirty(bench)
    bench.write(0, b"x")
    assert is_dirty(bench)
    bench.driver.run(bench.image.flush())
    assert is_dirty(bench)
    bench.close()
    assert not is_dirty(bench)


def test_close_after_a_failure_leaves_the_dirty_bit() -> None:
    bench = bench_with_data(lazy=True)
    bench.image.fail(OSError(errno.EIO, "the data plane saw a sync fail"))
    with pytest.raises(OSError):
        bench.close()
    assert is_dirty(bench)


def test_a_raw_disk_whose_sync_failed_is_not_closed_as_if_it_had_not() -> None:
    """The host tells of an error once: another sync succeeds."""
    breaker = Breaker()
    driver = CrashDriver(fault=breaker)
    image = driver.run(RawImage.open(SimulatedFile.parse("disk", bytes(CLUSTER)), writable=True))
    driver.run(image.write(0, MemoryBuffer(memoryview(b"lost"))))
    breaker.fault = failing(errno.EIO, is_sync)
    with pytest.raises(OSError):
        driver.run(image.flush())
    breaker.fault = None
    with pytest.raises(OSError, match="no more writes"):
        driver.run(image.close())


def test_no_space_to_grow_fails_the_request_and_loses_nothing() -> None:
    bench = bench_with_data()
    bench.breaker.fault = failing(errno.ENOSPC, lambda operation: isinstance(operation, op.Resize))
    codes = [attempt(bench, cluster) for cluster in range(64)]
    assert set(codes) == {0, errno.ENOSPC}
    bench.breaker.fault = None
    for cluster in range(64):
        bench.write(cluster * CLUSTER, bytes([cluster + 1]) * CLUSTER)
    bench.close()
    assert bench.reopened_content() == b"".join(bytes([cluster + 1]) * CLUSTER for cluster in range(64))


def test_file_that_cannot_grow_is_filled_to_its_last_hole() -> None:
    """A block device cannot grow at all; the holes are far apart, with many refcount blocks between them."""
    bench = set_up(6000 * 512)
    for cluster in range(5000):
        bench.write(cluster * 512, b"\1" * 512)
    bench.close()
    bench = open_again(bench, writable=True)
    bench.breaker.fault = failing(errno.ENOSPC, lambda operation: isinstance(operation, op.Resize))
    bench.driver.run(bench.image.discard(4000 * 512, 400 * 512))
    bench.driver.run(bench.image.discard(0, 512))
    for cluster in range(5000, 5300):
        bench.write(cluster * 512, b"\2" * 512)
    assert bench.read(5000 * 512, 300 * 512) == b"\2" * 300 * 512


@pytest.mark.parametrize("lazy", [False, True], ids=["accurate", "lazy"])
@pytest.mark.parametrize("kind", [is_data, is_metadata])
def test_no_space_for_a_write_fails_the_request_and_loses_nothing(
    kind: Callable[[op.Operation], bool], lazy: bool
) -> None:
    bench = set_up(64 * CLUSTER, cluster_bits=12, lazy=lazy, base=noise(64 * CLUSTER))
    bench.breaker.fault = failing(errno.ENOSPC, kind)
    assert refused(bench, 0) == errno.ENOSPC
    bench.breaker.fault = None
    bench.write(0, b"\1" * CLUSTER)
    bench.breaker.fault = failing(errno.ENOSPC, kind)
    assert refused(bench, 5 * CLUSTER) == errno.ENOSPC
    bench.breaker.fault = None
    expected = b"\1" * CLUSTER + noise(64 * CLUSTER)[CLUSTER:]
    assert bench.content() == expected
    bench.write(5 * CLUSTER, b"\2" * CLUSTER)
    bench.close()
    assert bench.reopened_content() == expected[: 5 * CLUSTER] + b"\2" * CLUSTER + expected[6 * CLUSTER :]


def attempt(bench: Bench, cluster: int) -> int:
    try:
        bench.write(cluster * CLUSTER, b"\2" * CLUSTER)
    except OSError as error:
        return error.errno or 0
    return 0


@pytest.mark.parametrize("kind", [is_data, is_metadata, is_sync])
@pytest.mark.parametrize("lazy", [False, True])
def test_what_was_never_tried_fails_its_request_alone(kind: Callable[[op.Operation], bool], lazy: bool) -> None:
    """A copy over a backing file: what it lacked memory for may be had again later."""
    bench = bench_with_data(lazy=lazy, base=noise(64 * CLUSTER))

    def untried(operation: op.Operation) -> OSError | None:
        return NotTried(errno.ENOMEM, "as told") if kind(operation) else None

    bench.breaker.fault = untried
    for cluster in range(1, 40):
        with contextlib.suppress(NotTried):
            bench.write(cluster * CLUSTER + 512, b"\2" * 512)
    bench.breaker.fault = None
    for cluster in range(1, 40):
        bench.write(cluster * CLUSTER + 512, b"\3" * 512)
    bench.driver.run(bench.image.flush())
    seen = bench.content()
    bench.close()
    assert bench.reopened_content() == seen
    assert all(seen[cluster * CLUSTER + 512 :][:512] == b"\3" * 512 for cluster in range(1, 40))


@pytest.mark.parametrize("goes_on", [True, False])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_first_write_whose_sync_was_not_tried_is_not_the_last(lazy: bool, goes_on: bool) -> None:
    """What must be stable before it, the dirty bit or a promise of others that it breaks, is said again."""
    for number in itertools.count(1):
        bench, seen = set_up(64 * CLUSTER, cluster_bits=12, lazy=lazy), 0
        bench.file.write(layout.HEADER_AUTOCLEAR_OFFSET + 7, b"\x80")
        bench = open_again(bench, writable=True)

        def untried(operation: op.Operation, number: int = number) -> OSError | None:
            nonlocal seen
            seen += is_sync(operation)
            return NotTried(errno.ECANCELED, "as told") if is_sync(operation) and seen == number else None

        bench.breaker.fault = untried
        with contextlib.suppress(NotTried):
            bench.write(0, b"\1" * CLUSTER)
        bench.breaker.fault = None
        if goes_on:
            bench.write(0, b"\2" * CLUSTER)
            assert is_dirty(bench) == lazy
            assert not bench.file.read(layout.HEADER_AUTOCLEAR_OFFSET + 7, 1)[0]
        bench.close()
        assert not is_dirty(bench)
        assert not goes_on or bench.reopened_content()[:CLUSTER] == b"\2" * CLUSTER
        if seen < number:
            break
    assert number > 2


@pytest.mark.parametrize("kind", [is_metadata, is_sync])
def test_after_memory_ran_out_in_the_middle_of_a_change_nothing_is_written(
    kind: Callable[[op.Operation], bool],
) -> None:
    """Be it under a program that goes on, and closes the disk: no repair would follow if that were clean."""
    bench = bench_with_data(lazy=True)
    bench.breaker.fault = lambda operation: MemoryError() if kind(operation) else None  # type: ignore[return-value]
    with pytest.raises((MemoryError, OSError)):  # by the request, or by what went on beside it
        bench.write(CLUSTER, b"\2" * (63 * CLUSTER))
    bench.breaker.fault = None
    assert refused(bench) == errno.EIO
    with pytest.raises(OSError):
        bench.close()
    assert is_dirty(bench)


def test_nothing_is_given_back_once_no_more_is_written() -> None:
    """What led to a cluster is gone from memory; whether it is from the file nobody knows after a failed write."""
    bench = bench_with_data()
    begun: list[op.Operation] = []

    def fail_meanwhile(operation: op.Operation) -> None:
        begun.append(operation)
        if isinstance(operation, op.Grace):
            bench.image._changes._stability.fail(OSError(errno.EIO, "as told"))

    bench.breaker.fault = fail_meanwhile
    with contextlib.suppress(OSError):
        bench.driver.run(bench.image.discard(0, CLUSTER))
        bench.close()
    kinds = [type(operation) for operation in begun]
    assert op.Grace in kinds
    assert not {op.Zero, op.Write} & set(kinds[kinds.index(op.Grace) :])


def punched_apart(error: BaseException) -> tuple[Bench, int]:
    """24 clusters let go of at once, none beside another, the third punch failing with *error*; how many there were."""
    bench, punches = set_up(64 * CLUSTER, cluster_bits=12), 0

    def fault(operation: op.Operation) -> Any:
        nonlocal punches
        punches += isinstance(operation, op.Zero)
        return error if isinstance(operation, op.Zero) and punches == 3 else None

    for number in range(24):
        for half in (0, 24):
            bench.write((half + number) * CLUSTER, b"\1" * CLUSTER)
    bench.breaker.fault = fault
    with contextlib.suppress(OSError):  # where no more is written
        bench.driver.run(bench.image.discard(0, 24 * CLUSTER))
    bench.driver.finish()
    return bench, punches


def test_a_punch_that_fails_lets_the_host_keep_the_space_and_nothing_else() -> None:
    bench, punches = punched_apart(OSError(errno.ENOMEM, "as told"))
    bench.close()
    bench.assert_sound()
    assert bench.reopened_content()[: 48 * CLUSTER] == bytes(24 * CLUSTER) + b"\1" * 24 * CLUSTER
    assert 3 <= punches < 24


def test_a_punch_that_raises_ends_all_writes_and_the_others_end_first() -> None:
    bench, punches = punched_apart(MemoryError())
    assert refused(bench) == errno.EIO
    with pytest.raises(OSError):
        bench.close()
    assert 3 <= punches < 24


SNAPSHOT_CHANGES: dict[str, Callable[[Image], Coroutine[Any, Any, Any]]] = {
    "create": lambda image: image.create_snapshot("two", 0),
    "apply": lambda image: image.apply_snapshot("one"),
    "delete": lambda image: image.delete_snapshot("one"),
}


def disk_of(bench: Bench) -> tuple[list[str], bytes]:
    return [snapshot.name for snapshot in bench.driver.run(bench.image.snapshots())], bench.content()


@pytest.mark.parametrize("what", SNAPSHOT_CHANGES)
def test_a_change_of_snapshots_is_told_as_failed_only_if_it_was_not_made(what: str) -> None:
    """What is left to do once the header says it, such as letting go of the old, is a repair's at worst."""
    for number in itertools.count(1):
        bench, seen = set_up(64 * CLUSTER, cluster_bits=12), 0
        bench.write(0, noise(8 * CLUSTER, 1))
        bench.driver.run(bench.image.create_snapshot("one", 0))
        bench.write(0, noise(4 * CLUSTER, 2))
        before = disk_of(bench)

        def untried(operation: op.Operation, number: int = number) -> OSError | None:
            nonlocal seen
            counts = isinstance(operation, op.Read | op.Write | op.Sync | op.Size)
            seen += counts
            return NotTried(errno.ENOMEM, "as told") if counts and seen == number else None

        bench.breaker.fault, is_told = untried, True
        try:
            bench.driver.run(SNAPSHOT_CHANGES[what](bench.image))
        except NotTried:
            is_told = False
        bench.breaker.fault = None
        assert (disk_of(bench) != before) == is_told, f"operation {number}"
        if seen < number:
            break
        with contextlib.suppress(OSError):
            bench.close()
        bench.driver.run(repair(bench.file))
        bench.assert_sound()
    assert number > 15
