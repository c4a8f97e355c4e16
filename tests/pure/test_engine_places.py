"""Places for new data, and discards: what the extent map does for the data plane is what the engine would have done."""

import contextlib
import errno
from collections.abc import Callable
from typing import Any

import pytest

from qcow2.driver.operation import Grace, Operation, Sync, Write
from qcow2.judge.check import check
from qcow2.native import ffi, lib
from tests.engine import Bench, noise, open_again, set_up
from tests.extents import BUSY, KEEP, NAMED, SPOILED, UNMAP, UNTOUCHED, Plane

pytestmark = pytest.mark.pure

CLUSTER = 4096
SIZE = 1024 * CLUSTER  # two L2 tables
HELD = 48  # EXTENT_HELD


class BenchPlane(Plane):
    """The plane of a bench."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench.driver, bench.image, bench.file, bench.base)

    def take(self, guest_offset: int, nbytes: int = CLUSTER) -> Any:
        return super().take(guest_offset, nbytes)


def started(**options: Any) -> tuple[Bench, BenchPlane]:
    """An image whose first cluster the engine has written: a table is there, and clusters are in stock."""
    bench = set_up(SIZE, cluster_bits=12, **options)
    plane = BenchPlane(bench)
    bench.write(0, noise(CLUSTER))
    return bench, plane


def faults(bench: Bench) -> tuple[int, int]:
    """What `check` says of the file: (corruptions, leaks)."""
    report = bench.driver.run(check(bench.file))
    return report.corruptions, report.leaks


@pytest.mark.parametrize("lazy", [False, True])
def test_what_a_plane_links_is_the_disk(lazy: bool) -> None:
    bench, plane = started(lazy=lazy)
    expected = bytearray(SIZE)
    expected[:CLUSTER] = noise(CLUSTER)
    served = 0
    for number in range(1, 200):
        where, data = number * 7 % 500 * CLUSTER + 100, noise(1000, seed=number)
        if plane.write(where, data):
            served += 1
        else:
            bench.write(where, data)
        expected[where : where + 1000] = data
    assert served > 150
    assert bench.content() == expected
    bench.close()
    assert bench.reopened_content() == expected
    assert faults(bench) == (0, 0)
    assert bench.image.statistics.clusters_allocated == 200


def test_nothing_is_taken_before_links_are_allowed() -> None:
    bench = set_up(SIZE, cluster_bits=12, lazy=True)
    plane = BenchPlane(bench)
    assert plane.take(0) is None, "no table, and no dirty bit"
    bench.write(0, noise(CLUSTER))
    assert plane.take(CLUSTER) is not None
    assert plane.take(SIZE // 2) is None, "another table, which is not there"


def test_a_second_write_finds_the_first_ones_cluster() -> None:
    bench, plane = started()
    assert plane.write(CLUSTER, noise(512))
    assert plane.take(CLUSTER + 512, 512) is None
    assert bench.read(CLUSTER, 512) == noise(512)


def test_a_place_lies_within_one_cluster() -> None:
    _, plane = started()
    assert plane.take(CLUSTER + 1, CLUSTER) is None
    assert plane.take(CLUSTER + 1, CLUSTER - 1) is not None


def test_a_plane_keeps_off_clusters_that_the_engine_has_locked() -> None:
    bench, plane = started()
    seen: list[tuple[bool, bool]] = []

    def look(operation: Operation) -> None:
        if isinstance(operation, Write) and operation.data:
            locked, free = plane.take(5 * CLUSTER), plane.take(9 * CLUSTER)
            seen.append((locked is not None, free is not None))
            plane.conclude(free, UNTOUCHED)

    bench.breaker.fault = look
    bench.write(4 * CLUSTER, noise(3 * CLUSTER))
    bench.breaker.fault = None
    assert seen == [(False, True)]
    assert plane.take(8 * CLUSTER) is not None


def test_a_plane_keeps_off_locked_clusters_alone_however_many_there_are() -> None:
    bench, plane = started()
    l2map = ffi.cast("struct l2map *", bench.image.extent_map.context_address)
    locked = [(number * 40, number * 40) for number in range(500)]  # of clusters far apart
    locked += [(200, 231), (1024, 1056), (1 << 20, 1 << 40)]  # narrow, a block at least, everything
    for first, last in locked:
        lib.l2map_lock(l2map, first, last)
    assert plane.take(CLUSTER) is None, "everything may be locked"
    lib.l2map_unlock(l2map, *locked.pop())
    place = plane.take(CLUSTER)
    assert place is not None
    plane.conclude(place, UNTOUCHED)
    assert [plane.take(cluster * CLUSTER) for cluster in (40, 80, 215, 231, 1024, 1056, 1057)] == [None] * 7
    for first, last in locked:
        lib.l2map_unlock(l2map, first, last)
    assert plane.take(40 * CLUSTER) is not None


def test_a_stock_that_runs_low_sends_one_write_to_the_engine_and_an_empty_one_all() -> None:
    _, plane = started()
    answers = [plane.take(cluster * CLUSTER) is not None for cluster in range(1, 500)]
    assert answers.index(False) > 0
    last = len(answers) - answers[::-1].index(True)
    assert answers[:last].count(False) == 1
    assert not any(answers[last:])


def test_the_engine_fills_the_stock_again() -> None:
    bench, plane = started()
    while plane.take(CLUSTER):
        pass
    while plane.take(CLUSTER):
        pass
    bench.write(2 * CLUSTER, noise(CLUSTER))
    assert plane.take(CLUSTER) is not None


def test_an_untouched_place_is_the_next_one() -> None:
    _, plane = started()
    place = plane.take(CLUSTER)
    plane.conclude(place, UNTOUCHED)
    again = plane.take(2 * CLUSTER)
    assert again.host_offset == place.host_offset


def test_a_spoiled_place_is_reaped() -> None:
    bench, plane = started()
    place = plane.take(CLUSTER)
    bench.file.write(place.host_offset, noise(100))
    assert plane.conclude(place, SPOILED) == 0
    bench.write(2 * CLUSTER, noise(CLUSTER))
    assert bench.read(CLUSTER, CLUSTER) == bytes(CLUSTER)
    bench.close()
    assert faults(bench) == (0, 0)


def test_a_place_whose_entry_may_be_in_the_file_is_given_to_nobody() -> None:
    """A request that the engine serves already takes over what was spoiled, before one comes that asks for errors."""
    bench, plane = started()
    place = plane.take(CLUSTER)
    content = noise(CLUSTER)
    bench.file.write(place.host_offset, content)
    assert plane.conclude(place, SPOILED, -errno.EIO) == -errno.EIO
    with contextlib.suppress(OSError):
        bench.driver.run(bench.image._changes._space.allocator.allocate(1))
    with contextlib.suppress(OSError):
        bench.close()
    assert bench.file.read(place.host_offset, CLUSTER) == content


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_an_entry_without_space_loses_nothing(number: int) -> None:
    bench, plane = started()
    assert plane.conclude(plane.take(CLUSTER), SPOILED, -number) == 0
    bench.write(CLUSTER, noise(CLUSTER))
    bench.close()
    assert bench.reopened_content()[CLUSTER : 2 * CLUSTER] == noise(CLUSTER)
    assert faults(bench) == (0, 0)


def test_an_entry_that_could_not_be_written_ends_all_writes() -> None:
    bench, plane = started()
    assert plane.conclude(plane.take(CLUSTER), SPOILED, -errno.EIO) == -errno.EIO
    assert plane.take(2 * CLUSTER) is None
    with pytest.raises(OSError, match="no more writes"):
        bench.write(0, noise(CLUSTER, seed=1))
    assert bench.read(0, CLUSTER) == noise(CLUSTER)
    with pytest.raises(OSError, match="no more writes"):
        bench.close()


def test_a_failed_image_has_no_places() -> None:
    bench, plane = started()
    bench.image.fail(OSError(errno.EIO, "as told"))
    assert plane.take(CLUSTER) is None


def overlaid(base: bytes | None = None) -> tuple[Bench, BenchPlane]:
    """An image over a full base, with a link log that the engine has begun."""
    return started(lazy=True, base=noise(SIZE, seed=9) if base is None else base, log_capacity=64)


def test_a_cluster_that_the_backing_file_fills_half_is_the_engines() -> None:
    _, plane = overlaid(base=noise(9 * CLUSTER + 512))
    assert plane.take(8 * CLUSTER) is not None
    assert plane.take(9 * CLUSTER) is None


def test_a_plane_copies_what_its_bytes_do_not_cover() -> None:
    bench, plane = overlaid()
    expected = bytearray(noise(SIZE, seed=9))
    expected[:CLUSTER] = noise(CLUSTER)
    served = 0
    for number in range(1, 200):
        nbytes = CLUSTER if number % 5 == 0 else 1000
        where = number * 7 % 500 * CLUSTER + (0 if nbytes == CLUSTER else 100)
        data = noise(nbytes, seed=number)
        if plane.write(where, data):
            served += 1
        else:
            bench.write(where, data)
        if number % 50 == 0:
            bench.driver.run(bench.image.flush())
        expected[where : where + nbytes] = data
    assert served > 150
    assert bench.content() == expected
    bench.close()
    assert bench.reopened_content() == expected
    assert faults(bench) == (0, 0)
    assert bench.image.statistics.copies == 200


def test_a_link_of_a_plane_waits_for_a_flush() -> None:
    bench, plane = overlaid()
    assert plane.write(CLUSTER, noise(CLUSTER, seed=1))
    assert bench.file.memory.content, "in the log"
    assert bench.reopened_content()[CLUSTER : 2 * CLUSTER] != noise(CLUSTER, seed=1), "and not in the file"
    bench.driver.run(bench.image.flush())
    assert bench.reopened_content()[CLUSTER : 2 * CLUSTER] == noise(CLUSTER, seed=1)


def test_a_full_log_is_the_engines_to_empty() -> None:
    bench, plane = overlaid()
    served = [plane.write(cluster * CLUSTER, noise(CLUSTER, seed=cluster)) for cluster in range(1, 100)]
    first_refused = served.index(False)
    assert not any(served[first_refused:])
    bench.driver.run(bench.image.settle())
    bench.write(first_refused * CLUSTER, noise(CLUSTER))
    assert plane.write(200 * CLUSTER, noise(CLUSTER))


def test_a_slice_that_is_loaded_again_shows_what_waits_in_the_log() -> None:
    """The L2 cache, at its smallest, gives the slice up before the engine has heard of the link."""
    nslices = 80
    size = nslices * 512 * CLUSTER
    bench = set_up(size, cluster_bits=12, lazy=True, base=noise(2 * CLUSTER, seed=9), log_capacity=64, cache_size=0)
    plane = BenchPlane(bench)
    bench.write(0, noise(512))
    assert plane.write(CLUSTER, noise(512, seed=1))
    for number in range(1, nslices):
        bench.write(number * 512 * CLUSTER, noise(512, seed=2))
    assert bench.read(CLUSTER, 512) == noise(512, seed=1)


def test_nothing_waits_in_a_log_that_is_closed() -> None:
    bench, plane = overlaid()
    assert plane.write(CLUSTER, noise(CLUSTER, seed=1))
    bench.close()
    assert plane.take(2 * CLUSTER) is None
    assert bench.reopened_content()[CLUSTER : 2 * CLUSTER] == noise(CLUSTER, seed=1)


def test_a_table_that_a_snapshot_may_share_is_the_engines() -> None:
    bench, _ = started()
    bench.close()
    l1 = bench.image.header.record.l1_table_offset
    entry = int.from_bytes(bench.file.read(l1, 8), "big")
    bench.file.write(l1, (entry & ~(1 << 63)).to_bytes(8, "big"))
    bench = open_again(bench, writable=True)
    plane = BenchPlane(bench)
    bench.write(SIZE // 2, noise(CLUSTER))
    bench.read(0, CLUSTER)
    assert plane.take(SIZE // 2 + CLUSTER) is not None
    assert plane.take(CLUSTER) is None
    answers: list[bool] = []
    cleared_beside_the_reaper(bench, lambda: answers.append(plane.clear(0, CLUSTER)), where=SIZE // 2)
    assert answers == [False]


def test_stable_before_it_is_handed_out() -> None:
    """Nothing has to be synced between what the plane writes: a stock begins with a sync of its own."""
    bench, plane = started()
    syncs: list[Operation] = []
    bench.breaker.fault = lambda operation: syncs.append(operation) if isinstance(operation, Sync) else None
    assert plane.write(CLUSTER, noise(CLUSTER))
    assert syncs == []


@pytest.mark.parametrize("syncs", [False, True])
def test_without_a_log_a_copy_is_named_in_the_table_after_a_sync(syncs: bool) -> None:
    bench, plane = started(lazy=True, base=noise(SIZE, seed=9))
    plane.syncs = syncs
    place = plane.take(CLUSTER, 512)
    assert place.after_sync
    assert place.memory == ffi.NULL
    assert plane.conclude(place, UNTOUCHED) == 0
    assert plane.write(CLUSTER, noise(512, seed=1))
    assert (
        bench.content()[CLUSTER : 2 * CLUSTER] == noise(512, seed=1) + noise(SIZE, seed=9)[CLUSTER + 512 : 2 * CLUSTER]
    )
    bench.close()
    assert faults(bench) == (0, 0)


def test_who_syncs_anyway_needs_no_log_but_where_links_wait() -> None:
    bench, plane = overlaid()
    bench.driver.run(bench.image.flush())
    plane.syncs = True
    early = plane.take(CLUSTER, 512)
    assert early.after_sync
    assert plane.conclude(early, UNTOUCHED) == 0
    plane.syncs = False
    assert plane.write(2 * CLUSTER, noise(512))
    plane.syncs = True
    late = plane.take(CLUSTER, 512)
    assert not late.after_sync, "a link of the same slice waits, and would be written over this one's"
    assert plane.conclude(late, UNTOUCHED) == 0


# ---- places that are held


def test_a_place_that_is_held_keeps_others_off_its_cluster_alone() -> None:
    bench, plane = started()
    place = plane.take(CLUSTER, 512)
    plane.hold(place)
    assert (plane.take(CLUSTER + 512, 512), plane.answer) == (None, BUSY)
    assert not plane.clear(CLUSTER, CLUSTER, KEEP)
    assert plane.write(2 * CLUSTER, noise(512, seed=2))
    assert bench.read(CLUSTER, 512) == bytes(512)
    assert plane.land(place, noise(512))
    assert plane.write(CLUSTER + 512, noise(512, seed=3)), "it is data now"
    assert bench.read(CLUSTER, 1024) == noise(512) + noise(512, seed=3)
    assert bench.read(2 * CLUSTER, 512) == noise(512, seed=2)
    bench.close()
    assert faults(bench) == (0, 0)


@pytest.mark.parametrize("ends", [NAMED, SPOILED])
def test_the_engine_waits_for_a_place_that_is_held(ends: int) -> None:
    """It finds the cluster that has got a name meanwhile, or none, and never gives it a second one."""
    bench, plane = started()
    place = plane.take(CLUSTER, 512)
    plane.hold(place)
    waited: list[Operation] = []

    def look(operation: Operation) -> None:
        if isinstance(operation, Write) and operation.data:
            assert waited, "the engine did not wait"
        if isinstance(operation, Grace) and not waited:
            waited.append(operation)
            assert plane.land(place, noise(512)) if ends == NAMED else plane.conclude(place, SPOILED) == 0

    bench.breaker.fault = look
    bench.write(CLUSTER + 512, noise(512, seed=3))
    bench.breaker.fault = None
    assert bench.read(CLUSTER, 1024) == (noise(512) if ends == NAMED else bytes(512)) + noise(512, seed=3)
    bench.close()
    assert bench.image.statistics.clusters_allocated == 2
    assert faults(bench) == (0, 0)


def test_the_slice_of_a_place_that_is_held_stays_in_memory() -> None:
    bench, plane = started()
    place = plane.take(CLUSTER)
    plane.hold(place)
    l2map = ffi.cast("struct l2map *", bench.image.extent_map.context_address)
    for number in range(2, 500):
        lib.l2map_load(l2map, number, bytes(4096))
    assert plane.land(place, noise(CLUSTER))
    assert bench.read(CLUSTER, CLUSTER) == noise(CLUSTER)


def test_a_place_whose_slice_is_not_in_memory_any_more_is_given_up() -> None:
    bench, plane = started()
    place = plane.take(CLUSTER)
    plane.hold(place)
    l2map = ffi.cast("struct l2map *", bench.image.extent_map.context_address)
    assert lib.l2map_resize(l2map, SIZE, 64) == 0  # and is empty
    assert not plane.land(place, noise(CLUSTER))
    assert bench.read(CLUSTER, CLUSTER) == bytes(CLUSTER)
    bench.close()
    assert faults(bench) == (0, 0)


def test_no_more_places_are_held_than_can_come_to_be_spoiled() -> None:
    bench, plane = started(lazy=True)
    places = []
    for cluster in range(1, 400):
        if len(places) == HELD or (place := plane.take(cluster * CLUSTER)) is None:
            continue
        plane.hold(place)
        places.append(place)
    assert len(places) == HELD
    for place in places:
        assert plane.conclude(place, SPOILED) == 0
    bench.write(0, noise(CLUSTER))
    bench.close()
    assert faults(bench) == (0, 0)


# ---- discards


def cleared_beside_the_reaper(bench: Bench, act: Callable[[], None], *, where: int = 0) -> None:
    """Have the engine discard the cluster *where*, and *act* once while the reaper is at work."""
    left = [act]

    def look(operation: Operation) -> None:
        if isinstance(operation, Grace) and left:
            left.pop()()

    bench.breaker.fault = look
    bench.driver.run(bench.image.discard(where, CLUSTER))
    bench.breaker.fault = None
    assert not left


def filled(nclusters: int = 16, **options: Any) -> tuple[Bench, BenchPlane]:
    bench, plane = started(**options)
    bench.write(0, noise(nclusters * CLUSTER))
    return bench, plane


@pytest.mark.parametrize("lazy", [False, True])
def test_what_a_plane_clears_reads_as_zeros_and_is_free(lazy: bool) -> None:
    bench, plane = filled(lazy=lazy)
    answers: list[bool] = []

    def act() -> None:
        answers.append(plane.clear(3 * CLUSTER, 2 * CLUSTER))
        answers.append(plane.clear(7 * CLUSTER, CLUSTER, UNMAP))

    cleared_beside_the_reaper(bench, act)
    assert answers == [True, True]
    expected = bytearray(SIZE)
    expected[: 16 * CLUSTER] = noise(16 * CLUSTER)
    for cluster in (0, 3, 4, 7):
        expected[cluster * CLUSTER : (cluster + 1) * CLUSTER] = bytes(CLUSTER)
    assert bench.content() == expected
    assert bench.image.statistics.clusters_freed == 4
    bench.close()
    assert bench.reopened_content() == expected
    assert faults(bench) == (0, 0)


def test_a_plane_clears_nothing_while_the_reaper_rests() -> None:
    bench, plane = filled()
    assert not plane.clear(3 * CLUSTER, CLUSTER)
    cleared_beside_the_reaper(bench, lambda: None)
    assert not plane.clear(3 * CLUSTER, CLUSTER)
    assert bench.read(3 * CLUSTER, CLUSTER) == noise(16 * CLUSTER)[3 * CLUSTER : 4 * CLUSTER]


def test_clusters_that_are_not_covered_stay() -> None:
    bench, plane = filled()
    answers: list[bool] = []

    def act() -> None:
        answers.append(plane.clear(3 * CLUSTER + 512, CLUSTER - 512))
        answers.append(plane.clear(4 * CLUSTER + 512, 2 * CLUSTER))
        answers.append(plane.clear(8 * CLUSTER, CLUSTER + 512, UNMAP))

    cleared_beside_the_reaper(bench, act)
    assert answers == [True, True, False]
    expected = bytearray(noise(16 * CLUSTER))
    for cluster in (0, 5):
        expected[cluster * CLUSTER : (cluster + 1) * CLUSTER] = bytes(CLUSTER)
    assert bench.read(0, 16 * CLUSTER) == expected


def test_the_last_cluster_of_a_disk_may_be_partial() -> None:
    size = 16 * CLUSTER + 512
    bench = set_up(size, cluster_bits=12)
    plane = BenchPlane(bench)
    bench.write(0, noise(size))
    answers: list[bool] = []
    cleared_beside_the_reaper(bench, lambda: answers.append(plane.clear(16 * CLUSTER, 512, UNMAP)))
    assert answers == [True]
    assert bench.read(15 * CLUSTER, CLUSTER + 512) == noise(size)[15 * CLUSTER : 16 * CLUSTER] + bytes(512)


def test_zeros_need_no_change() -> None:
    bench, plane = filled()
    before = bench.image.statistics.metadata_writes
    answers: list[bool] = []
    cleared_beside_the_reaper(bench, lambda: answers.append(plane.clear(20 * CLUSTER, 100 * CLUSTER)))
    assert answers == [True]
    assert bench.image.statistics.metadata_writes == before + 2, "what the engine discarded: its entry, its count"


def test_an_engine_that_holds_a_cluster_clears_it_itself() -> None:
    bench, plane = filled()
    answers: list[bool] = []

    def look(operation: Operation) -> None:
        if isinstance(operation, Write) and not answers:
            answers.extend([plane.clear(5 * CLUSTER, CLUSTER), plane.clear(9 * CLUSTER, CLUSTER)])

    def act() -> None:
        bench.breaker.fault = look
        bench.driver.spawn(bench.image.discard(4 * CLUSTER, 3 * CLUSTER), lambda task: None)

    cleared_beside_the_reaper(bench, act)
    assert answers == [False, True]


def test_two_tables_are_the_engines() -> None:
    bench, plane = filled()
    bench.write(511 * CLUSTER, noise(2 * CLUSTER))
    answers: list[bool] = []

    def act() -> None:
        answers.append(plane.clear(511 * CLUSTER, 2 * CLUSTER))
        answers.append(plane.clear(511 * CLUSTER, CLUSTER))

    cleared_beside_the_reaper(bench, act)
    assert answers == [False, True]


def test_what_a_backing_file_shows_is_hidden() -> None:
    """That takes no cluster away, so the reaper may rest."""
    bench, plane = filled(base=noise(SIZE, seed=9))
    assert plane.clear(100 * CLUSTER, 2 * CLUSTER)
    assert plane.clear(110 * CLUSTER, CLUSTER, KEEP)
    expected = bytearray(noise(SIZE, seed=9))
    expected[: 16 * CLUSTER] = noise(16 * CLUSTER)
    for cluster in (100, 101, 110):
        expected[cluster * CLUSTER : (cluster + 1) * CLUSTER] = bytes(CLUSTER)
    assert bench.content() == expected
    bench.close()
    assert bench.reopened_content() == expected
    assert faults(bench) == (0, 0)


def test_zeros_that_keep_the_space_need_no_reaper() -> None:
    bench, plane = filled()
    before = bench.image.statistics
    assert plane.clear(3 * CLUSTER, 2 * CLUSTER, KEEP)
    assert plane.clear(20 * CLUSTER, 100 * CLUSTER, KEEP), "nothing is there"
    assert bench.image.statistics.metadata_writes == before.metadata_writes + 1
    expected = bytearray(noise(16 * CLUSTER))
    expected[3 * CLUSTER : 5 * CLUSTER] = bytes(2 * CLUSTER)
    assert bench.read(0, 16 * CLUSTER) == expected
    assert plane.take(3 * CLUSTER, 512) is None, "in what was kept may be anything"
    bench.write(3 * CLUSTER, noise(512, seed=2))
    expected[3 * CLUSTER : 3 * CLUSTER + 512] = noise(512, seed=2)
    assert bench.read(0, 16 * CLUSTER) == expected
    assert bench.image.statistics.clusters_allocated == before.clusters_allocated
    bench.close()
    assert bench.reopened_content()[: 16 * CLUSTER] == expected
    assert faults(bench) == (0, 0)


def test_zeros_that_keep_the_space_are_the_engines_in_version_2() -> None:
    bench, plane = filled(version=2)
    answers: list[bool] = []

    def act() -> None:
        answers.append(plane.clear(3 * CLUSTER, CLUSTER, KEEP))
        answers.append(plane.clear(3 * CLUSTER, CLUSTER, UNMAP))

    cleared_beside_the_reaper(bench, act)
    assert answers == [False, True]


def test_no_entry_of_version_2_hides_what_a_backing_file_shows() -> None:
    bench, plane = filled(version=2, base=noise(SIZE, seed=9))
    assert not plane.clear(100 * CLUSTER, CLUSTER)
    assert not plane.clear(100 * CLUSTER, CLUSTER, UNMAP)
    assert bench.read(100 * CLUSTER, CLUSTER) == noise(SIZE, seed=9)[100 * CLUSTER : 101 * CLUSTER]


def test_a_table_with_a_link_that_waits_is_the_engines_to_change() -> None:
    bench, plane = overlaid()
    bench.driver.run(bench.image.flush())
    bench.write(4 * CLUSTER, noise(CLUSTER))
    bench.driver.run(bench.image.flush())
    answers: list[bool] = []

    def act() -> None:
        answers.append(plane.clear(4 * CLUSTER, CLUSTER))
        assert plane.write(6 * CLUSTER, noise(CLUSTER))
        answers.append(plane.clear(6 * CLUSTER, CLUSTER))

    cleared_beside_the_reaper(bench, act)
    assert answers == [True, False]
    assert bench.read(6 * CLUSTER, CLUSTER) == noise(CLUSTER)


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOSPC, errno.EDQUOT])
def test_entries_that_could_not_be_cleared_are_as_they_were(number: int) -> None:
    bench, plane = filled()
    answers: list[bool] = []

    def act() -> None:
        plane.writer.error = -number
        answers.append(plane.clear(3 * CLUSTER, CLUSTER))
        plane.writer.error = 0

    cleared_beside_the_reaper(bench, act)
    assert answers == [False]
    assert bench.read(3 * CLUSTER, CLUSTER) == noise(16 * CLUSTER)[3 * CLUSTER : 4 * CLUSTER]
    bench.close()
    assert bench.image.statistics.clusters_freed == 1
    assert faults(bench) == (0, 0)


def test_entries_of_which_nobody_knows_whether_they_are_cleared_end_all_writes() -> None:
    bench, plane = filled()

    def act() -> None:
        plane.writer.error = -errno.EIO
        assert not plane.clear(3 * CLUSTER, CLUSTER)

    cleared_beside_the_reaper(bench, act)
    with pytest.raises(OSError, match="no more writes"):
        bench.write(0, noise(CLUSTER))


def test_more_than_the_engine_has_asked_for_is_its_own_to_clear() -> None:
    bench = set_up(8 * SIZE, cluster_bits=12)
    plane = BenchPlane(bench)
    bench.write(0, noise(3000 * CLUSTER))
    answers: list[bool] = []

    def act() -> None:
        answers.extend(plane.clear(cluster * CLUSTER, CLUSTER) for cluster in range(1, 3000))

    cleared_beside_the_reaper(bench, act)
    assert answers.index(False) == 2048
    assert not any(answers[2048:])
    assert bench.image.statistics.clusters_freed == 2049
    assert not any(bench.read(0, 2049 * CLUSTER))
