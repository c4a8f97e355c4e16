"""Links that wait: L2 entries that may not be in the file before the data they point at is stable (law 3).

Such a link is made in memory and in the link log, which outlives the process; then its write is as good as any other
that a power loss may undo. A commit brings the links into the file: `SYNC; links; forget them in the log`. Who wants
to flush waits for another SYNC, which serves the next commit as its first, so a stream of flushes takes one each.

A cluster whose link waits is data, referred to once, and overwritten in place. Whoever would change its entry in any
other way commits first. A cluster waits again only with subclusters, when more of them become data: the later link
holds all that the earlier one says.
"""

import errno
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from qcow2.engine.background import Background
from qcow2.engine.batch import Batch, Unrecorded
from qcow2.engine.linkpolicy import LinkPolicy
from qcow2.engine.opened import Opened
from qcow2.engine.rangelock import Mutex
from qcow2.engine.reaper import Reaper
from qcow2.engine.stability import is_harmless
from qcow2.error import no_memory
from qcow2.plane.linklog import Link, LinkLog

MAX_WAITING_BYTES = 2 << 30  # of data under links that wait: a flush, a replay or a pause may have to write them all


async def _nothing() -> None:
    """Nothing else is in the log."""


class Links:
    """The waiting links of one image, and the one task that commits them."""

    def __init__(self, opened: Opened, reaper: Reaper, log: LinkLog | None) -> None:
        self.before_renewal: Callable[[], Coroutine[Any, Any, None]] = _nothing  # what else is in the log leaves it
        self.wanted_nbytes: Callable[[], int] = lambda: 0  # of its memory, for what else may come to be in it
        self._geometry = opened.geometry
        self._mapping = opened.mapping
        self._reaper = reaper
        self._stability = opened.stability
        self._log = log  # None: no link may wait
        self._has_begun = False
        self._beginning = Mutex()
        self._next = Batch()
        self._in_file: list[range] = []  # guest clusters whose links are in the file, though they wait: a commit failed
        self._committing = Background(self._commit_batches, opened.stability)
        if log is not None:
            opened.mapping.cache.set_log(log.native)
            opened.mapping.before_load = self._gather
        self.set_policy(LinkPolicy())
        self._limit = 0 if log is None else min(log.capacity // 2, MAX_WAITING_BYTES // opened.geometry.subcluster_size)

    def set_policy(self, policy: LinkPolicy) -> None:
        """Do as *policy* says from now on."""
        self.policy = policy
        self._tell_map()

    def _tell_map(self) -> None:
        self._mapping.cache.set_logless(self._log is None or not self.policy.has_log)

    async def link(
        self, guest_offset: int, old_entries: Iterable[int], entries: Sequence[int], freed: Sequence[int]
    ) -> None:
        """Let *entries*, of one slice and locked, follow *old_entries*; their data is complete, and may be unstable.

        Process-safe on return. The host clusters *freed* lose a reference after that.
        Raises: OSError; the entries are then as they were, or the image takes no more writes.
        """
        if await self._can_wait(len(entries)):
            await self._let_wait(guest_offset, list(old_entries), entries, freed)
            return
        if self.is_waiting(guest_offset, len(entries)):
            await self.commit()
        await self._stability.sync()
        await self._mapping.link(guest_offset, entries)
        await self._reaper.free(freed)

    async def _can_wait(self, nclusters: int) -> bool:
        """Whether the log takes that many links, now."""
        while self._log is not None and self.policy.has_log and nclusters < self._log.capacity - 1:
            if not self._has_begun:
                await self._begin(self._log)
            elif self._log.is_lost:
                await self._give_up(self._log)
            elif not self.policy.may_wait() or (self._log.below and self._log.is_used_up(nclusters)):
                return False  # another log would not name what is below
            elif self._log.is_used_up(nclusters):
                await self._begin_another(self._log, nclusters)
            elif self._log.room < nclusters:
                await self.commit()
            else:
                self._stability.require_trust()
                return True
        return False

    async def _begin(self, log: LinkLog) -> None:
        async with self._beginning.hold():
            if self._has_begun or self._log is None:
                return
            try:
                await log.begin(self.wanted_nbytes())
            except OSError as error:
                self._lose_log(error)
                return
            self._has_begun = True
            log.open()

    async def _begin_another(self, log: LinkLog, nclusters: int) -> None:
        """Its numbers run out, and an old copy of the image must not find its own number in a later record."""
        log.close()
        await self.commit()
        await self.before_renewal()
        if log.is_used_up(nclusters):
            self.end_log()

    @property
    def log(self) -> LinkLog | None:
        """Where links wait, and live bits are; None if there is none."""
        return self._log

    @property
    def has_waiting(self) -> bool:
        """Whether a link waits, so that the mark is of its record."""
        self._gather()
        return self._mapping.holds

    async def begin_log(self, nbytes: int) -> bool:
        """Have a log in a memory of *nbytes* at least; False if there is one already, whatever its length.

        Raises: OSError if there is none to be had.
        """
        assert self._log is not None
        async with self._beginning.hold():
            if self._has_begun:
                return False
            await self._log.begin(nbytes)
            self._has_begun = True
            if self.policy.has_log:
                self._log.open()
            return True

    @property
    def may_wait(self) -> bool:
        """Whether links wait now, with a log."""
        return self._log is not None and self.policy.has_log and self.policy.may_wait()

    async def begin_early(self) -> None:
        """Have a log, if one is to be had, before a link waits."""
        if self._log is not None and self.policy.has_log:
            await self._begin(self._log)

    async def name_below(self, tag: int) -> bool:
        """Let whoever opens the image after a kill bring in what waits in the log *tag* of what is below; 0: nothing.

        Process-safe on return; False if it is not, for want of a log that has begun.
        Raises: OSError; then it is as it was, or takes no more writes.
        """
        if self._log is None or not self._has_begun or self._log.is_lost:
            return False
        if tag == self._log.below:
            return True
        try:
            await self._log.name_below(tag, has_waiting=self.has_waiting)
        except OSError as error:
            if not is_harmless(error):
                self._stability.fail(error)
            raise
        return True

    def end_log(self) -> None:
        """Let the next log be one with a tag of its own, if nothing is in this one."""
        log = self._log
        if log is not None and self._has_begun and not (self.has_waiting or log.has_live or log.below):
            log.close()
            log.renew()
            self._has_begun = False

    async def _give_up(self, log: LinkLog) -> None:
        """Somebody has removed the log (a cleaner, the end of its user's session): no link waits from now on."""
        log.close()
        await self.commit()
        if self._log is not None:
            self._lose_log(OSError(errno.ENOENT, "it was removed", log.path))

    def _lose_log(self, error: OSError) -> None:
        self._log = None
        self._tell_map()
        self.policy.on_log_lost(error)

    def _gather(self) -> None:
        """Take over the links that the extent map has let wait meanwhile; they are in the log and in memory."""
        links = [] if self._log is None else self._log.take_waiting()
        try:
            if links and not self._mapping.holds:
                self.policy.on_waiting(True)
            self._next.gathered.update(links)
            self._next.nclusters += len(links)
            self._mapping.remember_all(links)
        except MemoryError:  # whoever asked, be it a read: the log alone knows them now
            self._stability.fail(no_memory())
            raise

    async def _let_wait(
        self, guest_offset: int, old_entries: Sequence[int], entries: Sequence[int], freed: Sequence[int]
    ) -> None:
        """No await before the log has numbered the links: a commit that takes them must forget all of their records."""
        assert self._log is not None
        self._gather()
        first = self._geometry.cluster_of(guest_offset)
        links = map(Link, range(first, first + len(entries)), old_entries, entries)
        stored = self._log.append(links, lambda: self._mapping.hold(guest_offset, old_entries))
        batch = self._next
        batch.links.extend(batch.earlier(range(first, first + len(entries)), self._geometry.cluster_bits))
        batch.links.append((guest_offset, entries))
        batch.nclusters += len(entries)
        batch.freed.extend(freed)
        if not self._mapping.holds:
            self.policy.on_waiting(True)
        self._mapping.hold(guest_offset, entries)
        try:
            await stored
        except OSError as error:
            if not is_harmless(error):
                self._stability.fail(error)
                raise
            await self._do_without_log(batch, Unrecorded(guest_offset, entries, old_entries, freed), error)
        if batch.nclusters > self._limit:
            batch.is_wanted = True
            await self._committing.begin()

    async def _do_without_log(self, batch: Batch, link: Unrecorded, error: OSError) -> None:
        """Bring a link into the file whose record does not count: the host has no space, or no memory, for the mark.

        A commit may not need any. One that fails may have come so far; else it takes the link back. Memory has the old
        entries meanwhile: what somebody wrote to the new cluster, and was told is done, would be taken back, too.
        Raises: OSError; the entries are then as they were.
        """
        batch.unrecorded.append(link)
        self._mapping.hold(link.guest_offset, link.old_entries)
        try:
            await self.commit()
        except OSError as failure:
            error = failure
        if link.is_taken_back:
            raise error

    def _take_back(self, batch: Batch, link: Unrecorded) -> None:
        """Let a link of *batch*, whose commit failed, never have been, unless the file has it."""
        if any(self._geometry.cluster_of(link.guest_offset) in linked for linked in self._in_file):
            self._mapping.hold(link.guest_offset, link.entries)
            return
        link.is_taken_back = True
        batch.links = [one for one in batch.links if one[1] is not link.entries]
        batch.nclusters -= len(link.entries)
        for cluster in link.freed:
            batch.freed.remove(cluster)
        self._mapping.release(link.guest_offset, link.old_entries)
        for earlier in (*batch.links, *self._next.links):
            self._mapping.remember_again(*earlier, link.guest_offset, link.old_entries)
        self._gather()
        if not self._mapping.holds:
            self.policy.on_waiting(False)

    def is_waiting(self, guest_offset: int, nclusters: int) -> bool:
        """Whether the link of one of the clusters, all of one slice, waits."""
        self._gather()
        return self._mapping.is_held(guest_offset, nclusters)

    async def commit(self) -> None:
        """Return once every link that waits now is in the file, its data stable. Raises: OSError."""
        self._gather()
        if self._mapping.holds:
            batch = self._next
            batch.is_wanted = True
            await self._committing.begin()
            await batch.linked.wait()
            if batch.error is not None:
                raise batch.error

    async def flush(self) -> None:
        """Make every write that has completed stable, its link with it. Raises: OSError."""
        self._gather()
        if not self._mapping.holds:
            await self._stability.sync()
            return
        batch = self._next
        batch.is_wanted = batch.is_flushed = True
        await self._committing.begin()
        await batch.stable.wait()
        if batch.error is not None:
            raise batch.error

    async def close(self) -> None:
        """Commit, so that no log belongs to the image; process-safe on return. Nothing else is under way."""
        if self._log is not None:
            self._log.close()
        await self.commit()
        self._has_begun = False

    async def _commit_batches(self) -> None:
        """Commit as long as somebody wants it. One SYNC makes the last links stable, and the next ones' data."""
        last = batch = self._next
        try:
            last = Batch()
            while self._next.is_wanted or last.is_flushed:
                batch = Batch()
                self._gather()  # what is in the log before the mark is in this batch
                if self._next.is_wanted:
                    batch, self._next = self._next, batch
                last = await self._commit(batch, last)
        except MemoryError as error:
            known = self._outcome(error)
            for each in (last, batch, self._next):
                each.end(known)

    async def _commit(self, batch: Batch, last: Batch) -> Batch:
        """Let the links of *batch* be in the file, and those of *last* stable; the batch that is to be stable next."""
        self._in_file.clear()
        mark = 0 if self._log is None else self._log.next  # no link of *batch* has this number or a later one
        try:
            await self._stability.sync()
        except (OSError, MemoryError) as error:
            known = self._outcome(error)
            last.end(known)
            self._fail(batch, known)
            return Batch()
        last.end()
        if not batch.links and not batch.gathered:
            batch.end()
            return Batch()
        try:
            await self._write(batch, mark)
        except (OSError, MemoryError) as error:
            self._fail(batch, self._outcome(error))
            return Batch()
        batch.linked.set()
        return batch

    async def _write(self, batch: Batch, mark: int) -> None:
        """Bring the links of *batch*, whose data is stable, into the file; the log forgets what came before *mark*."""
        joined = list(batch.joined(self._geometry))
        await self._mapping.bring_all(joined, self._in_file.append)
        await self._forget(mark)
        self._in_file.clear()
        for link in batch.unrecorded:
            self._mapping.hold(link.guest_offset, link.entries)
        for guest_offset, entries in joined:
            self._mapping.release(guest_offset, entries)
        self._gather()
        if not self._mapping.holds:
            self.policy.on_waiting(False)
        await self._reaper.free(batch.freed)

    def _outcome(self, error: OSError | MemoryError) -> OSError:
        """What those are told who wait. Where memory ran out in the middle, nobody knows how far the commit came."""
        if isinstance(error, OSError):
            return error
        self._stability.fail(no_memory())
        return no_memory()

    def _fail(self, batch: Batch, error: OSError) -> None:
        """Let the links of *batch* wait on, though some may be in the file; it was for want of space, or for good."""
        for link in batch.unrecorded:
            self._take_back(batch, link)
        self._next.links[:0] = batch.links + batch.earlier(list(batch.gathered), self._geometry.cluster_bits)
        self._next.nclusters += batch.nclusters
        self._next.freed[:0] = batch.freed
        batch.end(error)

    async def _forget(self, mark: int) -> None:
        assert self._log is not None  # links waited
        try:
            await self._log.forget(mark)
        except OSError as error:
            if not is_harmless(error):
                self._stability.fail(error)  # what it would bring back may be wrong by then
            raise
