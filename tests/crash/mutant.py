"""The engine with one law broken, on purpose: the judges must object to each.

The only code that patches the engine: a mutant is the point of it.
"""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest

from qcow2.driver.file import run
from qcow2.driver.operation import Size, Spawn, Store
from qcow2.engine import replay as replay_module
from qcow2.engine.allocation import Allocator
from qcow2.engine.batch import Batch, Unrecorded
from qcow2.engine.image import Image
from qcow2.engine.links import Links
from qcow2.engine.mapping import Mapping
from qcow2.engine.reaper import Reaper
from qcow2.engine.refcount import Refcounts
from qcow2.engine.replay import Outcome
from qcow2.engine.root import Root
from qcow2.engine.stability import Stability
from qcow2.engine.write import Writer
from qcow2.native import ffi, lib
from qcow2.node import recovery
from qcow2.plane.entry import l1_table
from qcow2.plane.linklog import STAMP_BITS, FoundLog, LinkLog
from tests.crash.driver import CrashDriver, simulated

Patch = pytest.MonkeyPatch
Mutant = Callable[[Patch], None]


class Syncless:
    """A Stability that claims to sync."""

    def __init__(self, stability: Stability) -> None:
        self._stability = stability

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stability, name)

    async def sync(self) -> None:
        """Nothing."""


def without_syncs(patch: Patch, owner: type) -> None:
    """Let every sync that *owner* asks for do nothing."""
    begin = owner.__init__

    def init(self: Any, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **named)
        self._stability = Syncless(self._stability)

    patch.setattr(owner, "__init__", init)


async def nothing(*arguments: Any, **named: Any) -> None:
    """Claim success."""


def flush_does_nothing(patch: Patch) -> None:
    """Law 2."""
    patch.setattr(Image, "flush", nothing)


def copy_is_linked_before_it_is_stable(patch: Patch) -> None:
    """Law 3."""
    without_syncs(patch, Links)


def link_comes_before_the_data(patch: Patch) -> None:
    """Law 3, and 1: what is acknowledged was linked, what is linked was not written."""
    fill: Callable[..., Awaitable[None]] = Writer._fill

    async def linked_first(self: Writer, place: Any, guest_offset: int, source: Any, new: range) -> None:
        start, bits = self._geometry.round_down(guest_offset), self._geometry.cluster_bits
        await self._root.allow_uncounted()
        await self._mapping.link(start, self._entries(len(new), new.start << bits))
        await fill(self, place, guest_offset, source, new)

    patch.setattr(Writer, "_fill", linked_first)


def waiting_link_is_not_logged(patch: Patch) -> None:
    """Law 1: a link that only our memory has."""
    append = LinkLog.append

    def forgetful(self: LinkLog, links: Any) -> Store:
        append(self, links)
        return Store(self._memory)

    patch.setattr(LinkLog, "append", forgetful)


def log_is_not_replayed(patch: Patch) -> None:
    """Law 1."""

    async def ignore(*arguments: Any) -> Outcome:
        return Outcome()

    patch.setattr("tests.crash.images.replay", ignore)


def refused_record_shows(patch: Patch) -> None:
    """Law 1: a neighbour writes into a cluster that is taken back, for memory has the link until its writer is told."""
    append = LinkLog.append
    patch.setattr(LinkLog, "append", lambda self, links, undo=None: append(self, links))


def record_is_not_marked(patch: Patch) -> None:
    """Law 1: the image does not say that a record counts."""
    store = LinkLog._store

    def unmarked(self: LinkLog, parts: list[tuple[int, bytes]], before: int, mark: bytes) -> Store:
        return Store(self._memory, *parts, undo=store(self, parts, before, mark).undo)

    patch.setattr(LinkLog, "_store", unmarked)


def mark_is_not_renewed(patch: Patch) -> None:
    """Law 1: it names the first record for ever."""

    def first(self: LinkLog) -> bytes:
        mark = ffi.new("uint8_t[]", lib.LINK_MARK_NBYTES)
        lib.link_log_mark(self.native, 1, mark)
        return bytes(ffi.buffer(mark))

    patch.setattr(LinkLog, "_mark", first)


def mark_comes_before_its_record(patch: Patch) -> None:
    """Law 1: a death between the two leaves an image whose log does not know it."""
    start = CrashDriver._start

    def backwards(self: CrashDriver, task: Any, operation: Any) -> None:
        if isinstance(operation, Store) and operation.mark is not None:
            mark = operation.mark
            self.write_at_once(simulated(mark.file), mark.host_offset, mark.data)
            operation = Store(operation.memory, *operation.parts, undo=operation.undo)
        start(self, task, operation)

    patch.setattr(CrashDriver, "_start", backwards)


def newest_record_counts_whatever_the_mark_says(patch: Patch) -> None:
    """Laws 1 and 3: a later log is brought into an image from a backup."""
    links_at = FoundLog.links_at
    modulus = (1 << STAMP_BITS) - 1
    patch.setattr(FoundLog, "links_at", lambda self, stamp: links_at(self, self.newest() % modulus + 1))


def log_counts_though_the_image_names_none(patch: Patch) -> None:
    """Law 3: what has the numbers and the name of an image is taken for it."""

    def bring_in(file: Any, header: Any, directory: str) -> None:
        for memory in recovery.all_logs(directory):
            found = recovery._load_own(file, memory)
            if found is not None:
                stamp = found.newest() % ((1 << STAMP_BITS) - 1) + 1
                run(recovery.replay(file, header, found.links_at(stamp) or []))

    patch.setattr(recovery, "_look_for_leftovers", bring_in)


def missing_log_is_ignored(patch: Patch) -> None:
    """Law 1: who does not see the log goes on without a word."""
    patch.setattr(recovery, "_go_on_without", lambda *arguments, **named: None)


def log_is_removed_by_a_stranger(patch: Patch) -> None:
    """Law 1: who replays it for a copy takes it from the original."""
    patch.setattr(recovery, "_is_of", lambda file, found: True)


def every_log_has_one_tag(patch: Patch) -> None:
    """Laws 1 and 3: the log of a later process passes for that of an earlier one."""
    patch.setattr("qcow2.node.logplace.os.urandom", lambda nbytes: bytes(nbytes))


def log_forgets_before_the_links_are_written(patch: Patch) -> None:
    """Law 1."""
    write: Callable[..., Awaitable[None]] = Links._write

    async def forgetting_first(self: Links, batch: Any, mark: int) -> None:
        await self._forget(mark)
        await write(self, batch, mark)

    patch.setattr(Links, "_write", forgetting_first)


def changed_though_its_link_waits(patch: Patch) -> None:
    """Law 1: a commit brings back what a discard or zeros have replaced."""
    patch.setattr(Links, "is_waiting", lambda self, guest_offset, nclusters: False)


def refcounts_are_not_written(patch: Patch) -> None:
    """Law 4, accurate."""

    async def keep(self: Refcounts, index: int, block: Any, sectors: slice, old: bytes) -> None:
        block.mark(sectors)

    patch.setattr(Refcounts, "_write_sectors", keep)


def dirty_bit_is_not_set(patch: Patch) -> None:
    """Law 4, lazy."""
    patch.setattr(Root, "allow_uncounted", nothing)


def freed_before_the_link_is_gone(patch: Patch) -> None:
    """Law 5."""
    without_syncs(patch, Reaper)


def reserved_without_a_sync(patch: Patch) -> None:
    """Laws 3 and 4: what is handed out is neither counted nor zeros yet."""
    without_syncs(patch, Allocator)


def block_is_written_after_its_pointer(patch: Patch) -> None:
    """Law 6."""
    without_syncs(patch, Refcounts)


def dirty_bit_is_set_late(patch: Patch) -> None:
    """Law 4, lazy: the bit is written, and stable only after the links that need it may be."""
    mark: Callable[..., Awaitable[None]] = Root._mark_dirty

    async def later(self: Root) -> None:
        stability, self._stability = self._stability, Syncless(self._stability)  # type: ignore[assignment]
        try:
            await mark(self)
        finally:
            self._stability = stability

    patch.setattr(Root, "_mark_dirty", later)


def punch_comes_after_the_count(patch: Patch) -> None:
    """Law 5: a stale punch, which hits whoever was handed the cluster meanwhile."""
    punch: Callable[..., Awaitable[None]] = Reaper._punch

    async def later(self: Reaper, clusters: list[int]) -> None:
        await Spawn(punch(self, clusters))

    patch.setattr(Reaper, "_punch", later)


def freed_under_transfers(patch: Patch) -> None:
    """Law 5: no Grace; a write that began when the link stood hits whoever is handed the cluster."""

    async def ungraceful(self: Reaper, batch: list[int]) -> None:
        await self._stability.sync()
        await self._count_down(sorted(batch))

    patch.setattr(Reaper, "_release", ungraceful)


def slice_load_ignores_links(patch: Patch) -> None:
    """Law 3: a slice that was read before an entry changed is believed after."""
    load: Callable[..., Awaitable[None]] = Mapping._load

    async def stale(self: Mapping, guest_offset: int) -> None:
        self._outdated = Forgetful()
        await load(self, guest_offset)

    patch.setattr(Mapping, "_load", stale)


class Forgetful(set[int]):
    """A set that nothing is ever in."""

    def __contains__(self, one: object) -> bool:
        return False


def repair_marks_clean_first(patch: Patch) -> None:
    """Law 8: the dirty bit goes before the refcounts are right."""
    from qcow2.judge import repair as module

    repair_all: Callable[..., Awaitable[None]] = module._repair_all

    async def clean_first(verdict: Any) -> None:
        await module.mark_repaired(verdict.census.file, verdict.census.header)
        await repair_all(verdict)

    patch.setattr(module, "_repair_all", clean_first)


def repair_begins_without_a_sync(patch: Patch) -> None:
    """Law 5: counts fall while what a killed process took out of the tables may come back."""
    patch.setattr("qcow2.judge.repair.make_stable", nothing)


def replay_begins_without_a_sync(patch: Patch) -> None:
    """Law 3: links are brought in before what a killed process has written is stable."""
    write = replay_module._write

    async def unsynced(*arguments: Any) -> None:
        with pytest.MonkeyPatch.context() as meanwhile:
            meanwhile.setattr(replay_module, "Sync", Size)
            await write(*arguments)

    patch.setattr(replay_module, "_write", unsynced)


def failed_sync_is_forgotten(patch: Patch) -> None:
    """Law 7: it fails who asked for it, and the next one reports success."""
    patch.setattr(Stability, "fail", lambda self, error: None)


def failed_sync_is_tried_again(patch: Patch) -> None:
    """Law 7: the second time the host has nothing left to write, and says so."""
    sync: Callable[..., Awaitable[None]] = Stability.sync

    async def insistent(self: Stability) -> None:
        try:
            await sync(self)
        except OSError:
            self.error = None
            await sync(self)

    patch.setattr(Stability, "sync", insistent)


def failed_metadata_write_is_swallowed(patch: Patch) -> None:
    """Law 7: memory has what the file has not."""
    write: Callable[..., Awaitable[None]] = Stability.write

    async def quiet(self: Stability, host_offset: int, *pieces: Any) -> None:
        try:
            await write(self, host_offset, *pieces)
        except OSError:
            self.error = None

    patch.setattr(Stability, "write", quiet)


def failed_data_is_linked(patch: Patch) -> None:
    """Law 7: a failed data write does not fail its request, and changes metadata."""
    fill: Callable[..., Awaitable[None]] = Writer._fill

    async def quiet(self: Writer, *arguments: Any) -> None:
        with suppress(OSError):
            await fill(self, *arguments)

    patch.setattr(Writer, "_fill", quiet)


def link_without_a_record_waits_on(patch: Patch) -> None:
    """Law 7: a link that neither log nor file would have stays in memory, though its cluster is freed."""
    take_back = Links._take_back

    def keep(self: Links, batch: Batch, link: Unrecorded) -> None:
        take_back(self, batch, link)
        self._mapping.hold(link.guest_offset, link.entries)

    patch.setattr(Links, "_take_back", keep)


def lack_of_space_ends_all_writes(patch: Patch) -> None:
    """Law 7: a full host is no reason to distrust it."""
    patch.setattr("qcow2.engine.stability.lacks_space", lambda error: False)


def tables_are_wherever_the_header_says(patch: Patch) -> None:
    """Law 9: no limit, no alignment, no end of the file."""
    patch.setattr("qcow2.format.refusal.validate_tables", lambda *arguments, **named: None)


def l1_entry_is_believed(patch: Patch) -> None:
    """Law 9: an L2 table may begin anywhere."""

    def believing(self: Mapping, guest_offset: int) -> int:
        return l1_table(self.l1[self.geometry.l1_index(guest_offset)])

    patch.setattr(Mapping, "table_offset", believing)


def guest_data_may_lie_in_tables(patch: Patch) -> None:
    """Law 9: the guest writes the refcounts, or maps itself any cluster."""
    patch.setattr(Mapping, "own_metadata", lambda self, clusters: None)


def check_believes_l2_entries(patch: Patch) -> None:
    """Law 9: what cannot be data is called sound, and refused when it is read."""
    patch.setattr("qcow2.judge.census._judge_l2_entry", lambda census, where, entry: None)


def image_is_not_locked(patch: Patch) -> None:
    """Law 10."""
    patch.setattr("qcow2.node.chain.lock_image", lambda *_, **__: None)


def readers_forbid_nothing(patch: Patch) -> None:
    """Law 10: a backing file, or an image served read-only, is written under us."""
    patch.setattr("qcow2.lock.FORBIDDEN", ())


def locks_of_others_are_not_looked_for(patch: Patch) -> None:
    """Law 10: ours are taken, and exclude only who comes later and looks."""
    patch.setattr("qcow2.lock._is_held", lambda fd, path, byte: False)


FOUND_BY: dict[Mutant, str] = {
    flush_does_nothing: "512/writeback/1/overwrite+flush",
    copy_is_linked_before_it_is_stable: "backing/writethrough/1/copy",
    link_comes_before_the_data: "backing/writethrough/1/copy",
    waiting_link_is_not_logged: "backing/writeback/1/copy",
    log_is_not_replayed: "backing/writeback/1/copy",
    refused_record_shows: "crowd backing/writeback/2/copy",
    record_is_not_marked: "backing/writeback/1/copy",
    mark_is_not_renewed: "backing/writeback/1/copy+copy",
    mark_comes_before_its_record: "backing/writeback/1/copy",
    newest_record_counts_whatever_the_mark_says: "backing/writeback/1/copy+discard",
    log_counts_though_the_image_names_none: "between opened-by-another-program",
    missing_log_is_ignored: "between opened-by-one-who-sees-no-log",
    log_is_removed_by_a_stranger: "between copy-opened-first",
    every_log_has_one_tag: "between copied-back-beside-the-next-log",
    log_forgets_before_the_links_are_written: "backing/writeback/1/copy",
    changed_though_its_link_waits: "backing/writeback/1/copy+discard",
    refcounts_are_not_written: "512/writeback/1/allocate",
    dirty_bit_is_not_set: "512-lazy/writeback/1/allocate",
    dirty_bit_is_set_late: "512-lazy/writeback/1/allocate",
    punch_comes_after_the_count: "live width-64/writeback/6/read-6000x16",
    freed_under_transfers: "live width-64/writeback/1/read-6000x16",
    slice_load_ignores_links: "live many-tables/writeback/1/read-3000x64",
    freed_before_the_link_is_gone: "compressed/writethrough/1/decompress+decompress+decompress",
    reserved_without_a_sync: "512/writeback/1/allocate",
    block_is_written_after_its_pointer: "width-64/writeback/1/block",
    repair_marks_clean_first: "512-lazy/writeback/1/random-20x8",
    repair_begins_without_a_sync: "512/writeback/1/random-80x2",
    replay_begins_without_a_sync: "backing/writeback/1/copy+discard",
    failed_sync_is_forgotten: "faults 512/writeback/allocate+flush",
    failed_sync_is_tried_again: "faults 512/writeback/allocate+flush",
    failed_metadata_write_is_swallowed: "faults 512/writeback/allocate",
    failed_data_is_linked: "faults 512/writeback/allocate",
    link_without_a_record_waits_on: "faults backing/writeback/copy",
    lack_of_space_ends_all_writes: "faults 512/writeback/allocate",
    tables_are_wherever_the_header_says: "hostile l1-too-long",
    l1_entry_is_believed: "hostile l2-unaligned",
    guest_data_may_lie_in_tables: "hostile data-in-the-l1-table",
    check_believes_l2_entries: "hostile l2-entry-reserved-bit",
    image_is_not_locked: "alone qemu-beside-our-writer",
    readers_forbid_nothing: "alone qemu-beside-our-reader",
    locks_of_others_are_not_looked_for: "alone we-beside-a-reading-qemu",
}
