"""Opening an image: what its header says is validated before anything relies on it."""

from dataclasses import replace

from qcow2.driver.operation import File, Size
from qcow2.engine.opened import OpenOptions
from qcow2.error import CorruptImage, UnsupportedImage
from qcow2.format.header import Header, read_header, require_uncorrupted
from qcow2.format.layout import ENTRY_SIZE, HEADER_INCOMPATIBLE_OFFSET, CryptMethod
from qcow2.format.refusal import l1_entries
from qcow2.format.snapshot import Choice, find_snapshot, read_snapshots, require_possible


async def open_header(file: File, options: OpenOptions, *, has_data_file: bool) -> Header:
    """The header of the image in *file*, if it may be opened so.

    Raises: UnsupportedImage, CorruptImage, FileNotFoundError.
    """
    header = await read_header(file)
    if header.record.has_data_file and not has_data_file:
        raise UnsupportedImage(file.path, "its data is in an external data file, which is not open")
    if options.writable:
        _require_writable(file, header, options)
    if options.snapshot is not None:
        header = await _header_of(file, header, options.snapshot)
    return header


def _require_writable(file: File, header: Header, options: OpenOptions) -> None:
    """Refuse what may not be written to."""
    if options.snapshot is not None:
        raise UnsupportedImage(file.path, f"snapshot {options.snapshot!r} can be read only")
    require_uncorrupted(file, header)
    if header.is_dirty:
        raise CorruptImage(file.path, HEADER_INCOMPATIBLE_OFFSET, "not closed cleanly, repair it before writing")
    if header.record.crypt_method == CryptMethod.AES:
        raise UnsupportedImage(file.path, "encrypted with the legacy AES of QEMU, which can be read only")
    if options.lazy_refcounts and header.record.version < 3:
        raise UnsupportedImage(file.path, "lazy refcounts need version 3 (compat=1.1)")


async def _header_of(file: File, header: Header, wanted: str | Choice) -> Header:
    """*header* as if the disk were what the snapshot *wanted* holds. Raises: as `open_header`."""
    snapshot = find_snapshot(file.path, await read_snapshots(file, header), wanted)
    require_possible(file.path, snapshot, header.record)
    record = snapshot.record
    end = record.l1_table_offset + record.l1_size * ENTRY_SIZE
    if record.l1_size < l1_entries(
        snapshot.disk_size, header.record.cluster_bits, header.record.entry_size
    ) or end > await Size(file):
        message = f"L1 table of snapshot {wanted!r} is cut off, or too short for {snapshot.disk_size} bytes"
        raise CorruptImage(file.path, record.l1_table_offset, message)
    changed = {"size": snapshot.disk_size, "l1_table_offset": record.l1_table_offset, "l1_size": record.l1_size}
    return replace(header, record=replace(header.record, **changed))
