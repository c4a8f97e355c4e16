"""Law 11 by enumeration: whatever a death leaves, no bitmap says too little; after a kill it says exactly enough.

`python -m tests.crash.bitmaps FIRST LAST` explores random workloads of these seeds on every kind of image.
Judged are the bitmaps as the file has them, which is what another program finds, and as our next open leaves them.
"""

import sys
from collections.abc import Sequence

from tests.bitmapreader import Bitmap, read_bitmaps
from tests.crash.driver import SimulatedFile
from tests.crash.explorer import Opener, Violation
from tests.crash.history import SECTOR, History
from tests.crash.images import BITMAPS
from tests.crash.judge import opener, perform
from tests.crash.recovering import RecoveringExplorer
from tests.crash.workload import Step, random_steps

NAMES = {"fine", "coarse"}


def bitmap_opener(kind: str) -> Opener:
    """As `opener`; the disk is followed by a byte a sector of what the bitmaps say, before and after."""
    base = opener(kind)
    nsectors = BITMAPS[kind].nsectors

    def open_(image: SimulatedFile) -> bytes:
        before = said(read_bitmaps(image.read), nsectors)
        content = base(image)
        return bytes(content) + before + said(read_bitmaps(image.read), nsectors)

    return open_


def said(bitmaps: dict[str, Bitmap], nsectors: int) -> bytes:
    """For each sector: 1 if it is in every bitmap, 2 if it is in the fine one."""
    if not bitmaps.keys() >= NAMES or not all(bitmap.is_valid for bitmap in bitmaps.values()):
        raise Violation(f"bitmaps {bitmaps} are not {NAMES}, all valid")
    dirty = [bitmaps[name].sectors() for name in NAMES]
    every, fine = set.intersection(*dirty), bitmaps["fine"].sectors()
    return bytes((sector in every) | (sector in fine) << 1 for sector in range(nsectors))


class BitmapExplorer(RecoveringExplorer):
    """Judges the disk, and what the bitmaps say of it."""

    def _compare(self, content: bytes, position: int, where: str, *, power: bool) -> None:
        nsectors = len(content) // (SECTOR + 2)
        disk, said_before, said_after = (
            content[: nsectors * SECTOR],
            content[nsectors * SECTOR : nsectors * (SECTOR + 1)],
            content[nsectors * (SECTOR + 1) :],
        )
        super()._compare(disk, position, where, power=power)
        for sector in range(nsectors):
            changed = disk[sector * SECTOR : (sector + 1) * SECTOR] != self.run.history.before(sector)
            if changed and not (said_before[sector] & said_after[sector] & 1):
                raise Violation(f"{where}: sector {sector} has changed, and a bitmap does not say so")
        if not power:
            self._require_exact(said_after, position, where)

    def _require_exact(self, said_after: bytes, position: int, where: str) -> None:
        begun, acked = requested(self.run.history, position)
        fine = {sector for sector, bits in enumerate(said_after) if bits & 2}
        if not acked <= fine:
            raise Violation(f"{where}: the bitmap misses sectors {sorted(acked - fine)}")
        if not fine <= begun:
            raise Violation(f"{where}: the bitmap has sectors {sorted(fine - begun)}, which nobody wrote")


def requested(history: History, position: int) -> tuple[set[int], set[int]]:
    """The sectors that requests begun, and acknowledged, before *position* were for."""
    begun, acked = set(), set()
    for sector, versions in history.versions.items():
        for version in versions[1:]:
            if version.begun < position:
                begun.add(sector)
            if version.acked is not None and version.acked < position:
                acked.add(sector)
    return begun, acked


def explore(
    kind: str, seed: int, *, writethrough: bool = False, steps: Sequence[Step] | None = None, stride: int = 1
) -> int:
    """Judge the states of a workload, at random if *steps* are not given; how many there were."""
    if steps is None:
        steps = random_steps(seed, BITMAPS[kind].nsectors, BITMAPS[kind].cluster_sectors)
    run = perform(kind, steps, seed=seed, writethrough=writethrough)
    return BitmapExplorer(run, bitmap_opener(kind), seed).explore(stride=stride)


def main(first: str, last: str) -> None:
    """Explore the workloads of the seeds from *first* up to *last*."""
    total = 0
    for seed in range(int(first), int(last)):
        for kind in BITMAPS:
            for writethrough in (False, True):
                states = explore(kind, seed, writethrough=writethrough)
                total += states
                print(f"{kind} seed={seed} writethrough={writethrough}: {states} states", flush=True)
    print(f"{total} states, no violation")


if __name__ == "__main__":
    main(*sys.argv[1:])
