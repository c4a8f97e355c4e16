"""The bitmaps extension of the header, put in, changed and taken out: at every death one whole header stands there."""

from dataclasses import replace

from qcow2.driver.operation import File
from qcow2.engine.root import Root
from qcow2.format.header import Extension, Header, pack_header
from qcow2.format.layout import EXTENSION, SECTOR_SIZE, Autoclear, BitmapsRecord, ExtensionMagic

END = EXTENSION.pack(ExtensionMagic.END, 0)


async def set_bitmaps(file: File, root: Root, record: BitmapsRecord | None) -> None:
    """Let the header point at the directory *record*, stable, or say that there are no bitmaps; stable on return.

    Raises: OSError; UnsupportedImage, before any write, if the header has no room.
    """
    if record is None:
        await root.set_autoclear(Autoclear.BITMAPS, on=False)
        await _remove(file, root)
        return
    data = record.pack()
    offset = _offset(root.header)
    if root.header.extension(ExtensionMagic.BITMAPS) is None:
        await _insert(file, root, data)
    elif _is_in_one_sector(offset + EXTENSION.size, len(data)):
        await root.rewrite(offset + EXTENSION.size, data, _with(root.header, data))
    else:  # not in one write: who finds half of it finds no bitmaps
        await root.set_autoclear(Autoclear.BITMAPS, on=False)
        await root.rewrite(offset + EXTENSION.size, data, _with(root.header, data))
    await root.set_autoclear(Autoclear.BITMAPS, on=True)


def _is_in_one_sector(offset: int, nbytes: int) -> bool:
    return offset // SECTOR_SIZE == (offset + nbytes - 1) // SECTOR_SIZE


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


def _offset(header: Header) -> int:
    """Where the bitmaps extension begins; where the extensions end if there is none."""
    offset = header.record.header_length
    for extension in header.extensions:
        if extension.magic == ExtensionMagic.BITMAPS:
            break
        offset += EXTENSION.size + len(extension.data) + -len(extension.data) % 8
    return offset


async def _insert(file: File, root: Root, data: bytes) -> None:
    """Behind the other extensions. The name of the backing file, if it is in the way, has moved before."""
    header, start = _with(root.header, data), _offset(root.header)
    pack_header(file, header)  # raises if it does not fit
    body = data + END
    end = start + EXTENSION.size + len(body)
    name_offset, name_bytes = root.header.record.backing_file_offset, root.header.record.backing_file_size
    if name_offset and name_offset < end:
        target = max(end, name_offset + name_bytes)
        if name_offset < start + EXTENSION.size or target + name_bytes > header.cluster_size:
            await root.rewrite_all(header)
            return
        await root.move_backing_name(target)
        header = replace(header, record=root.header.record)
    await root.rewrite(start + EXTENSION.size, body, root.header)
    await root.rewrite(start, EXTENSION.pack(ExtensionMagic.BITMAPS, len(data)), header)


async def _remove(file: File, root: Root) -> None:
    old, header = root.header, _with(root.header, None)
    if old.extension(ExtensionMagic.BITMAPS) is None:
        return
    if old.extensions[-1].magic == ExtensionMagic.BITMAPS:
        await root.rewrite(_offset(old), END, header)  # what follows is no extension
    else:
        await root.rewrite_all(header)
