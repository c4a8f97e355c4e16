"""Law 11 by enumeration, and the judge of it by mutants: bits that come late, zones that are not stable, and so on."""

from collections.abc import Callable
from typing import Any

import pytest

from qcow2.engine.bitmaps import Bitmaps
from qcow2.engine.image import Image
from tests.bitmapreader import read_bitmaps
from tests.crash.bitmaps import explore
from tests.crash.driver import SimulatedFile
from tests.crash.explorer import Explorer, Violation
from tests.crash.images import BITMAPS
from tests.crash.mutant import without_syncs
from tests.crash.workload import BITMAP_CHANGES, FREEZE, THAW, Action, random_steps
from tests.file import test_crash_resize

Patch = pytest.MonkeyPatch


@pytest.mark.sample(2)
@pytest.mark.parametrize("writethrough", [False, True], ids=["writeback", "writethrough"])
@pytest.mark.parametrize("kind", BITMAPS)
def test_no_death_leaves_a_bitmap_that_says_too_little(kind: str, writethrough: bool) -> None:
    steps = random_steps(3, BITMAPS[kind].nsectors, BITMAPS[kind].cluster_sectors, steps=4, depth=2)
    assert explore(kind, 3, steps=steps, writethrough=writethrough) > 100


def test_nor_does_one_after_the_image_was_closed_and_opened() -> None:
    steps = [[Action("write", 3, 2)], [Action("reopen")], [Action("write", 90, 1), Action("discard", 3, 1)]]
    assert explore("bitmaps", 0, steps=steps) > 100


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", BITMAPS)
def test_nor_does_one_while_bitmaps_come_and_go(kind: str) -> None:
    """Between requests, whose links and zones are as those left them."""
    requests = iter(random_steps(5, BITMAPS[kind].nsectors, BITMAPS[kind].cluster_sectors, steps=6, depth=2))
    changes = ([Action("bitmaps", number)] for number in (*BITMAP_CHANGES, FREEZE, THAW))
    steps = [step for change in changes for step in (next(requests), change)]
    assert explore(kind, 5, steps=[*steps, next(requests)], stride=6) > 100


@pytest.mark.parametrize("kind", ["bitmaps", "bitmaps-lazy"])
def test_no_death_while_the_disk_grows_leaves_bitmaps_of_another_size(kind: str) -> None:
    run = test_crash_resize.perform(kind, [300, 5000], 3, writethrough=True)
    look = test_crash_resize.sized_opener(kind, test_crash_resize.WATCHED)

    def judged(file: SimulatedFile) -> bytes:
        assert read_bitmaps(file.read).keys() == {"fine", "coarse"}
        content = look(file)
        assert read_bitmaps(file.read).keys() == {"fine", "coarse"}
        return content

    assert Explorer(run, judged).explore(stride=10) > 50


def bit_comes_late(patch: Patch) -> None:
    """The bit is set once the request is done."""
    write, mark = Image.write, Bitmaps.mark

    async def late(self: Image, guest_offset: int, source: Any) -> None:
        await write(self, guest_offset, source)
        assert self._changes is not None
        await mark(self._changes.bitmaps, guest_offset, len(source))

    async def never(self: Bitmaps, guest_offset: int, nbytes: int) -> None:
        """Not yet."""

    patch.setattr(Image, "write", late)
    patch.setattr(Bitmaps, "mark", never)


def zone_is_not_stable(patch: Patch) -> None:
    """The bits of a zone may be lost, and the data be there."""
    without_syncs(patch, Bitmaps)


def live_bits_are_not_shared(patch: Patch) -> None:
    """The bits are where no other process finds them."""

    async def nowhere(self: Bitmaps, guest_offset: int, nbytes: int) -> None:
        """Only in this process."""

    patch.setattr(Bitmaps, "_mirror", nowhere)


def close_forgets_the_hot_zones(patch: Patch) -> None:
    """The image is closed with whole zones in its bitmaps."""
    write = Bitmaps._write_zones

    async def forgetful(self: Bitmaps, zones: Any, hot: set[int]) -> None:
        if hot:
            await write(self, zones, hot)

    patch.setattr(Bitmaps, "_write_zones", forgetful)


@pytest.mark.parametrize(
    "mutant",
    [bit_comes_late, zone_is_not_stable, live_bits_are_not_shared, close_forgets_the_hot_zones],
    ids=lambda mutant: mutant.__name__,
)
def test_mutant_is_found(mutant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mutant(monkeypatch)
    steps = [[Action("write", 3, 2), Action("write", 40, 3)], [Action("write", 3, 1)], [Action("flush")]]
    with pytest.raises(Violation):
        explore("bitmaps", 1, steps=steps)
