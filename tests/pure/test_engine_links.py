"""Links that wait for their data: made in memory and in the log, committed together, never overtaken."""

import errno
from contextlib import suppress
from typing import Any

import pytest

from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.operation import Operation, Read, Store, Sync, Write
from qcow2.engine.image import Image
from qcow2.engine.linkpolicy import LinkPolicy
from qcow2.engine.opened import OpenOptions
from qcow2.engine.replay import replay
from qcow2.engine.root import BitmapsPlace
from qcow2.error import NotTried
from qcow2.format.header import read_header
from qcow2.format.layout import HEADER_REFCOUNT_TABLE_OFFSET
from qcow2.node.raw import RawImage
from qcow2.plane.linklog import LIMIT
from tests.crash.driver import CrashDriver
from tests.engine import TAG, Bench, mark_of, noise, open_again, read, set_up, waiting

CLUSTER = 512
BASE = noise(200 * CLUSTER, 7)


def overlay(**options: Any) -> Bench:
    """An empty overlay that writes without a sync for as long as nothing else needs one: its first run is reserved."""
    bench = set_up(len(BASE), base=BASE, log_capacity=64, lazy=True, **options)
    bench.write(199 * CLUSTER, noise(CLUSTER, 1))
    bench.driver.run(bench.image.flush())
    return bench


def operations(bench: Bench, kind: type[Operation]) -> list[Operation]:
    """Collects those of *kind* from now on."""
    seen: list[Operation] = []

    def note(operation: Operation) -> None:
        if isinstance(operation, kind):
            seen.append(operation)

    bench.breaker.fault = note
    return seen


def links(bench: Bench) -> int:
    """How many wait, by the log."""
    found = waiting(bench.file)
    assert found is not None
    return len(found)


def in_the_file(bench: Bench, guest_offset: int, nbytes: int) -> bytes:
    """What somebody reads who knows nothing but the files."""
    return bench.reopened_content()[guest_offset : guest_offset + nbytes]


def together(bench: Bench, *coroutines: Any) -> list[Any]:
    tasks = [bench.driver.spawn(coroutine, lambda task: None) for coroutine in coroutines]
    bench.driver.finish()
    return [task.error for task in tasks]


def test_a_write_over_the_backing_file_needs_no_sync() -> None:
    bench = overlay()
    syncs = operations(bench, Sync)
    bench.write(5 * CLUSTER + 100, b"new")
    assert syncs == []
    assert links(bench) == 1
    assert bench.read(5 * CLUSTER, CLUSTER) == BASE[5 * CLUSTER :][:100] + b"new" + BASE[5 * CLUSTER + 103 :][:409]
    assert in_the_file(bench, 5 * CLUSTER, CLUSTER) == BASE[5 * CLUSTER :][:CLUSTER]


def test_a_flush_of_many_waits_for_two_syncs() -> None:
    bench = overlay()
    for cluster in range(0, 60, 2):
        bench.write(cluster * CLUSTER, noise(CLUSTER, cluster))
    syncs = operations(bench, Sync)
    bench.driver.run(bench.image.flush())
    assert len(syncs) == 2
    assert links(bench) == 0
    assert bench.reopened_content() == bench.content()


def test_links_that_meet_are_written_together() -> None:
    bench = overlay()
    for cluster in (7, 6, 9, 8):
        bench.write(cluster * CLUSTER, noise(CLUSTER, cluster))
    writes = operations(bench, Write)
    bench.driver.run(bench.image.flush())
    assert len(writes) == 1


def test_a_stream_of_flushes_shares_syncs() -> None:
    bench = overlay()

    async def guest(number: int) -> None:
        for turn in range(5):
            cluster = number * 5 + turn
            await bench.image.write(cluster * CLUSTER, MemoryBuffer(memoryview(noise(CLUSTER, cluster))))
            await bench.image.flush()

    syncs = operations(bench, Sync)
    assert together(bench, *map(guest, range(8))) == [None] * 8
    assert len(syncs) < 40
    assert bench.reopened_content() == bench.content()


def test_a_slice_that_is_read_again_shows_what_waits() -> None:
    size = 70 * 64 * CLUSTER  # more slices than the smallest cache holds
    bench = set_up(size, base=noise(size, 3), log_capacity=64, lazy=True, cache_size=0)
    bench.write(0, b"new")
    for table in range(1, 70):
        bench.write(table * 64 * CLUSTER, b"other")
        bench.driver.run(bench.image.settle()) if table == 60 else None
    bench.write(CLUSTER, b"more")
    for table in range(1, 70):
        bench.read(table * 64 * CLUSTER, 1)
    assert bench.read(CLUSTER, 4) == b"more"
    assert bench.read(0, 3) == b"new"


def test_in_writethrough_nothing_waits() -> None:
    bench = overlay()
    bench.image.set_link_policy(LinkPolicy(may_wait=lambda: False))
    bench.write(5 * CLUSTER, noise(CLUSTER, 5))
    assert links(bench) == 0
    assert in_the_file(bench, 5 * CLUSTER, CLUSTER) == noise(CLUSTER, 5)


def test_the_owner_is_told_whether_links_wait() -> None:
    bench, told = overlay(), list[bool]()
    bench.image.set_link_policy(LinkPolicy(on_waiting=told.append))
    bench.write(5 * CLUSTER, b"one")
    bench.write(6 * CLUSTER, b"two")
    assert told == [True]
    bench.driver.run(bench.image.settle())
    assert told == [True, False]
    bench.driver.run(bench.image.flush())
    assert told == [True, False]


def test_settling_leaves_everything_in_the_file() -> None:
    bench = overlay()
    bench.write(5 * CLUSTER, noise(CLUSTER, 5))
    bench.driver.run(bench.image.settle())
    assert links(bench) == 0
    assert bench.reopened_content() == bench.content()


@pytest.mark.parametrize("unmap", [True, False])
def test_zeros_over_a_cluster_whose_link_waits_stay(unmap: bool) -> None:
    bench = overlay()
    bench.write(5 * CLUSTER, noise(CLUSTER, 5))
    bench.driver.run(bench.image.write_zeroes(5 * CLUSTER, CLUSTER, unmap=unmap))
    bench.driver.run(bench.image.flush())
    assert bench.read(5 * CLUSTER, CLUSTER) == bytes(CLUSTER)
    assert bench.reopened_content() == bench.content()


def test_a_discard_of_a_cluster_whose_link_waits_stays() -> None:
    bench = overlay()
    bench.write(5 * CLUSTER, noise(CLUSTER, 5))
    bench.driver.run(bench.image.discard(5 * CLUSTER, CLUSTER))
    bench.driver.run(bench.image.flush())
    assert bench.reopened_content()[5 * CLUSTER :][:CLUSTER] == bytes(CLUSTER)


def test_a_full_log_is_committed_on_the_way() -> None:
    bench = set_up(len(BASE), base=BASE, log_capacity=8, lazy=True)
    for cluster in range(150):
        bench.write(cluster * CLUSTER, noise(CLUSTER, cluster))
        assert links(bench) <= 7
    expected = bench.content()
    bench.close()
    assert bench.reopened_content() == expected
    assert bench.file.read(88, 8) == bytes(8)


def test_copies_do_not_wait_for_the_sync_of_a_reservation() -> None:
    bench = overlay()
    syncs = operations(bench, Sync)
    before = bench.image.statistics.reservations
    for cluster in range(30):  # less than half of what the log holds
        bench.write(cluster * CLUSTER + 100, b"new")
    assert syncs == []
    assert bench.image.statistics.reservations > before


def test_a_write_of_more_links_than_the_log_holds_does_not_wait() -> None:
    bench = set_up(len(BASE), base=BASE, log_capacity=4, lazy=True)
    bench.write(0, noise(100 * CLUSTER, 3))
    assert links(bench) <= 3
    bench.driver.run(bench.image.flush())
    assert in_the_file(bench, 0, 100 * CLUSTER) == noise(100 * CLUSTER, 3)


def test_the_header_names_the_log_while_it_counts() -> None:
    bench = set_up(len(BASE), base=BASE, log_capacity=8)
    assert bench.file.read(88, 8) == bytes(8)
    bench.write(0, b"new")
    word = int.from_bytes(bench.file.read(88, 8), "big")
    assert (word >> 40, word >> 8 & 0xFFFFF, word & 0xFF) == (TAG, 2, 0)
    bench.write(1 << 10, b"new")
    assert int.from_bytes(bench.file.read(88, 8), "big") - word == 1 << 8
    bench.driver.run(bench.image.flush())
    assert bench.file.read(88, 8) == bytes(8)
    bench.write(1 << 11, b"new")
    assert bench.file.read(88, 8) != bytes(8)
    bench.close()
    assert bench.file.read(88, 8) == bytes(8)


def test_without_memory_for_a_log_each_link_waits_for_a_sync() -> None:
    bench, lost = set_up(len(BASE), base=BASE, log_capacity=8), list[OSError]()
    bench.image.set_link_policy(LinkPolicy(on_log_lost=lost.append))
    bench.breaker.fault = lambda operation: OSError(errno.EACCES, "no") if isinstance(operation, Store) else None
    bench.write(5 * CLUSTER, noise(CLUSTER, 5))
    bench.write(9 * CLUSTER, noise(CLUSTER, 9))
    assert [error.errno for error in lost] == [errno.EACCES]
    assert bench.reopened_content() == bench.content()
    assert bench.file.read(88, 8) == bytes(8)


def test_a_log_that_somebody_removes_is_given_up() -> None:
    """What waits in it is committed, and nothing waits any more."""
    bench, lost = set_up(len(BASE), base=BASE, log_capacity=8), list[OSError]()
    bench.image.set_link_policy(LinkPolicy(on_log_lost=lost.append))
    bench.write(5 * CLUSTER, noise(CLUSTER, 5))
    assert bench.reopened_content() != bench.content()
    bench.file.memory.is_lost = True
    for cluster in (9, 10):
        bench.write(cluster * CLUSTER, noise(CLUSTER, cluster))
        assert bench.reopened_content() == bench.content()
    assert [error.errno for error in lost] == [errno.ENOENT]


def test_no_space_for_the_mark_is_a_commit_and_no_failure() -> None:
    bench = overlay()
    bench.write(5 * CLUSTER, noise(CLUSTER, 5))
    bench.breaker.fault = lambda operation: OSError(errno.ENOSPC, "full") if isinstance(operation, Store) else None
    bench.write(9 * CLUSTER, noise(CLUSTER, 9))
    assert links(bench) == 1
    assert in_the_file(bench, 9 * CLUSTER, CLUSTER) == noise(CLUSTER, 9)
    bench.breaker.fault = lambda operation: None
    bench.write(11 * CLUSTER, noise(CLUSTER, 11))
    bench.driver.run(bench.image.flush())
    assert bench.reopened_content() == bench.content()


def full(operation: Operation) -> OSError | None:
    """A host that takes data, and neither marks nor entries."""
    takes = isinstance(operation, Write) and operation.data
    return OSError(errno.ENOSPC, "full") if isinstance(operation, Store | Write) and not takes else None


@pytest.mark.parametrize("before", [[], [5], [5, 8]], ids=str)
def test_a_link_that_neither_log_nor_file_takes_never_was(before: list[int]) -> None:
    """Its request fails, and its cluster is free: nothing may refer to it, now or later."""
    bench = overlay()
    for cluster in before:
        bench.write(cluster * CLUSTER, noise(CLUSTER, cluster))
    old = bench.content()
    bench.breaker.fault = full
    for cluster in (8, 9):
        if cluster not in before:
            with pytest.raises(OSError, match="full"):
                bench.write(cluster * CLUSTER + 7, b"new")
    assert bench.content() == old
    assert links(bench) == len(before)
    bench.breaker.fault = None
    assert bench.content() == old
    for cluster in range(20, 40):  # takes whatever is free
        bench.write(cluster * CLUSTER, noise(CLUSTER, cluster))
    assert bench.read(0, 20 * CLUSTER) == old[: 20 * CLUSTER]
    bench.driver.run(bench.image.flush())
    assert bench.reopened_content() == bench.content()


def test_requests_that_a_full_host_fails_do_not_wait_for_each_other() -> None:
    bench = overlay()
    bench.write(5 * CLUSTER, noise(CLUSTER, 5))
    old = bench.content()
    bench.breaker.fault = full
    buffers = [MemoryBuffer(memoryview(noise(CLUSTER, cluster))) for cluster in range(7, 12)]
    errors = together(bench, *(bench.image.write(at * CLUSTER, data) for at, data in enumerate(buffers, 7)))
    assert [getattr(error, "errno", None) for error in errors] == [errno.ENOSPC] * 5
    bench.breaker.fault = None
    assert bench.content() == old
    bench.driver.run(bench.image.flush())
    assert bench.reopened_content() == old


def test_nobody_sees_a_link_that_neither_log_nor_file_has() -> None:
    """Who reads or writes its cluster meanwhile is told of something that never was."""
    bench = overlay()
    bench.write(5 * CLUSTER, noise(CLUSTER, 5))  # reserves a run
    old = bench.read(9 * CLUSTER, CLUSTER)
    bench.breaker.fault = full
    targets = [bytearray(CLUSTER) for _ in range(20)]

    async def look() -> None:
        for target in targets:
            await bench.image.read(9 * CLUSTER, MemoryBuffer(memoryview(target)))

    new = MemoryBuffer(memoryview(noise(CLUSTER, 9)))
    error, _ = together(bench, bench.image.write(9 * CLUSTER, new), look())
    assert error.errno == errno.ENOSPC
    assert {bytes(target) for target in targets} == {old}


def test_a_link_that_the_file_has_and_no_log_is_seen() -> None:
    bench, stores = overlay(), 0
    bench.write(5 * CLUSTER, noise(CLUSTER, 5))

    def first_mark(operation: Operation) -> OSError | None:
        nonlocal stores
        stores += isinstance(operation, Store)
        return full(operation) if isinstance(operation, Store) and stores == 1 else None

    bench.breaker.fault = first_mark
    bench.write(9 * CLUSTER, noise(CLUSTER, 9))
    assert stores > 1  # those of the commit
    assert bench.read(9 * CLUSTER, CLUSTER) == in_the_file(bench, 9 * CLUSTER, CLUSTER) == noise(CLUSTER, 9)


def test_of_links_that_a_commit_left_behind_only_the_one_without_a_record_never_was() -> None:
    """The entry of the first is in the file when the host fills up, the other's is not."""
    bench = overlay()
    bench.write(5 * CLUSTER, noise(CLUSTER, 5))
    old, entries = bench.content(), 0

    def fill_up(operation: Operation) -> OSError | None:
        nonlocal entries
        entries += isinstance(operation, Write) and not operation.data
        return full(operation) if isinstance(operation, Store) or entries > 1 else None

    bench.breaker.fault = fill_up
    with pytest.raises(OSError, match="full"):
        bench.write(9 * CLUSTER, noise(CLUSTER, 9))
    assert (entries, bench.content()) == (2, old)
    bench.breaker.fault = None
    bench.driver.run(bench.image.flush())
    assert bench.reopened_content() == old


def test_a_log_that_fails_later_ends_all_writes() -> None:
    bench = overlay()
    bench.breaker.fault = lambda operation: OSError(errno.EIO, "no") if isinstance(operation, Store) else None
    with pytest.raises(OSError):
        bench.write(5 * CLUSTER, b"new")
    bench.breaker.fault = None
    with pytest.raises(OSError):
        bench.write(6 * CLUSTER, b"new")


def test_a_flush_without_space_fails_and_loses_nothing() -> None:
    bench = overlay()
    bench.write(5 * CLUSTER, noise(CLUSTER, 5))
    bench.write(9 * CLUSTER, noise(CLUSTER, 9))
    bench.breaker.fault = lambda operation: OSError(errno.ENOSPC, "full") if isinstance(operation, Write) else None
    with pytest.raises(OSError, match="full"):
        bench.driver.run(bench.image.flush())
    bench.breaker.fault = None
    assert links(bench) == 2
    bench.driver.run(bench.image.flush())
    assert bench.reopened_content() == bench.content()


def test_after_a_failed_sync_no_link_is_written() -> None:
    bench = overlay()
    bench.write(5 * CLUSTER, noise(CLUSTER, 5))
    bench.breaker.fault = lambda operation: OSError(errno.EIO, "lost") if isinstance(operation, Sync) else None
    for flush in (bench.image.flush, bench.image.settle, bench.image.flush):
        with pytest.raises(OSError):
            bench.driver.run(flush())
        bench.breaker.fault = None
    assert bench.read(5 * CLUSTER, CLUSTER) == noise(CLUSTER, 5)
    assert in_the_file(bench, 5 * CLUSTER, CLUSTER) == BASE[5 * CLUSTER :][:CLUSTER]
    with pytest.raises(OSError):
        bench.close()


def test_log_whose_numbers_run_out_ends_and_another_begins() -> None:
    """A copy of the image from long ago would else find its number in a record of today."""
    bench = overlay()
    changes = bench.image._changes
    assert changes is not None
    log = changes.links._log
    assert log is not None
    bench.write(0, b"a")
    bench.driver.run(bench.image.flush())
    log.native.first = log.native.next = LIMIT - 2
    tags = set()
    for cluster in range(5, 15, 2):
        bench.write(cluster * CLUSTER, b"new")
        assert links(bench) > 0
        tags.add(mark_of(bench.file).tag)
    assert tags == {TAG, TAG + 1}
    assert log.next < 10
    bench.driver.run(bench.image.flush())
    assert links(bench) == 0
    assert bench.reopened_content() == bench.content()


def test_a_header_that_is_rewritten_keeps_the_mark() -> None:
    """No link waits here, but the log says whose do below; a header of before said nothing of it."""
    bench = overlay()
    links = bench.image._changes.links
    bench.driver.run(links.begin_early())
    assert bench.driver.run(links.name_below(TAG + 7))
    mark = mark_of(bench.file)
    assert mark.tag == TAG
    root = bench.image._changes.root
    bench.driver.run(root.rewrite(lambda header: header))
    assert mark_of(bench.file) == mark


def test_the_refcount_table_moves_while_the_disk_grows() -> None:
    """What lies in the header between two words that change together is written as it is, not as it was."""
    bench = overlay()
    root = bench.image._changes.root
    record = root.header.record
    moved = record.refcount_table_offset + 4096
    root.next_bitmaps = BitmapsPlace(200, bench.file.read(200, 8))
    together(bench, root.set_size(record.size), root.set_refcount_table(moved, record.refcount_table_clusters))
    assert int.from_bytes(bench.file.read(HEADER_REFCOUNT_TABLE_OFFSET, 8), "big") == moved


@pytest.mark.parametrize("before", range(8))
def test_the_refcount_table_moves_while_the_header_names_another_file(before: int) -> None:
    """Whoever writes all of the header says where the table is by then: a writer ahead may have made it grow."""
    bench = overlay()
    root = bench.image._changes.root
    record = root.header.record
    moved = record.refcount_table_offset + 4096

    async def move_soon() -> None:
        for _ in range(before):
            await Read(bench.file, 0, 1)
        await root.set_refcount_table(moved, record.refcount_table_clusters)

    assert together(bench, bench.image.put_over(None, None, None), move_soon()) == [None, None]
    assert int.from_bytes(bench.file.read(HEADER_REFCOUNT_TABLE_OFFSET, 8), "big") == moved
    assert root.header.record.refcount_table_offset == moved


def no_memory_for(is_waiting: bool) -> LinkPolicy:
    """Of an owner who has none left when told that links wait, or none any more."""

    def told(are_waiting: bool) -> None:
        if are_waiting == is_waiting:
            raise MemoryError

    return LinkPolicy(on_waiting=told)


def assert_no_more_writes(bench: Bench) -> None:
    """And nobody waits for what will never be."""
    for change in (bench.image.flush, bench.image.bring_links, bench.image.close):
        with pytest.raises(OSError):
            bench.driver.run(change())
    with pytest.raises(OSError):
        bench.write(20 * CLUSTER, b"new")


def test_who_waits_for_a_commit_in_which_memory_ran_out_is_told_so() -> None:
    """While a link that neither log nor file takes is taken back."""
    bench = overlay()
    bench.write(5 * CLUSTER, noise(CLUSTER, 5))  # reserves a run
    bench.driver.run(bench.image.flush())
    bench.image.set_link_policy(no_memory_for(False))
    bench.breaker.fault = full
    new = MemoryBuffer(memoryview(noise(CLUSTER, 9)))
    (error,) = together(bench, bench.image.write(9 * CLUSTER, new))
    assert isinstance(error, OSError)
    bench.breaker.fault = None
    assert_no_more_writes(bench)


@pytest.mark.parametrize("change", ["flush", "settle", "read"])
def test_links_of_the_data_plane_for_which_there_is_no_memory_are_no_flush(change: str) -> None:
    """They are in the log alone by then, whoever has asked for them."""
    bench = overlay()
    bench.write(0, b"new")
    bench.driver.run(bench.image.flush())
    bench.image._cache.resize()
    changes = bench.image._changes
    log, (new,) = changes.links.log, bench.driver.run(changes._space.allocator.allocate_unsynced(1))
    (entry,) = bench.image._mapping.entries.data(new * CLUSTER, 1)
    bench.image._cache.update(7 * CLUSTER, [entry])
    log.native.links[0], log.native.nlinks = (7, (entry, 0)), 1
    bench.image.set_link_policy(no_memory_for(True))
    with pytest.raises(MemoryError):
        bench.read(0, CLUSTER) if change == "read" else bench.driver.run(getattr(bench.image, change)())
    bench.image.set_link_policy(LinkPolicy())
    with pytest.raises(OSError):
        bench.driver.run(bench.image.flush())


def lacks_mark(operation: Operation) -> OSError | None:
    return OSError(errno.ENOSPC, "as told") if isinstance(operation, Store) and operation.mark is not None else None


@pytest.mark.parametrize("lacks", ["sync", "space"])
def test_what_an_earlier_commit_brought_into_the_file_answers_for_no_later_link(lacks: str) -> None:
    """Of one cluster: what is told done is in the log or the file (law 1)."""
    cluster, part = 1 << 16, 2048
    base = noise(16 * cluster, 1)
    bench = set_up(len(base), cluster_bits=16, has_subclusters=True, base=base, log_capacity=64)
    bench.write(0, b"a" * part)
    bench.breaker.fault = lacks_mark
    with suppress(OSError):
        bench.driver.run(bench.image.flush())

    def lacks_more(operation: Operation) -> OSError | None:
        if lacks == "sync" and isinstance(operation, Sync):
            return NotTried(errno.ENOMEM, "as told")
        if lacks == "space" and isinstance(operation, Write) and sum(map(len, operation.pieces)) <= 64:
            return OSError(errno.ENOSPC, "as told")
        return lacks_mark(operation)

    bench.breaker.fault = lacks_more
    shown = b"b" * part
    try:
        bench.write(4 * part, shown)
    except OSError:
        shown = base[4 * part : 5 * part]
    bench.breaker.fault = None
    killed = bench.file.after_kill()
    driver = CrashDriver()
    header = driver.run(read_header(killed))
    driver.run(replay(killed, header, waiting(killed) or []))
    image = driver.run(Image.open(killed, backing=driver.run(RawImage.open(bench.base))))
    assert read(driver, image, 0, part) == b"a" * part
    assert read(driver, image, 4 * part, part) == shown == bench.read(4 * part, part)


@pytest.mark.parametrize("seed", range(20))
def test_no_neighbour_writes_into_a_cluster_that_is_taken_back(seed: int) -> None:
    cluster = 1 << 16
    base = noise(16 * cluster, 1)
    bench = set_up(len(base), cluster_bits=16, base=base, log_capacity=64, seed=seed)
    bench.write(3 * cluster, b"c" * 4096)
    bench.driver.run(bench.image.flush())
    tasks: list[Any] = []

    def fault(operation: Operation) -> OSError | None:
        if isinstance(operation, Sync):
            return NotTried(errno.ENOMEM, "as told")
        failure = lacks_mark(operation)
        if failure is not None and len(tasks) == 1:
            beside = bench.image.write(4096, MemoryBuffer(memoryview(b"b" * 4096)))
            tasks.append(bench.driver.spawn(beside, lambda task: None))
        return failure

    bench.breaker.fault = fault
    tasks.append(bench.driver.spawn(bench.image.write(0, MemoryBuffer(memoryview(b"a" * 4096))), lambda task: None))
    bench.driver.finish()
    bench.breaker.fault = None
    for task, offset, byte in zip(tasks, (0, 4096), (b"a", b"b"), strict=True):
        shown = base[offset : offset + 4096] if task.error else byte * 4096
        assert bench.read(offset, 4096) == shown


def test_a_link_of_the_data_plane_still_waits_for_a_flush_where_another_is_taken_back() -> None:
    cluster = 1 << 16
    bench = set_up(16 * cluster, cluster_bits=16, base=noise(16 * cluster, 1), log_capacity=64)
    bench.write(3 * cluster, b"c" * 512)
    bench.driver.run(bench.image.flush())
    told: list[bool] = []
    bench.image.set_link_policy(LinkPolicy(on_waiting=told.append))
    changes = bench.image._changes
    log, (new,) = changes.links.log, bench.driver.run(changes._space.allocator.allocate_unsynced(1))
    entry = bench.image._mapping.entries.data(new * cluster, 1)[0]
    nfailed = 0

    def fault(operation: Operation) -> OSError | None:
        nonlocal nfailed
        if isinstance(operation, Sync) and nfailed == 1:  # meanwhile, as the data plane does it
            nfailed = 2
            log.native.links[0] = (7, (entry, 0))
            log.native.nlinks = 1
            bench.image._cache.update(7 * cluster, [entry])
            told.append(True)
            return NotTried(errno.ECANCELED, "as told")
        failure = lacks_mark(operation) if not nfailed else None
        nfailed += failure is not None
        return failure

    bench.breaker.fault = fault
    with pytest.raises(OSError, match="as told"):
        bench.write(5 * cluster, b"b" * 4096)
    bench.breaker.fault = None
    assert told[-1]
    assert bench.image.has_waiting_links


@pytest.mark.parametrize("kind", [Read, Write])
def test_a_census_that_was_not_even_tried_is_taken_at_the_next_write(kind: type[Operation]) -> None:
    """COPIED flags that are wrong, as damage of others leaves them, would let a write hit a snapshot."""
    cluster = 4096
    bench = set_up(64 * cluster, cluster_bits=12)
    bench.write(0, b"s" * 8 * cluster)
    bench.driver.run(bench.image.create_snapshot("s", 0))
    bench.close()
    l1 = int.from_bytes(bench.file.read(40, 8), "big")
    table = int.from_bytes(bench.file.read(l1, 8), "big") & 0x00FF_FFFF_FFFF_FE00
    for place in (l1, *range(table, table + 64, 8)):
        bench.file.write(place, bytes([bench.file.read(place, 1)[0] | 0x80]))
    again = open_again(bench, writable=True)
    again.content()
    nfailed = 0

    def fault(operation: Operation) -> OSError | None:
        nonlocal nfailed
        nfailed += isinstance(operation, kind)
        return NotTried(errno.ECANCELED, "as told") if isinstance(operation, kind) and nfailed == 1 else None

    again.breaker.fault = fault
    with suppress(OSError):
        again.write(0, b"n" * cluster)
    again.breaker.fault = None
    again.write(cluster, b"n" * cluster)
    driver, options = CrashDriver(), OpenOptions(snapshot="s")
    assert (
        read(driver, driver.run(Image.open(again.file.copy(), options=options)), 0, 8 * cluster) == b"s" * 8 * cluster
    )
