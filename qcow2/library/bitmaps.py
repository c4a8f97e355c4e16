"""The persistent dirty bitmaps of a disk, as ordinary Python uses them."""

import os
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from qcow2.engine.bitmapdirectory import Change
from qcow2.engine.bitmaptable import StoredBitmap, set_runs
from qcow2.engine.image import Image
from qcow2.error import BitmapError

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

    They are of the disk as it is now: a disk that is open as a snapshot may have another length.
    What changes them is stable on return, and needs a disk that is open for writing.
    """

    def __init__(self, image: Callable[[], Image], run: Run) -> None:
        self._image = image
        self._run = run

    def __repr__(self) -> str:
        return f"<qcow2 bitmaps {[bitmap.name for bitmap in self]}>"

    def __iter__(self) -> Iterator[Bitmap]:
        """Raises: UnsupportedImage, CorruptImage, OSError."""
        found: list[StoredBitmap] = self._run(self._image().bitmaps)
        return iter(
            [
                Bitmap(
                    os.fsdecode(stored.bitmap.raw_name),
                    1 << stored.bitmap.record.granularity_bits,
                    stored.is_kept,
                    stored.is_usable,
                )
                for stored in found
            ]
        )

    def _look(self, name: str) -> "_Look":
        look: _Look = self._run(partial(_look, self._image(), name))
        return look

    def dirty(self, name: str) -> Iterator[tuple[int, int]]:
        """What has changed, as of now: offset and length of each stretch of the disk.

        Raises: BitmapError, which is a ValueError, for a bitmap that is not there or says nothing; OSError.
        """
        bits, order, size = self._look(name)
        return ((first << order, min(end << order, size) - (first << order)) for first, end in set_runs(bits))

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
        bits, granularity_bits, size = (self if disk is None else disk.bitmaps)._look(source)
        self._change(lambda plan: plan.merge(name, bits, granularity_bits, size))

    def _change(self, change: Change) -> None:
        image = self._image()
        self._run(lambda: image.change_bitmaps(change))


class _Look(NamedTuple):
    """What a bitmap says at one moment."""

    bits: bytes
    granularity_bits: int
    size: int  # of the disk


async def _look(image: Image, name: str) -> _Look:
    """Raises: BitmapError, OSError."""
    for stored in await image.bitmaps():
        if stored.bitmap.raw_name == os.fsencode(name):
            if not stored.is_usable:
                raise BitmapError(f"Bitmap '{name}' is inconsistent and cannot be used")
            bits = await image.bitmap_bits(stored)
            return _Look(bits, stored.bitmap.record.granularity_bits, await image.bitmapped_size())
    raise BitmapError(f"Dirty bitmap '{name}' not found")
