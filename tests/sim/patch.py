"""Faults put into the engine on purpose, which only show beside a data plane; imported once the variant is loaded."""

from collections.abc import Callable, Sequence

import pytest

from qcow2.engine.links import Links

Patch = pytest.MonkeyPatch
Waiting = tuple[Sequence[int], Sequence[int], Sequence[int]]  # entries, old entries, freed clusters


def links_of_the_data_plane_are_not_taken_over(patch: Patch) -> None:
    """A commit leaves them out."""
    patch.setattr(Links, "_gather", lambda self: None)


def once_a_link_outlived_its_cluster(patch: Patch) -> None:
    """A link that no log has is not taken back if its commit fails, though its request does."""

    async def do_without_log(self: Links, guest_offset: int, link: Waiting, error: OSError) -> None:
        await self.commit()

    patch.setattr(Links, "_do_without_log", do_without_log)


def once_two_links_waited_for_each_other(patch: Patch) -> None:
    """Each waits for a commit that the other had wanted, and finds its own link under way again."""

    def take_back(self: Links, guest_offset: int, link: Waiting) -> bool:
        batch, (entries, old_entries, freed) = self._next, link
        if not any(one is entries for _, one in batch.links):
            return False
        batch.links = [one for one in batch.links if one[1] is not entries]
        batch.nclusters -= len(entries)
        for cluster in freed:
            batch.freed.remove(cluster)
        self._mapping.take_back(guest_offset, entries, old_entries)
        if not self._mapping.holds:
            self.policy.on_waiting(False)
        return True

    async def do_without_log(self: Links, guest_offset: int, link: Waiting, error: OSError) -> None:
        while True:
            try:
                await self.commit()
            except OSError:
                if not self._is_in_file(guest_offset):
                    if take_back(self, guest_offset, link):
                        raise
                    continue
            return

    patch.setattr(Links, "_do_without_log", do_without_log)


PATCHES: list[Callable[[Patch], None]] = [
    links_of_the_data_plane_are_not_taken_over,
    once_a_link_outlived_its_cluster,
    once_two_links_waited_for_each_other,
]


def apply(name: str) -> None:
    """Let the engine of this process have the fault *name*."""
    next(patch for patch in PATCHES if patch.__name__ == name)(pytest.MonkeyPatch())
