"""The bitmaps that a snapshot's overlay has from its first moment: new ones, or those of the disk as it was."""

from dataclasses import dataclass

from qcow2.driver.file import run
from qcow2.engine.bitmapplan import BitmapPlan
from qcow2.engine.image import Image
from qcow2.format.bitmap import Bitmap

Found = list[tuple[Bitmap, bytes]]


@dataclass(frozen=True, slots=True)
class OverlayBitmaps:
    """Which are *added*, empty, and whether all that can be used are *carried* over with what they report."""

    added: tuple[str, ...] = ()
    are_carried: bool = False

    @property
    def are_any(self) -> bool:
        """Whether the overlay may have one."""
        return self.are_carried or bool(self.added)

    def add(self, overlay: Image) -> None:
        """Let *overlay*, which nobody uses yet, have those that are added; stable on return.

        Raises: BitmapError, UnsupportedImage, OSError.
        """

        async def plan(bitmaps: BitmapPlan) -> None:
            for name in self.added:
                await bitmaps.add(name, None, enabled=True)

        if self.added:
            run(overlay.change_bitmaps(plan))

    async def look(self, below: Image) -> Found:
        """What is carried, of this moment. Raises: OSError."""
        usable = [each for each in await below.bitmaps() if each.is_usable] if self.are_carried else []
        return [(each.bitmap, await below.bitmap_bits(each)) for each in usable]

    @staticmethod
    def carry(overlay: Image, found: Found) -> None:
        """Let *overlay*, which nobody uses yet, have what was *found*; stable on return.

        Raises: BitmapError, UnsupportedImage, OSError.
        """

        async def plan(bitmaps: BitmapPlan) -> None:
            for bitmap, bits in found:
                await bitmaps.copy(bitmap, bits, overlay.size)

        if found:
            run(overlay.change_bitmaps(plan))
