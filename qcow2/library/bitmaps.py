"""The persistent dirty bitmaps of a disk, as ordinary Python uses them."""

import os
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qcow2.engine.bitmapdirectory import Change
from qcow2.engine.bitmaptable import StoredBitmap, set_runs
from qcow2.engine.image import Image
from qcow2.error import BitmapError
from qcow2.format.bitmap import Bitmap as StoredEntry

if TYPE_CHECKING:
    from qcow2.library.disk import Disk

Run = Callable[[Callable[[], Coroutine[Any, Any, Any]]], Any]


@dataclass(frozen=True, slots=True)
class Bitmap:
    """One bitmap, as it was when it was asked for."""

    name: str
    granularity: int  # bytes of the disk a bit stands for
    is_enabled: bool  # it records every change
    is_valid: bool  # what it says can be used


class Bitmaps:
    """The bitmaps of one disk; iterating gives them in the order of their directory.

    What changes them is stable on return, and needs a disk that is open for writing.
    """

    def __init__(self, image: Callable[[], Image], run: Run) -> None:
        self._image = image
        self._run = run

    def __repr__(self) -> str:
        return f"<qcow2 bitmaps {[bitmap.name for bitmap in self]}>"

    def __iter__(self) -> Iterator[Bitmap]:
        """Raises: UnsupportedImage, CorruptImage, OSError."""
        for stored in self._stored():
            record = stored.bitmap.record
            name = os.fsdecode(stored.bitmap.raw_name)
            yield Bitmap(name, 1 << record.granularity_bits, stored.is_kept, stored.is_usable)

    def _stored(self) -> list[StoredBitmap]:
        image = self._image()
        found: list[StoredBitmap] = self._run(image.bitmaps)
        return found

    def _find(self, name: str) -> StoredBitmap:
        for stored in self._stored():
            if stored.bitmap.raw_name == os.fsencode(name):
                if not stored.is_usable:
                    raise BitmapError(f"Bitmap '{name}' is inconsistent and cannot be used")
                return stored
        raise BitmapError(f"Dirty bitmap '{name}' not found")

    def dirty(self, name: str) -> Iterator[tuple[int, int]]:
        """What has changed, as of now: offset and length of each stretch of the disk.

        Raises: BitmapError, which is a ValueError, for a bitmap that is not there or says nothing; OSError.
        """
        image, stored = self._image(), self._find(name)
        bits = stored.bitmap.record.granularity_bits
        for first, end in set_runs(self._run(lambda: image.bitmap_bits(stored))):
            start = first << bits
            yield start, min(end << bits, image.size) - start

    def add(self, name: str, granularity: int | None = None, *, enabled: bool = True) -> None:
        """Make an empty bitmap, a bit for *granularity* bytes; by default a cluster, from 4 to 64 KiB.

        Raises: BitmapError, UnsupportedImage, OSError.
        """
        self._change(lambda plan: plan.add(name, granularity, enabled=enabled))

    def remove(self, name: str) -> None:
        """Forget a bitmap, valid or not. Raises: BitmapError, OSError."""
        self._change(lambda plan: plan.remove(name))

    def clear(self, name: str) -> None:
        """Let nothing be dirty. Raises: BitmapError, OSError."""
        self._change(lambda plan: plan.clear(name))

    def enable(self, name: str) -> None:
        """Record from now on. Raises: BitmapError, OSError."""
        self._change(lambda plan: plan.enable(name, on=True))

    def disable(self, name: str) -> None:
        """Record no more. Raises: BitmapError, OSError."""
        self._change(lambda plan: plan.enable(name, on=False))

    def merge(self, name: str, source: str, disk: "Disk | None" = None) -> None:
        """Let *name* report what the bitmap *source*, of this disk or of *disk*, reports, too.

        The granularities may differ: what a bit stands for is rounded out.
        Raises: BitmapError, also if the disks have different sizes; OSError.
        """
        self._find(name)
        other = self if disk is None else disk.bitmaps
        stored, size = other._find(source), other._image().size
        bits: bytes = other._run(lambda: other._image().bitmap_bits(stored))
        granularity_bits = stored.bitmap.record.granularity_bits
        self._change(lambda plan: plan.merge(name, bits, granularity_bits, size))

    def copy(self, bitmap: StoredEntry, bits: bytes, size: int) -> None:
        """Make a bitmap like one of a disk of *size* bytes, with its *bits*. Raises: BitmapError, OSError."""
        self._change(lambda plan: plan.copy(bitmap, bits, size))

    def _change(self, change: Change) -> None:
        image = self._image()
        self._run(lambda: image.change_bitmaps(change))
