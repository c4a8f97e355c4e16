"""What an image maps past the end of its disk: nobody sees it until the disk grows, and then QEMU shows it."""

from array import array

from qcow2.driver.operation import File, Read
from qcow2.format.geometry import Geometry
from qcow2.format.header import Header
from qcow2.format.layout import ENTRY_SIZE
from qcow2.format.snapshot import read_snapshots
from qcow2.plane.entry import Entries, l1_table, words_of


async def maps_past_end(file: File, header: Header) -> bool:
    """Whether something is mapped past the end, as a shrink that was interrupted leaves it; nobody writes meanwhile.

    The state of a machine is there by right, once a snapshot with one was applied: it does not count.
    Raises: OSError, ImageError.
    """
    geometry = Geometry.of(header.record)
    end = geometry.round_up(geometry.size)
    first, inside = geometry.l1_index(end), geometry.entry_offset(end)
    if inside:
        if await _maps_in_last_table(file, header, geometry, first, inside):
            return True
        first += 1
    if first >= header.record.l1_size or await _has_machine_state(file, header):
        return False
    return any(map(l1_table, await _l1_entries(file, header, first, header.record.l1_size)))


async def _maps_in_last_table(file: File, header: Header, geometry: Geometry, index: int, inside: int) -> bool:
    """Whether the table at that index of the L1 table maps a cluster from the entry at *inside* on."""
    table = l1_table((await _l1_entries(file, header, index, index + 1))[0])
    if not table:
        return False
    entries = Entries.of(geometry)
    rest = entries.unpack(await Read(file, table + inside, geometry.cluster_size - inside))
    return any(entries.is_compressed(entry) or entries.has_cluster(entry) for entry in filter(None, rest))


async def _l1_entries(file: File, header: Header, first: int, stop: int) -> "array[int]":
    place = header.record.l1_table_offset + first * ENTRY_SIZE
    return words_of(await Read(file, place, (stop - first) * ENTRY_SIZE))


async def _has_machine_state(file: File, header: Header) -> bool:
    return any(snapshot.vm_state_size for snapshot in (await read_snapshots(file, header)).snapshots)
