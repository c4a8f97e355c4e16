"""The bitmaps extension of the header, put in, changed and taken out: one sector decides, so no death finds a half."""

from dataclasses import replace
from functools import partial

from qcow2.driver.operation import File
from qcow2.engine.root import Root
from qcow2.engine.stability import is_harmless
from qcow2.error import UnsupportedImage
from qcow2.format.header import Extension, Header
from qcow2.format.layout import EXTENSION, SECTOR_SIZE, Autoclear, BitmapsRecord, ExtensionMagic


def require_size(file: File, header: Header, nbytes: int) -> None:
    """Return if the disk of *file* may have *nbytes*, as far as its bitmaps go. Raises: UnsupportedImage."""
    if not nbytes and header.extension(ExtensionMagic.BITMAPS) is not None:
        raise UnsupportedImage(file.path, "a disk of 0 bytes has no bitmaps: QEMU would not open it")


async def set_bitmaps(root: Root, record: BitmapsRecord | None) -> None:
    """Let the header point at the directory *record*, stable, or say that there are no bitmaps; stable on return.

    Raises: OSError; UnsupportedImage, before any write, if the header has no room.
    """
    if record is None:
        await _take_out(root)
        return
    await root.rewrite(partial(_with, data=record.pack()))
    await root.set_autoclear(Autoclear.BITMAPS, on=True)


async def _take_out(root: Root) -> None:
    was_valid = root.header.record.autoclear_features & Autoclear.BITMAPS
    await root.set_autoclear(Autoclear.BITMAPS, on=False)
    if root.header.extension(ExtensionMagic.BITMAPS) is None:
        return
    try:
        await root.rewrite(partial(_with, data=None))
    except OSError as error:
        if is_harmless(error) and was_valid:  # the bitmaps are there still; law 11
            await root.set_autoclear(Autoclear.BITMAPS, on=True)
        raise


def _with(header: Header, data: bytes | None) -> Header:
    """*header* with that bitmaps extension, where it is or else at the end, or without."""
    kept = [each for each in header.extensions if each.magic != ExtensionMagic.BITMAPS]
    if data is None:
        return replace(header, extensions=tuple(kept))
    changed = Extension(ExtensionMagic.BITMAPS, data)
    if len(kept) == len(header.extensions):
        return replace(header, extensions=(*kept, changed))
    return replace(
        header,
        extensions=tuple(changed if each.magic == ExtensionMagic.BITMAPS else each for each in header.extensions),
    )


def _data_offset(header: Header) -> int:
    """Where the data of the bitmaps extension, which there is, begins."""
    offset = header.record.header_length
    for extension in header.extensions:
        offset += EXTENSION.size
        if extension.magic == ExtensionMagic.BITMAPS:
            break
        offset += len(extension.data) + -len(extension.data) % 8
    return offset


async def hoist(root: Root) -> int:
    """Where the data of the bitmaps extension is, in the first sector: it changes in one write with the disk's size.

    The feature name table, which is for people, makes room for it if need be.
    Raises: OSError; UnsupportedImage if other extensions leave no room.
    """
    if not _is_hoisted(root.header):
        if not _is_hoisted(_with_names_last(root.header)):
            message = f"header extensions leave the bitmaps no room in the first {SECTOR_SIZE} bytes: remove them first"
            raise UnsupportedImage(root.file.path, message)
        await root.rewrite(_with_names_last)
    return _data_offset(root.header)


def _is_hoisted(header: Header) -> bool:
    return _data_offset(header) + BitmapsRecord.FORMAT.size <= SECTOR_SIZE


def _with_names_last(header: Header) -> Header:
    names = [each for each in header.extensions if each.magic == ExtensionMagic.FEATURE_NAMES]
    others = [each for each in header.extensions if each.magic != ExtensionMagic.FEATURE_NAMES]
    return replace(header, extensions=(*others, *names))
