"""The judge can fail: each law, broken on purpose in the engine, is found by the explorer.

The only tests that patch the engine: a mutant is the point of them.
"""

from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from qcow2.allocation import Allocator
from qcow2.image import Image
from qcow2.linklog import LinkLog
from qcow2.links import Links
from qcow2.operation import Store
from qcow2.reaper import Reaper
from qcow2.refcount import Refcounts
from qcow2.replay import Outcome
from qcow2.root import Root
from qcow2.stability import Stability
from qcow2.write import Writer
from tests.crash.explorer import Explorer, Violation
from tests.crash.images import KINDS, Kind
from tests.crash.judge import opener, perform
from tests.crash.workload import Action, random_steps

Patch = pytest.MonkeyPatch


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
    fill: Callable[..., Awaitable[bool]] = Writer._fill

    async def linked_first(self: Writer, run: Any, guest_offset: int, source: Any, new: range) -> bool:
        start, bits = self._geometry.round_down(guest_offset), self._geometry.cluster_bits
        await self._root.allow_uncounted()
        await self._mapping.link(start, self._entries(len(new), new.start << bits))
        return await fill(self, run, guest_offset, source, new)

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
        return Outcome(is_void=False)

    patch.setattr("tests.crash.images.replay", ignore)


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

    async def keep(self: Refcounts, index: int, block: Any, old: bytes) -> None:
        block.is_changed = True

    patch.setattr(Refcounts, "_write_changed", keep)


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


MUTANTS = {
    flush_does_nothing: ["snapshot", "width-64"],
    copy_is_linked_before_it_is_stable: ["small-backing"],
    link_comes_before_the_data: ["small-backing"],
    waiting_link_is_not_logged: ["small-backing"],
    log_is_not_replayed: ["small-backing"],
    log_forgets_before_the_links_are_written: ["small-backing"],
    changed_though_its_link_waits: ["small-backing"],
    refcounts_are_not_written: ["width-64", "small"],
    dirty_bit_is_not_set: ["small-lazy", "compressed-lazy"],
    freed_before_the_link_is_gone: ["width-64", "compressed"],
    reserved_without_a_sync: ["small", "width-64"],
    block_is_written_after_its_pointer: ["width-64"],
}


def workloads(kind: Kind) -> Iterator[list[list[Action]]]:
    """Random ones, zeros over what was just written, and one that fills the disk, making refcount blocks and tables."""
    for seed in range(4):
        yield random_steps(seed, kind.nsectors, kind.cluster_sectors)
    yield [[Action("write", 3, 2)], [Action("zero", 3, 2)], [Action("flush")]]
    yield [[Action("write", sector, min(16, kind.nsectors - sector))] for sector in range(0, kind.nsectors, 16)]


def explore(names: list[str]) -> None:
    """Visit every point of every workload on images of these kinds."""
    for name in names:
        for seed, steps in enumerate(workloads(KINDS[name])):
            run = perform(name, steps, seed=seed, writethrough=False)
            Explorer(run, opener(name), seed).explore()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutant_is_found(mutant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mutant(monkeypatch)
    with pytest.raises(Violation):
        explore(MUTANTS[mutant])


def test_a_disk_that_fills_makes_blocks_and_tables_in_order() -> None:
    *_, filling = workloads(KINDS["width-64"])
    run = perform("width-64", filling, seed=0, writethrough=True)
    assert Explorer(run, opener("width-64"), 0).explore() > 100
