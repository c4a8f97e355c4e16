"""What internal snapshots see of the files below: a commit to one of those must not change it under them."""

from qcow2.engine.image import Image
from qcow2.engine.opened import OpenOptions
from qcow2.error import UnsupportedImage
from qcow2.format.snapshot import Snapshot
from qcow2.job.pace import Pace
from qcow2.node.extent import Extent, find_extent
from qcow2.node.node import Node


class SeenBySnapshot(UnsupportedImage):
    """An internal snapshot shows what would change."""


async def require_hidden(overlay: Image, base: Node, depth: int, pace: Pace) -> None:
    """Return if no internal snapshot of *overlay* sees what a commit writes to *base*, *depth* files below.

    Only mappings are looked at: what a commit would write over the same bytes counts as a change.
    Raises: SeenBySnapshot, which names it; OSError, CorruptImage, Cancelled.
    """
    for snapshot in await overlay.snapshots():
        options = OpenOptions(snapshot=snapshot.id, has_data=False)
        seen = await Image.open(overlay.file, backing=overlay.backing, options=options)
        offset, end = 0, min(seen.size, overlay.size)
        while offset < end:
            pace.require_going()
            await pace.give_way()
            now = await find_extent(overlay, offset, end - offset)
            if now.depth < depth:
                then = await find_extent(seen, offset, now.nbytes)
                if _comes_from_base(then, depth) and not await _is_zero_already(base, now, then.nbytes):
                    raise _refusal(overlay, snapshot, base, offset)
                offset += then.nbytes
            else:
                offset += now.nbytes


def _comes_from_base(then: Extent, depth: int) -> bool:
    """Whether the base shows there, or would if it were longer."""
    return then.depth >= depth or (then.depth == depth - 1 and not then.is_present)


async def _is_zero_already(base: Node, now: Extent, nbytes: int) -> bool:
    """Whether zeros are committed to where zeros are."""
    if not now.is_zero:
        return False
    inside = min(nbytes, base.size - now.guest_offset)
    return inside <= 0 or await base.reads_as_zeros(now.guest_offset, inside)


def _refusal(overlay: Image, snapshot: Snapshot, base: Node, offset: int) -> SeenBySnapshot:
    where = f"at {offset} it sees {base.file.path}, which would change"
    return SeenBySnapshot(
        overlay.file.path, f"internal snapshot {snapshot.name!r} would show another disk: {where}; delete it first"
    )
