"""Dirty bitmaps of the source of `qcow2 convert`, made again in the target once it holds the disk: all, or none."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from qcow2.driver.file import run
from qcow2.engine.bitmapplan import BitmapPlan
from qcow2.engine.bitmaptable import StoredBitmap
from qcow2.engine.image import Image
from qcow2.error import BitmapError, ImageError
from qcow2.format.bitmap import Bitmap
from qcow2.node.formats import format_of
from qcow2.node.node import Node
from qcow2.tool.failure import Failure, reason_of
from qcow2.tool.identity import program, say
from qcow2.tool.target import Wish


@dataclass(frozen=True, slots=True)
class Copied:
    """A bitmap with its bits, and the size of the disk they are of."""

    bitmap: Bitmap
    bits: bytes
    size: int


def bitmaps_to_copy(wish: Wish, images: Sequence[Node], arguments: argparse.Namespace) -> list[Copied]:
    """Those of the one source. Raises: Failure, before the target is touched; OSError."""
    (image,) = images
    if not (isinstance(image, Image) and image.geometry.can_have_bitmaps):
        raise Failure("Source lacks bitmap support")
    if not format_of(wish.path, wish.image_format).has_metadata or wish.given.get("compat") in ("0.10", "v2"):
        raise Failure(f"Format driver '{wish.image_format}' does not support bitmaps")
    every = run(image.bitmaps())
    if every and (size := run(image.bitmapped_size())) != image.size:
        text = f"bitmaps are of the disk as it is now, of {size} bytes: a snapshot of {image.size} bytes has none"
        raise Failure(f"{image.file.path}: {text}")
    stored = [each for each in every if not _is_skipped(each, arguments)]
    return [Copied(each.bitmap, run(image.bitmap_bits(each)), image.size) for each in stored]


def _is_skipped(stored: StoredBitmap, arguments: argparse.Namespace) -> bool:
    if not stored.bitmap.is_in_use and not stored.problem:
        return False
    if not arguments.skip_broken_bitmaps:
        hint = f"Try --skip-broken-bitmaps, or use '{program()} bitmap --remove' to delete it"
        raise Failure(f"Cannot copy inconsistent bitmap '{stored.bitmap.name}'", hint=hint)
    say(f"warning: Skipping inconsistent bitmap '{stored.bitmap.name}'")
    return True


async def copy_bitmaps(copied: list[Copied], image: Image, *, is_new: bool) -> None:
    """Make the bitmaps in *image*, which holds the disk and keeps it if it is not *new*. Raises: Failure."""

    async def plan_all(plan: BitmapPlan) -> None:
        for each in copied:
            try:
                await plan.copy(each.bitmap, each.bits, each.size)
            except BitmapError as error:
                raise Failure(f"Failed to create bitmap {each.bitmap.name}: {error}") from error

    try:
        await image.change_bitmaps(plan_all)
    except (OSError, ImageError) as error:
        text = "Failed to create bitmaps" if is_new else "The disk is copied, its bitmaps are not"
        raise Failure(f"{text}: {reason_of(error)}") from error
