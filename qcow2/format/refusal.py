"""What we refuse to open, and why: features beyond us, fields beyond limits, tables that cannot be where they say."""

from collections.abc import Mapping

from qcow2.driver.operation import File
from qcow2.error import CorruptImage, UnknownFeatures, UnsupportedImage
from qcow2.format import layout
from qcow2.format.layout import CompressionType, CryptMethod, HeaderRecord, Incompatible

KNOWN_INCOMPATIBLE = int(
    Incompatible.DIRTY
    | Incompatible.CORRUPT
    | Incompatible.EXTERNAL_DATA
    | Incompatible.COMPRESSION_TYPE
    | Incompatible.EXTENDED_L2
)

MAX_CUT_OFF = 1 << 20  # bytes of zeros at the end of a file that may be missing


def _advice(record: HeaderRecord) -> str:
    """How to open what is no qcow2 image. To be taken for a raw disk would cost one of LUKS its header."""
    from qcow2.format.luks import MAGIC  # which knows of headers, and they of us

    if record.magic.to_bytes(4, "big") == MAGIC[:4]:
        return "of a LUKS disk say -f luks, to a daemon --format=luks"
    return "of a raw disk say -f raw, to a daemon --format=raw"


def validate_identity(file: File, record: HeaderRecord, file_size: int) -> None:
    """Refuse what cannot be taken apart: another format, version, cluster size or header length."""
    if file_size < layout.V2_HEADER_LENGTH:
        message = f"not a qcow2 image: {file_size} bytes long, a header has {layout.V2_HEADER_LENGTH}"
        raise UnsupportedImage(file.path, message)
    if record.magic != layout.MAGIC:
        magic = f"magic {record.magic:#010x}, not {layout.MAGIC:#010x}"
        raise UnsupportedImage(file.path, f"not a qcow2 image: {magic}; {_advice(record)}")
    if record.version not in (2, 3):
        raise UnsupportedImage(file.path, f"qcow2 version {record.version}, supported are 2 and 3")
    if not layout.MIN_CLUSTER_BITS <= record.cluster_bits <= layout.MAX_CLUSTER_BITS:
        raise UnsupportedImage(file.path, f"cluster_bits {record.cluster_bits}, supported are 9 to 21")
    if record.version >= 3:
        _validate_header_length(file, record, file_size)


def _validate_header_length(file: File, record: HeaderRecord, file_size: int) -> None:
    length, limit = record.header_length, min(1 << record.cluster_bits, file_size)
    if length < layout.V3_HEADER_LENGTH or length % 8 or length > limit:
        message = f"header_length {length}, not a multiple of 8 from {layout.V3_HEADER_LENGTH} to {limit}"
        raise CorruptImage(file.path, 100, message)


def refuse_features(file: File, record: HeaderRecord, names: Mapping[tuple[int, int], str]) -> None:
    """Refuse what we do not know, by the image's own *names*, and what we know and do not support."""
    word = record.incompatible_features
    unknown = word ^ (word & KNOWN_INCOMPATIBLE)  # `& ~KNOWN` of IntFlags forgets the bits it has never heard of
    if unknown:
        bits = [bit for bit in range(64) if unknown >> bit & 1]
        named = {bit: name for (kind, bit), name in names.items() if kind == layout.FeatureNameType.INCOMPATIBLE}
        known = [named[bit] for bit in bits if bit in named]
        raise UnknownFeatures(file.path, known, [bit for bit in bits if bit not in named])
    if record.crypt_method not in list(CryptMethod):
        raise UnsupportedImage(file.path, f"encryption is not supported: crypt_method {record.crypt_method}")
    if word & Incompatible.EXTERNAL_DATA:
        _refuse_beside_data_file(file, record)
    least = layout.MIN_CLUSTER_BITS_OF_SUBCLUSTERS
    if word & Incompatible.EXTENDED_L2 and record.cluster_bits < least:
        message = f"cluster_bits {record.cluster_bits}, extended L2 entries need {least}"
        raise UnsupportedImage(file.path, message)
    _refuse_unsupported_compression(file, record)


def _refuse_beside_data_file(file: File, record: HeaderRecord) -> None:
    """Refuse what an image with an external data file cannot have, QEMU makes none."""
    if record.nb_snapshots:
        raise UnsupportedImage(file.path, "internal snapshots with an external data file are not supported")
    if record.has_raw_data and record.backing_file_offset:
        raise UnsupportedImage(file.path, "a raw external data file and a backing file contradict each other")


def validate_tables(file: File, record: HeaderRecord, file_size: int, *, trust_refcounts: bool) -> None:
    """Refuse tables that are too long, too short for the disk, unaligned or not inside the file."""
    _validate_l1(file, record, file_size)
    if trust_refcounts:
        validate_snapshots(file, record, file_size)
    _validate_refcounts(file, record, file_size if trust_refcounts else None)


def _refuse_unsupported_compression(file: File, record: HeaderRecord) -> None:
    if record.compression_type not in list(CompressionType):
        raise UnsupportedImage(file.path, f"compression_type {record.compression_type}, supported are 0 and 1")
    is_announced = bool(record.incompatible_features & Incompatible.COMPRESSION_TYPE)
    if is_announced != (record.compression_type != CompressionType.ZLIB):
        message = f"compression_type {record.compression_type} contradicts incompatible feature bit 3"
        raise CorruptImage(file.path, 104, message)


def _validate_l1(file: File, record: HeaderRecord, file_size: int) -> None:
    nbytes = record.l1_size * layout.ENTRY_SIZE
    if nbytes > layout.MAX_L1_BYTES:
        raise UnsupportedImage(file.path, f"l1_size {record.l1_size}, limit {layout.MAX_L1_BYTES // layout.ENTRY_SIZE}")
    needed = l1_entries(record.size, record.cluster_bits, record.entry_size)
    if record.l1_size < needed:
        message = f"l1_size {record.l1_size}, a disk of {record.size} bytes needs {needed}"
        raise CorruptImage(file.path, 36, message)
    if record.l1_size:  # zeros at the end of a file may be cut off: sparse copies do that, QEMU reads them
        where, slack = record.l1_table_offset, MAX_CUT_OFF
        _validate_table(file, "l1_table_offset", 40, where, nbytes, record.cluster_bits, file_size, slack)


def l1_entries(size: int, cluster_bits: int, entry_size: int) -> int:
    """How many L1 entries a disk of *size* bytes needs, with L2 entries of *entry_size* bytes."""
    return -(-size // (((1 << cluster_bits) // entry_size) << cluster_bits))


def _validate_table(
    file: File,
    field: str,
    field_offset: int,
    host_offset: int,
    nbytes: int,
    cluster_bits: int,
    file_size: int,
    slack: int = 0,
) -> None:
    """Refuse a table that is not aligned, or ends more than *slack* bytes past the end of the file."""
    cluster_size = 1 << cluster_bits
    if host_offset % cluster_size:
        message = f"{field} {host_offset:#x} is not a multiple of the cluster size {cluster_size:#x}"
        raise CorruptImage(file.path, field_offset, message)
    if host_offset == 0:
        raise CorruptImage(file.path, field_offset, f"{field} is 0, where the header lies")
    if host_offset + nbytes > file_size + slack:
        message = (
            f"{field} {host_offset:#x}, the table of {nbytes} bytes ends past the end of the file at {file_size:#x}"
        )
        raise CorruptImage(file.path, field_offset, message)


def validate_crypto(file: File, record: HeaderRecord, host_offset: int, nbytes: int, file_size: int) -> None:
    """Refuse a LUKS header that cannot be where the header says."""
    if not 0 < nbytes <= layout.MAX_LUKS_BYTES:
        message = f"the LUKS header is {nbytes} bytes long, limit {layout.MAX_LUKS_BYTES}"
        raise UnsupportedImage(file.path, message)
    cluster_bits = record.cluster_bits
    _validate_table(file, "LUKS header", record.header_length, host_offset, nbytes, cluster_bits, file_size)


def validate_snapshots(file: File, record: HeaderRecord, file_size: int) -> None:
    """Refuse a snapshot table that cannot be where the header says, and too many snapshots."""
    if record.nb_snapshots > layout.MAX_SNAPSHOTS:
        raise UnsupportedImage(file.path, f"nb_snapshots {record.nb_snapshots}, limit {layout.MAX_SNAPSHOTS}")
    if record.nb_snapshots:
        nbytes = record.nb_snapshots * layout.SnapshotRecord.FORMAT.size
        _validate_table(file, "snapshots_offset", 64, record.snapshots_offset, nbytes, record.cluster_bits, file_size)


def _validate_refcounts(file: File, record: HeaderRecord, file_size: int | None) -> None:
    limit = layout.MAX_REFCOUNT_ORDER
    if record.refcount_order > limit:
        raise UnsupportedImage(file.path, f"refcount_order {record.refcount_order}, limit {limit}")
    nbytes = record.refcount_table_nbytes
    if nbytes > layout.MAX_REFCOUNT_TABLE_BYTES:
        limit = layout.MAX_REFCOUNT_TABLE_BYTES >> record.cluster_bits
        raise UnsupportedImage(file.path, f"refcount_table_clusters {record.refcount_table_clusters}, limit {limit}")
    if file_size is None:
        return
    if not nbytes:
        raise CorruptImage(file.path, 56, "refcount_table_clusters is 0: there is no refcount table")
    offset = record.refcount_table_offset
    _validate_table(file, "refcount_table_offset", 48, offset, nbytes, record.cluster_bits, file_size)
