"""The exact bits that a killed process left in memory, brought back into the bitmaps of its image.

What the image holds says at least as much. So wherever this dies, and whatever of it a power loss keeps, no bitmap says
too little.
"""

from contextlib import suppress

from qcow2.driver.operation import File, Sync, Write
from qcow2.engine.bitmaptable import StoredBitmap, load_bitmaps, stored_bits
from qcow2.engine.replay import Target
from qcow2.error import CorruptImage
from qcow2.format import layout
from qcow2.format.geometry import Geometry
from qcow2.format.header import Header
from qcow2.format.layout import SECTOR_SIZE
from qcow2.plane.dirtybits import LiveBits, Shape


async def restore_bits(file: File, header: Header, live: LiveBits) -> None:
    """Let the bitmaps of the image in *file*, locked for writing, hold the bits in *live*; stable on return.

    Bits of no bitmap of it, or that say more than the image does, are of another state of it, and are not taken.
    Raises: OSError.
    """
    geometry = Geometry.of(header.record)
    target = await Target.of(file, header)
    stored: list[StoredBitmap] = []
    with suppress(CorruptImage):
        stored, _ = await load_bitmaps(file, header, geometry, target.tables.__contains__)
    for each in stored:
        record = each.bitmap.record
        shape = Shape(record.table_offset, each.nbytes(geometry.size), record.granularity_bits)
        if each.is_kept and not each.problem and shape in live.bits:
            await _restore(file, geometry, each, live.bits[shape])
    await Sync(file)


async def _restore(file: File, geometry: Geometry, each: StoredBitmap, bits: bytes) -> None:
    held = await stored_bits(file, geometry, each)
    if int.from_bytes(bits, "little") | int.from_bytes(held, "little") != int.from_bytes(held, "little"):
        return
    for start in range(0, len(bits), SECTOR_SIZE):
        content = bits[start : start + SECTOR_SIZE]
        entry = each.table[start >> geometry.cluster_bits]
        if content != held[start : start + SECTOR_SIZE] and entry > layout.BITMAP_ENTRY_ALL_ONES:
            await Write(file, entry + start % geometry.cluster_size, content)
