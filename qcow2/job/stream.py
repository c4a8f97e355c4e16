"""Make an overlay independent of what is between it and a base, or of everything below, while a guest may write to it.

It is a rebase onto a part of its own chain. Killed at any moment the overlay shows the same, and merely has more.
"""

import os
from itertools import pairwise

from qcow2.engine.image import Image
from qcow2.job.crew import Windows
from qcow2.job.pace import Pace
from qcow2.job.rebase import copy_difference
from qcow2.node.gate import backing_path, is_from_here
from qcow2.node.node import Node


async def stream(overlay: Image, base: Node | None, pace: Pace, windows: Windows | None = None) -> None:
    """Let *overlay* have what shows through from above *base*, which is under it, or from anywhere below.

    Stable on return; then `Image.put_over` *base* changes nothing that is seen.
    Raises: UnsupportedImage if internal snapshots would show another disk over *base*; OSError, ImageError, Cancelled.
    """
    overlay.refuse_snapshots()
    await copy_difference(overlay, base, pace, windows)
    await overlay.flush()


def name_of_base(overlay: Image, base: Node | None) -> tuple[str | None, str | None]:
    """What *overlay* may call *base*, which is under it, and its format: as those between say, one after the other."""
    name, image_format = "", None
    if base is None:
        return None, None
    for above, below in pairwise(overlay.chain):
        assert isinstance(above, Image)  # nothing else has a backing file
        assert above.header.backing_name is not None
        name = _from_top(name, above.header.backing_name)
        image_format = above.header.backing_format
        if below is base:
            return name, image_format
    raise ValueError(f"{base.file.path} is not under {overlay.file.path}")


def _from_top(namer: str, name: str) -> str:
    """What the image that the top calls *namer* calls *name*, called so by the top; "" is the top itself."""
    if is_from_here(name):
        return name
    if is_from_here(namer):
        return os.path.join(os.path.dirname(os.path.abspath(backing_path("", namer))), name)
    return os.path.join(os.path.dirname(namer), name)
