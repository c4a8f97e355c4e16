"""Growing an open image: the extent map follows, and a failure on the way leaves the disk as it was."""

import errno

import pytest

from qcow2.driver import operation as op
from qcow2.driver.buffer import MemoryBuffer
from qcow2.judge.check import check
from tests.crash.driver import CrashDriver
from tests.crash.images import KINDS, check_image, open_image, read_all, start
from tests.engine import Bench, noise, open_again, set_up
from tests.pure.test_engine_extent_map import DATA, PUNT, TOP, ZERO, ask
from tests.pure.test_engine_faults import NEVER, Fault

pytestmark = pytest.mark.pure

CLUSTER = 512
SIZE = 10 * CLUSTER
LARGER = 9000 * CLUSTER  # an L1 table of three clusters


def grown(*, lazy: bool = False) -> Bench:
    bench = set_up(SIZE, lazy=lazy)
    bench.write(0, noise(SIZE))
    bench.image.set_slot(bench.file, TOP)
    bench.driver.run(bench.image.grow(LARGER))
    return bench


def test_the_extent_map_reaches_as_far_as_the_disk() -> None:
    bench = grown()
    bench.write(LARGER - CLUSTER, b"n" * CLUSTER)
    bench.content()
    assert ask(bench, LARGER - CLUSTER, CLUSTER).kind == DATA
    assert ask(bench, LARGER - 2 * CLUSTER, CLUSTER).kind == ZERO
    assert ask(bench, LARGER - CLUSTER, CLUSTER + 512).kind == PUNT
    assert ask(bench, 0, CLUSTER).kind == DATA


@pytest.mark.parametrize("lazy", [False, True], ids=["accurate", "lazy"])
def test_what_was_there_stays_and_the_old_l1_table_is_used_again(lazy: bool) -> None:
    bench = grown(lazy=lazy)
    expected = noise(SIZE).ljust(LARGER, b"\0")
    assert bench.content() == expected
    for index in range(2000):  # every hole of the file is filled
        bench.write(SIZE + index * CLUSTER, noise(CLUSTER, seed=index))
    written = b"".join(noise(CLUSTER, seed=index) for index in range(2000))
    assert bench.content() == (noise(SIZE) + written).ljust(LARGER, b"\0")
    bench.close()
    CrashDriver().run(check_image(bench.file))
    assert bench.reopened_content() == (noise(SIZE) + written).ljust(LARGER, b"\0")


def fail_growth(kind: str, fault: Fault) -> None:
    """Grow, with a fault; the disk is as before then, on the file too, or all new."""
    begun = start(kind)
    old, new = KINDS[kind].nsectors * 512, 5000 * 512
    file = begun.image.copy()
    driver = CrashDriver(fault=fault)
    image = driver.run(open_image(file, begun.backing))
    with fault.during():
        try:
            driver.run(image.grow(new))
        except OSError:
            assert fault.hit is not None
            assert image.size == old
        else:
            assert image.size == new
    expected = begun.contents.ljust(image.size, b"\0")
    assert driver.run(read_all(image)) == expected
    if fault.code == errno.ENOSPC:
        driver.run(image.grow(new))
        driver.run(image.write(0, MemoryBuffer(memoryview(bytearray(new)))))
        driver.run(image.close())
        driver.run(check_image(file))
        expected = bytes(new)
    again = driver.run(open_image(file, begun.backing))
    driver.run(check_image(file))
    allowed = [expected] if fault.code == errno.ENOSPC else [begun.contents, begun.contents.ljust(new, b"\0")]
    assert driver.run(read_all(again)) in allowed


@pytest.mark.sample(4)
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize("kind", ["small", "small-lazy", "longer-backing", "width-64", "snapshot-lazy"])
def test_each_operation_of_growing_may_fail(kind: str, code: int) -> None:
    count = Fault(code, NEVER)
    fail_growth(kind, count)
    assert len(count.seen) > 8
    for at in range(1, len(count.seen) + 1):
        fault = Fault(code, at)
        try:
            fail_growth(kind, fault)
        except (AssertionError, OSError) as error:
            raise AssertionError(f"operation {at}, {fault.hit}: {error!r}") from error


def test_tables_that_grow_find_room_in_a_file_that_cannot() -> None:
    """A block device has the length it has: what an image needs in a row is taken from its holes."""
    bench = set_up(64 * 512)
    bench.write(0, noise(64 * 512))
    bench.close()
    bench.file.resize(bench.file.size + 200 * 512)
    bench = open_again(bench, writable=True)
    end = bench.file.size

    def cannot_grow(operation: op.Operation) -> OSError | None:
        return OSError(errno.ENOSPC, "as told") if isinstance(operation, op.Resize) and operation.nbytes > end else None

    bench.breaker.fault = cannot_grow
    bench.driver.run(bench.image.grow(4096 * 512))
    bench.driver.run(bench.image.create_snapshot("one", 0))
    bench.write(4095 * 512, b"\1" * 512)
    bench.close()
    report = CrashDriver().run(check(bench.file))
    assert (report.check_errors, report.corruptions, report.leaks) == (0, 0, 0)
    assert bench.reopened_content() == noise(64 * 512) + bytes(4031 * 512) + b"\1" * 512


def test_without_room_anywhere_a_disk_does_not_grow_and_goes_on() -> None:
    bench = set_up(64 * 512)
    bench.write(0, noise(64 * 512))
    bench.breaker.fault = lambda operation: (
        OSError(errno.ENOSPC, "as told") if isinstance(operation, op.Resize) else None
    )
    with pytest.raises(OSError, match="No space left on device"):
        bench.driver.run(bench.image.grow(1 << 20))
    bench.breaker.fault = None
    bench.write(0, b"\2" * 512)
    bench.close()
    assert bench.reopened_content() == b"\2" * 512 + noise(64 * 512)[512:]
