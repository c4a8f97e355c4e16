"""The bitmap directory: where the persistent bitmaps of an image lie, read with every length checked."""

from dataclasses import dataclass
from sys import maxsize

from qcow2.driver.operation import File, Read
from qcow2.error import CorruptImage
from qcow2.format import layout
from qcow2.format.geometry import Geometry
from qcow2.format.header import Header
from qcow2.format.layout import Autoclear, BitmapFlags, BitmapRecord, BitmapsRecord, ExtensionMagic

KNOWN_FLAGS = int(BitmapFlags.IN_USE | BitmapFlags.AUTO | BitmapFlags.EXTRA_DATA_COMPATIBLE)


@dataclass(frozen=True, slots=True)
class Bitmap:
    """One entry of the directory."""

    record: BitmapRecord
    name: str
    host_offset: int  # of the entry
    extra_data: bytes
    raw_name: bytes

    @property
    def is_in_use(self) -> bool:
        """Whether a writer died that kept it: what it holds is worth nothing."""
        return bool(self.record.flags & BitmapFlags.IN_USE)

    @property
    def is_enabled(self) -> bool:
        """Whether every writer must record in it."""
        return bool(self.record.flags & BitmapFlags.AUTO)

    def pack(self) -> bytes:
        """The entry as it stands on disk."""
        packed = self.record.pack() + self.extra_data + self.raw_name
        return packed + bytes(-len(packed) % 8)


def bitmap_directory(file: File, header: Header) -> BitmapsRecord | None:
    """Where the directory lies; None without bitmaps, or if a writer that does not know them came later.

    Raises: CorruptImage.
    """
    data = header.extension(ExtensionMagic.BITMAPS)
    if data is None or not header.record.autoclear_features & Autoclear.BITMAPS:
        return None
    if len(data) != BitmapsRecord.FORMAT.size:
        raise CorruptImage(file.path, 0, f"bitmaps extension of {len(data)} bytes, not {BitmapsRecord.FORMAT.size}")
    record = BitmapsRecord.parse(data)
    if record.reserved:
        raise CorruptImage(file.path, 0, f"bitmaps extension: reserved field is {record.reserved:#x}, not 0")
    if record.nb_bitmaps > layout.MAX_BITMAPS:
        raise CorruptImage(file.path, 0, f"{record.nb_bitmaps} bitmaps, limit {layout.MAX_BITMAPS}")
    if record.directory_size > layout.MAX_BITMAP_DIRECTORY_BYTES:
        message = f"bitmap directory of {record.directory_size} bytes, limit {layout.MAX_BITMAP_DIRECTORY_BYTES}"
        raise CorruptImage(file.path, 0, message)
    if record.directory_offset + record.directory_size > maxsize:  # the largest offset
        raise CorruptImage(file.path, 0, f"bitmap directory at {record.directory_offset:#x} leaves the file")
    return record


async def read_bitmaps(file: File, directory: BitmapsRecord) -> list[Bitmap]:
    """Read a directory that lies inside the file.

    Raises: CorruptImage if its entries do not fill it exactly.
    """
    found: list[Bitmap] = []
    offset, end = directory.directory_offset, directory.directory_offset + directory.directory_size
    for index in range(directory.nb_bitmaps):
        record = BitmapRecord.parse(await Read(file, offset, BitmapRecord.FORMAT.size))
        nbytes = BitmapRecord.FORMAT.size + record.extra_data_size + record.name_size
        if offset + nbytes > end:
            raise CorruptImage(
                file.path, offset, f"bitmap {index} ends past the directory of {end - offset} more bytes"
            )
        if record.table_size > layout.MAX_BITMAP_TABLE_ENTRIES:
            message = f"bitmap {index} has {record.table_size} table entries, limit {layout.MAX_BITMAP_TABLE_ENTRIES}"
            raise CorruptImage(file.path, offset, message)
        tail = await Read(file, offset + BitmapRecord.FORMAT.size, record.extra_data_size + record.name_size)
        extra_data, name = tail[: record.extra_data_size], tail[record.extra_data_size :]
        found.append(Bitmap(record, name.decode("utf-8", "replace"), offset, extra_data, name))
        offset += nbytes + -nbytes % 8
    if offset != end:
        raise CorruptImage(file.path, offset, f"{end - offset} bytes are left at the end of the bitmap directory")
    return found


def bits_nbytes(size: int, granularity_bits: int) -> int:
    """How many bytes the bits of a disk of *size* bytes take."""
    nbits = -(-size >> granularity_bits)
    return -(-nbits // 8)


def table_entries(size: int, granularity_bits: int, geometry: Geometry) -> int:
    """How many entries the table of such a bitmap has; one at least."""
    return max(1, geometry.clusters(bits_nbytes(size, granularity_bits)))


def problem_of(bitmap: Bitmap, geometry: Geometry) -> str:
    """Why nobody can use the bitmap, nor tell what it holds, by its entry; empty: one can, as far as that goes."""
    record = bitmap.record
    if record.type != layout.BITMAP_TYPE_DIRTY:
        return f"is of type {record.type}, known is {layout.BITMAP_TYPE_DIRTY}"
    if record.flags & KNOWN_FLAGS != record.flags:
        return f"has flags {record.flags:#x}, known are {KNOWN_FLAGS:#x}"
    if record.extra_data_size and not record.flags & BitmapFlags.EXTRA_DATA_COMPATIBLE:
        return f"has {record.extra_data_size} bytes of extra data that must be understood"
    if not 0 < record.name_size <= layout.MAX_BITMAP_NAME_BYTES:
        return f"has a name of {record.name_size} bytes, supported are 1 to {layout.MAX_BITMAP_NAME_BYTES}"
    return _size_problem(bitmap, geometry)


def _size_problem(bitmap: Bitmap, geometry: Geometry) -> str:
    record = bitmap.record
    if not layout.MIN_BITMAP_GRANULARITY_BITS <= record.granularity_bits <= layout.MAX_BITMAP_GRANULARITY_BITS:
        return f"has granularity_bits {record.granularity_bits}, supported are 9 to 31"
    if (nbytes := bits_nbytes(geometry.size, record.granularity_bits)) > layout.MAX_BITMAP_BYTES:
        return f"has {nbytes} bytes of bits, limit {layout.MAX_BITMAP_BYTES}"
    wanted = table_entries(geometry.size, record.granularity_bits, geometry)
    if record.table_size != wanted and not (bitmap.is_in_use and record.table_size):
        return f"has a table of {record.table_size} entries, the disk needs {wanted}"
    return ""
