"""What an image is: the facts that `info` prints, under the names that qemu-img's JSON gives them."""

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from qcow2.driver.far import FarFile
from qcow2.driver.file import HostFile, run
from qcow2.driver.operation import File, Read
from qcow2.driver.uri import is_nbd
from qcow2.format.bitmap import Bitmap, bitmap_directory, read_bitmaps
from qcow2.format.header import Header, read_header
from qcow2.format.layout import SECTOR_SIZE, SUBCLUSTERS, BitmapFlags, CryptMethod
from qcow2.format.snapshot import Snapshot, read_snapshots
from qcow2.library.hostfile import opened
from qcow2.node.formats import format_of

if TYPE_CHECKING:
    from qcow2.format.luks import Luks, SlotRecord

NANOSECONDS = 1_000_000_000
Facts = dict[str, Any]


def facts_of(path: str, image_format: str, *, force_share: bool = False, luks_header: str | None = None) -> Facts:
    """What the image at *path* is, as qemu-img's JSON has it; its LUKS header may be in a file of its own.

    Raises: OSError, ImageError.
    """
    format_of(path, image_format)
    with ExitStack() as stack:
        file = stack.enter_context(_export(path) if is_nbd(path) else opened(path, force_share=force_share))
        if luks_header is None:
            return facts_of_file(file, image_format)
        return facts_of_file(file, image_format, stack.enter_context(opened(luks_header, force_share=force_share)))


def _export(uri: str) -> HostFile:
    """Raises: OSError, UnsupportedImage."""
    from qcow2.driver.nbdexport import NbdExport  # and with it sockets

    return NbdExport(uri, writable=False).connect()


def facts_of_file(file: HostFile, image_format: str, luks_header: HostFile | None = None) -> Facts:
    """The same of a file that is open already, as it says now."""
    facts: Facts = {"filename": file.path, "format": image_format, "dirty-flag": False}
    if not isinstance(file, FarFile):
        facts["actual-size"] = os.fstat(file.fd).st_blocks * 512
    known = format_of(file.path, image_format)
    if known.has_metadata:
        facts.update(run(_qcow2_facts(file)))
    elif not known.has_key_slots:
        facts["virtual-size"] = known.outline(file).size
    if known.has_key_slots:
        from qcow2.node.luks import read_luks  # and with it the engine

        luks, facts["virtual-size"] = run(read_luks(file, luks_header))
        facts |= {"encrypted": True, "format-specific": {"type": "luks", "data": luks_facts(luks)}}
    return facts


def limits_of(facts: Facts) -> dict[str, int]:
    """How requests to the disk of *facts* are best aligned, in bytes, under qemu-img's names."""
    limits = {
        "request-alignment": SECTOR_SIZE if facts.get("encrypted") else 1,
        "min-mem-alignment": 1,
        "opt-mem-alignment": os.sysconf("SC_PAGE_SIZE"),
        "max-iov": os.sysconf("SC_IOV_MAX"),
    }
    cluster_size = facts.get("cluster-size")
    if cluster_size is not None:
        has_subclusters = facts["format-specific"]["data"].get("extended-l2", False)
        limits["write-zeroes-alignment"] = cluster_size // (SUBCLUSTERS if has_subclusters else 1)
        limits["discard-alignment"] = cluster_size
    return limits


def backing_of(path: str) -> tuple[str | None, str | None]:
    """Name and format of the backing file, as the header has them. Raises: OSError, ImageError."""
    with opened(path) as file:
        header = run(read_header(file, trust_refcounts=False))
    return header.backing_name, header.backing_format


async def _qcow2_facts(file: HostFile) -> Facts:
    header = await read_header(file, trust_refcounts=False)
    facts: Facts = {
        "virtual-size": header.record.size // SECTOR_SIZE * SECTOR_SIZE,
        "cluster-size": header.cluster_size,
        "dirty-flag": header.is_dirty,
        "format-specific": {"type": "qcow2", "data": await _specific_facts(file, header)},
    }
    if header.record.crypt_method:
        facts["encrypted"] = True
    facts.update(_backing_facts(file.path, header))
    if snapshots := (await read_snapshots(file, header)).snapshots:
        facts["snapshots"] = [snapshot_facts(snapshot) for snapshot in snapshots]
    return facts


def _backing_facts(path: str, header: Header) -> Facts:
    name = header.backing_name
    if name is None:
        return {}
    has_protocol = ":" in name.split("/", 1)[0]
    facts: Facts = {
        "backing-filename": name,
        "full-backing-filename": name if has_protocol else os.path.join(os.path.dirname(path), name),
    }
    if header.backing_format is not None:
        facts["backing-filename-format"] = header.backing_format
    return facts


async def _specific_facts(file: File, header: Header) -> Facts:
    compression = header.compression_type.name.lower()
    if header.record.version < 3:
        facts: Facts = {"compat": "0.10", "compression-type": compression, "refcount-bits": header.refcount_bits}
        return facts | await _crypto_facts(file, header)
    facts = {
        "compat": "1.1",
        "compression-type": compression,
        "lazy-refcounts": header.has_lazy_refcounts,
        "refcount-bits": header.refcount_bits,
        **_data_file_facts(header),
        **await _crypto_facts(file, header),
        "corrupt": header.is_corrupt,
        "extended-l2": header.record.has_subclusters,
    }
    directory = bitmap_directory(file, header)
    if directory is not None and directory.nb_bitmaps:
        facts["bitmaps"] = [_bitmap_facts(bitmap) for bitmap in await read_bitmaps(file, directory)]
    return facts


def _data_file_facts(header: Header) -> Facts:
    if not header.record.has_data_file:
        return {}
    name = header.data_file_name
    return ({} if name is None else {"data-file": name}) | {"data-file-raw": header.record.has_raw_data}


async def _crypto_facts(file: File, header: Header) -> Facts:
    match header.record.crypt_method:
        case CryptMethod.AES:
            return {"encrypt": {"format": "aes"}}
        case CryptMethod.LUKS:
            from qcow2.format.luks import LuksRecord, parse_luks

            host_offset, nbytes = header.luks_area
            start = await Read(file, host_offset, LuksRecord.NBYTES)
            return {"encrypt": luks_facts(parse_luks(file.path, start, nbytes, host_offset)) | {"format": "luks"}}
    return {}


def luks_facts(luks: "Luks") -> Facts:
    """What can be told of an encrypted disk without its key."""
    facts: Facts = {"ivgen-alg": luks.spec.iv_generator, "detached-header": luks.record.payload_sector == 0}
    if luks.spec.iv_hash is not None:
        facts["ivgen-hash-alg"] = luks.spec.iv_hash
    return facts | {
        "hash-alg": luks.hash_name,
        "cipher-alg": luks.spec.algorithm,
        "uuid": luks.uuid,
        "cipher-mode": luks.spec.mode,
        "slots": [_slot_facts(slot) for slot in luks.record.slots],
        "payload-offset": luks.record.payload_offset,
        "master-key-iters": luks.record.digest_iterations,
    }


def _slot_facts(slot: "SlotRecord") -> Facts:
    facts: Facts = {"active": slot.is_enabled}
    if slot.is_enabled:
        facts["iters"] = slot.iterations
    facts["key-offset"] = slot.material_sector * SECTOR_SIZE
    if slot.is_enabled:
        facts["stripes"] = slot.stripes
    return facts


def _bitmap_facts(bitmap: Bitmap) -> Facts:
    names = {BitmapFlags.IN_USE: "in-use", BitmapFlags.AUTO: "auto"}
    flags = [name for flag, name in names.items() if bitmap.record.flags & flag]
    granularity = 1 << min(bitmap.record.granularity_bits, 63)
    return {"flags": flags, "name": bitmap.name, "granularity": granularity}


def snapshot_facts(snapshot: Snapshot) -> Facts:
    """What JSON says of a snapshot."""
    seconds, nanoseconds = divmod(snapshot.record.vm_clock_nsec, NANOSECONDS)
    facts: Facts = {
        "id": snapshot.id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.record.date_sec,
        "date-nsec": snapshot.record.date_nsec,
        "vm-clock-sec": seconds,
        "vm-clock-nsec": nanoseconds,
    }
    if snapshot.icount is not None and snapshot.icount != (1 << 64) - 1:
        facts["icount"] = snapshot.icount
    return facts
