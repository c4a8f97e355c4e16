"""Faults put into the engine on purpose, which only show beside a data plane; imported once the variant is loaded."""

from collections.abc import Callable

import pytest

from qcow2.driver.operation import Grace, Zero
from qcow2.engine.allocation import Allocator
from qcow2.engine.batch import Batch, Unrecorded
from qcow2.engine.links import Links
from qcow2.engine.reaper import Reaper
from qcow2.plane.l2cache import L2Cache
from qcow2.plane.linklog import NOTHING, FoundLog, Link, LinkLog

Patch = pytest.MonkeyPatch


def links_of_the_data_plane_are_not_taken_over(patch: Patch) -> None:
    """A commit leaves them out."""
    patch.setattr(Links, "_gather", lambda self: None)


def clusters_of_encrypted_images_are_not_blanked(patch: Patch) -> None:
    """They are zeros, which decrypt to anything."""

    async def blank(self: Allocator, area: range) -> None:
        await Zero(self._file, area.start << self._geometry.cluster_bits, len(area) << self._geometry.cluster_bits)

    patch.setattr(Allocator, "_blank", blank)


def data_plane_frees_without_a_sync(patch: Patch) -> None:
    """What the data plane frees while a batch is being synced joins that batch."""

    async def release(self: Reaper, batch: list[int]) -> None:
        await self._stability.sync()
        await Grace()
        self._gather()
        batch += self._waiting
        self._waiting = []
        await self._count_down(sorted(batch))

    patch.setattr(Reaper, "_release", release)


def part_of_what_waited_will_do(patch: Patch) -> None:
    """Of the links that waited at a moment those will do that are still there."""

    def links_at(self: FoundLog, stamp: int) -> list[Link] | None:
        known = [record for number, record in sorted(self.records.items()) if number < stamp]
        if not known:
            return None if stamp else []
        return [Link(*record[:3]) for record in known if record[3] >= known[-1][4] and record[0] != NOTHING]

    patch.setattr(FoundLog, "links_at", links_at)


def once_a_link_outlived_its_cluster(patch: Patch) -> None:
    """A link that no log has is not taken back if its commit fails, though its request does."""

    async def do_without_log(self: Links, batch: Batch, link: Unrecorded, error: OSError) -> None:
        await self.commit()

    patch.setattr(Links, "_do_without_log", do_without_log)


def once_two_links_waited_for_each_other(patch: Patch) -> None:
    """Each waits for a commit that the other had wanted, and finds its own link under way again."""

    def take_back(self: Links, link: Unrecorded) -> bool:
        batch, entries = self._next, link.entries
        if not any(one is entries for _, one in batch.links):
            return False
        batch.links = [one for one in batch.links if one[1] is not entries]
        batch.nclusters -= len(entries)
        for cluster in link.freed:
            batch.freed.remove(cluster)
        self._mapping.release(link.guest_offset, link.old_entries)
        if not self._mapping.holds:
            self.policy.on_waiting(False)
        return True

    async def do_without_log(self: Links, batch: Batch, link: Unrecorded, error: OSError) -> None:
        self._mapping.hold(link.guest_offset, link.old_entries)
        while True:
            try:
                await self.commit()
            except OSError:
                if any(self._geometry.cluster_of(link.guest_offset) in linked for linked in self._in_file):
                    self._mapping.hold(link.guest_offset, link.entries)
                    return
                if take_back(self, link):
                    raise
            else:
                self._mapping.hold(link.guest_offset, link.entries)
                self._mapping.release(link.guest_offset, link.entries)
                return

    patch.setattr(Links, "_do_without_log", do_without_log)


def once_a_link_without_a_record_was_seen(patch: Patch) -> None:
    """Who writes to its cluster is told so, and that is taken back with the link."""

    async def do_without_log(self: Links, batch: Batch, link: Unrecorded, error: OSError) -> None:
        batch.unrecorded.append(link)
        try:
            await self.commit()
        except OSError as failure:
            error = failure
        if link.is_taken_back:
            self._mapping.release(link.guest_offset, link.entries)
            self._mapping.cache.update(link.guest_offset, link.old_entries)
            raise error

    append = LinkLog.append
    patch.setattr(LinkLog, "append", lambda self, links, undo=None: append(self, links))  # which hides it, too
    patch.setattr(Links, "_do_without_log", do_without_log)


def engine_does_not_wait_for_a_place_that_is_held(patch: Patch) -> None:
    """Whoever has locked a cluster decides while the data plane still writes there."""
    patch.setattr(L2Cache, "is_there", lambda self, first, last: False)


PATCHES: list[Callable[[Patch], None]] = [
    links_of_the_data_plane_are_not_taken_over,
    clusters_of_encrypted_images_are_not_blanked,
    data_plane_frees_without_a_sync,
    part_of_what_waited_will_do,
    once_a_link_outlived_its_cluster,
    once_two_links_waited_for_each_other,
    once_a_link_without_a_record_was_seen,
    engine_does_not_wait_for_a_place_that_is_held,
]


def apply(name: str) -> None:
    """Let the engine of this process have the fault *name*."""
    next(patch for patch in PATCHES if patch.__name__ == name)(pytest.MonkeyPatch())
