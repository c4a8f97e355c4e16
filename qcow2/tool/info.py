"""`qcow2 info`: what an image is."""

import argparse
import os
import time
from collections.abc import Iterable
from typing import Any

from qcow2.driver.file import HostFile, run
from qcow2.driver.operation import File, Read
from qcow2.error import ImageError, UnsupportedImage
from qcow2.format.bitmap import Bitmap, bitmap_directory, read_bitmaps
from qcow2.format.header import Header, read_header
from qcow2.format.layout import SECTOR_SIZE, BitmapFlags, CryptMethod
from qcow2.format.luks import Luks, LuksRecord, SlotRecord, parse_luks
from qcow2.format.snapshot import Snapshot, read_snapshots
from qcow2.node.chain import MAX_DEPTH, backing_path
from qcow2.node.formats import FORMATS
from qcow2.tool.file import opened, print_json
from qcow2.tool.named import add_format_option, add_image_options, the_image
from qcow2.tool.opening import opening
from qcow2.tool.quantity import format_size

NANOSECONDS = 1_000_000_000
Facts = dict[str, Any]  # as qemu-img's JSON has them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `qcow2 info`."""
    add_format_option(parser)
    add_image_options(parser)
    parser.add_argument("--output", default="human", choices=["human", "json"])
    parser.add_argument("--backing-chain", action="store_true", help="and of every image under it")
    parser.add_argument("-U", "--force-share", action="store_true", help="though others may be writing to it")
    parser.add_argument("filename")


def run_command(arguments: argparse.Namespace) -> int:
    """Print what the image is.

    Raises: OSError, ImageError.
    """
    image = the_image(arguments)
    with opening(image.path):
        chain = [_facts(image.path, image.image_format, arguments.force_share)]
        if arguments.backing_chain:
            _follow(chain, arguments.force_share)
    if arguments.output == "json":
        print_json(chain if arguments.backing_chain else chain[0])
    else:
        print("\n\n".join("\n".join(_lines(facts)) for facts in chain))
    return 0


def _follow(chain: list[Facts], force_share: bool) -> None:
    while "backing-filename" in chain[-1]:
        top = chain[-1]["filename"]
        if "backing-filename-format" not in chain[-1]:
            raise UnsupportedImage(top, f"the format of backing file {chain[-1]['backing-filename']!r} is not recorded")
        path = backing_path(top, chain[-1]["backing-filename"])
        if len(chain) >= MAX_DEPTH:
            raise UnsupportedImage(top, f"more than {MAX_DEPTH} files in the backing chain")
        if os.path.exists(path) and any(os.path.samefile(path, facts["filename"]) for facts in chain):
            raise ImageError(top, f"the backing chain is a cycle: {path} is in it already")
        chain.append(_facts(path, chain[-1]["backing-filename-format"], force_share))


def _facts(path: str, image_format: str, force_share: bool) -> Facts:
    if image_format not in FORMATS:
        raise UnsupportedImage(path, f"format {image_format!r} is not supported, only {' and '.join(FORMATS)}")
    with opened(path, force_share=force_share) as file:
        facts: Facts = {"filename": path, "format": image_format, "dirty-flag": False}
        facts["actual-size"] = os.fstat(file.fd).st_blocks * 512
        if image_format == "raw":
            facts["virtual-size"] = -(-file.size() // SECTOR_SIZE) * SECTOR_SIZE
        else:
            facts.update(run(_qcow2_facts(file)))
    return facts


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
        **await _crypto_facts(file, header),
        "corrupt": header.is_corrupt,
        "extended-l2": False,
    }
    directory = bitmap_directory(file, header)
    if directory is not None and directory.nb_bitmaps:
        facts["bitmaps"] = [_bitmap_facts(bitmap) for bitmap in await read_bitmaps(file, directory)]
    return facts


async def _crypto_facts(file: File, header: Header) -> Facts:
    match header.record.crypt_method:
        case CryptMethod.AES:
            return {"encrypt": {"format": "aes"}}
        case CryptMethod.LUKS:
            host_offset, nbytes = header.luks_area
            start = await Read(file, host_offset, LuksRecord.NBYTES)
            return {"encrypt": luks_facts(parse_luks(file.path, start, nbytes, host_offset)) | {"format": "luks"}}
    return {}


def luks_facts(luks: Luks) -> Facts:
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


def _slot_facts(slot: SlotRecord) -> Facts:
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


def _lines(facts: Facts) -> list[str]:
    """The facts for people."""
    size = facts["virtual-size"]
    lines = [
        f"image: {facts['filename']}",
        f"file format: {facts['format']}",
        f"virtual size: {format_size(size)} ({size} bytes)",
        f"disk size: {format_size(facts['actual-size'])}",
    ]
    if facts["dirty-flag"]:
        lines.append("cleanly shut down: no")
    if facts.get("encrypted"):
        lines.append("encrypted: yes")
    if "cluster-size" in facts:
        lines.append(f"cluster_size: {facts['cluster-size']}")
    lines += _backing_lines(facts)
    if "snapshots" in facts:
        lines += snapshot_lines(facts["snapshots"])
    if "format-specific" in facts:
        lines += ["Format specific information:", *_specific_lines(facts["format-specific"]["data"])]
    return lines


def _backing_lines(facts: Facts) -> list[str]:
    if "backing-filename" not in facts:
        return []
    name, full = facts["backing-filename"], facts["full-backing-filename"]
    lines = [f"backing file: {name}" + ("" if name == full else f" (actual path: {full})")]
    if "backing-filename-format" in facts:
        lines.append(f"backing file format: {facts['backing-filename-format']}")
    return lines


def snapshot_lines(snapshots: Iterable[Facts]) -> list[str]:
    """The list of snapshots for people."""
    head = ["Snapshot list:", _row("ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT")]
    return head + [_snapshot_line(snapshot) for snapshot in snapshots]


def _row(tag_id: str, tag: str, size: str, date: str, clock: str, icount: str) -> str:
    return f"{tag_id:<10}{tag:<17}{size:>8}{date:>20}{clock:>13}{icount:>11}"


def _snapshot_line(snapshot: Facts) -> str:
    date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(snapshot["date-sec"]))
    seconds, milliseconds = snapshot["vm-clock-sec"], snapshot["vm-clock-nsec"] // 1_000_000
    clock = f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.{milliseconds:03d}"
    icount = str(snapshot.get("icount", ""))
    return _row(snapshot["id"], snapshot["name"], format_size(snapshot["vm-state-size"]), date, clock, icount)


def _specific_lines(data: Facts, indent: str = "    ") -> list[str]:
    """Nested facts, each level farther in."""
    lines = []
    for key, value in data.items():
        name = f"{indent}{key.replace('-', ' ')}:"
        if isinstance(value, list):
            value = {f"[{number}]": each for number, each in enumerate(value)}
        if isinstance(value, dict):
            lines += [name, *_specific_lines(value, indent + "    ")]
        else:
            lines.append(f"{name} {str(value).lower() if isinstance(value, bool) else value}")
    return lines
