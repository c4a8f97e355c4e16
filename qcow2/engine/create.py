"""A new image: tables first, made stable, then the sector that makes the file an image."""

import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from sys import byteorder

from qcow2.driver.operation import File, Resize, Sync, Write, Zero
from qcow2.engine.plain import Preallocation, empty, write_zeros
from qcow2.format import layout
from qcow2.format.clusters import clusters_of, counting_clusters
from qcow2.format.header import Extension, Header, pack_header
from qcow2.format.layout import Compatible, CompressionType, ExtensionMagic, FeatureNameType, HeaderRecord, Incompatible
from qcow2.format.luks import Encryption
from qcow2.format.refusal import l1_entries
from qcow2.plane.entry import Entries, l1_entry

# (word, mask, name); the first two matter most and are kept where clusters are too small for all of them.
FEATURE_NAMES = (
    (FeatureNameType.INCOMPATIBLE, Incompatible.DIRTY, "dirty bit"),
    (FeatureNameType.COMPATIBLE, Compatible.LAZY_REFCOUNTS, "lazy refcounts"),
    (FeatureNameType.INCOMPATIBLE, Incompatible.CORRUPT, "corrupt bit"),
    (FeatureNameType.INCOMPATIBLE, Incompatible.EXTERNAL_DATA, "external data file"),
    (FeatureNameType.INCOMPATIBLE, Incompatible.COMPRESSION_TYPE, "compression type"),
    (FeatureNameType.INCOMPATIBLE, Incompatible.EXTENDED_L2, "extended L2 entries"),
    (FeatureNameType.AUTOCLEAR, layout.Autoclear.BITMAPS, "bitmaps"),
    (FeatureNameType.AUTOCLEAR, layout.Autoclear.RAW_EXTERNAL_DATA, "raw external data"),
)
SMALL_CLUSTER_SIZE = 4096  # up to here the long table would leave too little room for a backing file name


@dataclass(frozen=True, slots=True)
class Options:
    """What the image shall be."""

    size: int  # bytes
    version: int = 3
    cluster_bits: int = 16
    refcount_order: int = 4
    lazy_refcounts: bool = False
    has_subclusters: bool = False
    compression: CompressionType = CompressionType.ZLIB
    backing_name: str | None = None
    backing_format: str | None = None
    preallocation: Preallocation = Preallocation.OFF
    encryption: Encryption | None = None
    data_file_name: str | None = None  # of the file that the data is in
    data_file_raw: bool = False  # which as a raw image is the same disk

    @property
    def luks_bytes(self) -> int:
        """Of the LUKS header, if there is to be one."""
        return 0 if self.encryption is None else self.encryption.nbytes

    @property
    def luks_clusters(self) -> int:
        """That it takes."""
        return -(-self.luks_bytes // self.cluster_size)

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return 1 << self.cluster_bits

    @property
    def entries(self) -> Entries:
        """What its L2 tables will hold."""
        return Entries(
            self.cluster_bits,
            self.version,
            has_subclusters=self.has_subclusters,
            is_identity=self.data_file_name is not None,
        )

    @property
    def mapped_clusters(self) -> int:
        """How many guest clusters are mapped from the start: all or none."""
        return clusters_of(self.size, self.cluster_size) if self.preallocation is not Preallocation.OFF else 0


@dataclass(frozen=True, slots=True)
class Plan:
    """Where everything goes: header, refcount table and blocks, L1, LUKS header, L2 tables, data; in clusters."""

    options: Options
    table_clusters: int
    block_clusters: int
    l1_size: int
    l1_clusters: int
    l2_clusters: int
    data_clusters: int

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return self.options.cluster_size

    @property
    def table_offset(self) -> int:
        """The refcount table, after the header."""
        return self.cluster_size

    @property
    def block_offset(self) -> int:
        """The refcount blocks."""
        return self.table_offset + self.table_clusters * self.cluster_size

    @property
    def l1_offset(self) -> int:
        """The L1 table."""
        return self.block_offset + self.block_clusters * self.cluster_size

    @property
    def luks_offset(self) -> int:
        """The LUKS header."""
        return self.l1_offset + self.l1_clusters * self.cluster_size

    @property
    def l2_offset(self) -> int:
        """The L2 tables."""
        return self.luks_offset + self.options.luks_clusters * self.cluster_size

    @property
    def data_offset(self) -> int:
        """The guest's data."""
        return self.l2_offset + self.l2_clusters * self.cluster_size

    @property
    def end_offset(self) -> int:
        """The length of the file."""
        return self.data_offset + self.data_clusters * self.cluster_size


def plan(options: Options) -> Plan:
    """Lay out an image.

    Raises: ValueError naming the option, its value and the limit.
    """
    _validate(options)
    cluster_size = options.cluster_size
    l1_size = l1_entries(options.size, options.cluster_bits, options.entries.nbytes)
    l1_clusters = clusters_of(l1_size * layout.ENTRY_SIZE, cluster_size)
    data_clusters = options.mapped_clusters if options.data_file_name is None else 0
    l2_clusters = clusters_of(options.mapped_clusters * options.entries.nbytes, cluster_size)
    counted = 1 + l1_clusters + options.luks_clusters + l2_clusters + data_clusters
    table_clusters, block_clusters = refcount_clusters(options, counted)
    return Plan(options, table_clusters, block_clusters, l1_size, l1_clusters, l2_clusters, data_clusters)


def refcount_clusters(options: Options, counted: int) -> tuple[int, int]:
    """Clusters of refcount table and blocks that count *counted* clusters and themselves."""
    table, blocks = counting_clusters(counted, options.cluster_size, options.refcount_order)
    if table * options.cluster_size > layout.MAX_REFCOUNT_TABLE_BYTES:
        raise ValueError(
            f"size {options.size} with preallocation needs a refcount table of {table * options.cluster_size} bytes, "
            f"limit {layout.MAX_REFCOUNT_TABLE_BYTES}"
        )
    return table, blocks


def max_size(cluster_bits: int, entry_size: int = layout.ENTRY_SIZE) -> int:
    """The largest disk that an L1 table within its limit can map."""
    return layout.MAX_L1_BYTES // layout.ENTRY_SIZE * ((1 << 2 * cluster_bits) // entry_size)


def _validate(options: Options) -> None:
    limit = max_size(options.cluster_bits, options.entries.nbytes)
    if not 0 <= options.size <= limit:
        raise ValueError(f"size {options.size}, limit {limit} with clusters of {options.cluster_size} bytes")
    if options.data_file_name is not None:
        _validate_data_file(options)
    elif options.data_file_raw:
        raise ValueError("data-file-raw requires data-file")
    if options.backing_name is not None and options.mapped_clusters and not options.has_subclusters:
        text = f"preallocation {options.preallocation.value} is not possible with a backing file"
        raise ValueError(f"{text}, unless extended_l2 is on")
    if options.version < 3:
        _validate_version_2(options)
    if options.has_subclusters and options.cluster_bits < layout.MIN_CLUSTER_BITS_OF_SUBCLUSTERS:
        least = 1 << layout.MIN_CLUSTER_BITS_OF_SUBCLUSTERS
        raise ValueError(f"extended_l2 on needs clusters of {least} bytes at least, not {options.cluster_size}")
    if options.encryption is not None and options.cluster_size < 1024:  # the header's extensions would not fit
        raise ValueError(f"an encrypted image needs clusters of 1024 bytes at least, not {options.cluster_size}")


def _validate_data_file(options: Options) -> None:
    if options.version < 3:
        text = "External data files are only supported with compatibility level 1.1 and above"
        raise ValueError(f"{text} (use version=v3 or greater)")
    if options.data_file_raw and options.backing_name is not None:
        raise ValueError("Backing file and data-file-raw cannot be used at the same time")
    if options.data_file_raw and options.preallocation is Preallocation.OFF:
        raise ValueError("data-file-raw has preallocation metadata at least, not off")


def _validate_version_2(options: Options) -> None:
    if options.lazy_refcounts:
        raise ValueError("lazy_refcounts on is not possible with compat 0.10, needs 1.1")
    if options.has_subclusters:
        raise ValueError("extended_l2 on is not possible with compat 0.10, needs 1.1")
    if options.refcount_order != layout.V2_REFCOUNT_ORDER:
        raise ValueError(f"refcount_bits {1 << options.refcount_order} needs compat 1.1, limit 16 in compat 0.10")
    if options.compression is not CompressionType.ZLIB:
        raise ValueError(
            f"compression_type {options.compression.name.lower()} is not possible with compat 0.10, needs 1.1"
        )
    if options.encryption is not None and options.preallocation is not Preallocation.OFF:
        raise ValueError(
            f"preallocation {options.preallocation.value} of an encrypted image is not possible with compat 0.10"
        )


async def create(file: File, options: Options) -> None:
    """Replace whatever *file* holds by a new image; stable on return.

    Raises: ValueError or UnsupportedImage before the file is touched.
    """
    whole = plan(options)
    await write_tables(file, whole)
    await write_header(file, whole)


def require_possible(file: File, plan: Plan) -> None:
    """Raises: UnsupportedImage if the header does not fit, or nothing can be encrypted so here."""
    header_of(file, plan)
    if plan.options.encryption is not None:
        from qcow2.engine import luks  # and with it libcrypto

        luks.require_possible(file.path, plan.options.encryption)


async def write_tables(file: File, plan: Plan) -> None:
    """Empty *file* and write everything but the header's first sector: until `write_header` it is no image.

    Raises: UnsupportedImage, as `require_possible`, before the file is touched.
    """
    require_possible(file, plan)
    _, packed = header_of(file, plan)
    await empty(file, plan.end_offset)
    await Zero(file, 0, plan.end_offset)
    await Sync(file)
    await Resize(file, plan.end_offset)
    await Write(file, layout.SECTOR_SIZE, packed[layout.SECTOR_SIZE :] + bytes(layout.SECTOR_SIZE))
    for host_offset, table in _tables(plan):
        await Write(file, host_offset, table)
    if plan.options.encryption is not None:
        from qcow2.engine.luks import new_vault  # and with it libcrypto

        await (await new_vault(file.path, plan.options.encryption)).write(file, plan.luks_offset)
    if plan.options.preallocation is Preallocation.FULL:
        await write_zeros(file, plan.data_offset, plan.end_offset)


async def write_header(file: File, plan: Plan) -> None:
    """Make the file an image, once all of it is stable: the magic goes in one sector, last."""
    _, packed = header_of(file, plan)
    await Sync(file)
    await Write(file, 0, packed[: layout.SECTOR_SIZE])
    await Sync(file)


def _tables(plan: Plan) -> Iterator[tuple[int, bytes]]:
    """Each table with its place, one cluster at a time where there may be many."""
    yield plan.table_offset, table_of(plan.block_offset, plan.block_clusters, plan.cluster_size)
    yield from _refcount_blocks(plan)
    l1 = table_of(l1_entry(plan.l2_offset), plan.l2_clusters, plan.cluster_size)
    yield plan.l1_offset, l1 + bytes(plan.l1_size * layout.ENTRY_SIZE - len(l1))
    entries = plan.options.entries
    per_table = plan.cluster_size // entries.nbytes
    start = plan.data_offset if plan.options.data_file_name is None else 0
    for first in range(0, plan.options.mapped_clusters, per_table):
        count = min(per_table, plan.options.mapped_clusters - first)
        data_offset = start + first * plan.cluster_size
        host_offset = plan.l2_offset + first // per_table * plan.cluster_size
        made = entries.data(data_offset, count)
        if plan.options.backing_name is not None:  # which shows until something is written
            made = [entries.unwritten(entry) for entry in made]
        elif plan.options.encryption and not plan.options.data_file_raw:  # zeros are none there
            made = [entries.blank(entry) for entry in made]
        yield host_offset, entries.pack(made)


def table_of(first: int, count: int, cluster_size: int) -> bytes:
    """*count* table entries that point at consecutive clusters."""
    entries = array("Q", range(first, first + count * cluster_size, cluster_size))
    if byteorder == "little":
        entries.byteswap()
    return entries.tobytes()


def _refcount_blocks(plan: Plan) -> Iterator[tuple[int, bytes]]:
    per_block = plan.cluster_size * 8 >> plan.options.refcount_order
    left = plan.end_offset // plan.cluster_size
    for index in range(plan.block_clusters):
        yield (
            plan.block_offset + index * plan.cluster_size,
            refcounts_of_one(min(left, per_block), plan.options.refcount_order),
        )
        left -= per_block


def refcounts_of_one(count: int, refcount_order: int) -> bytes:
    """*count* refcounts of 1; entries narrower than a byte fill it from its low end."""
    width = 1 << refcount_order
    if width >= 8:
        return (1).to_bytes(width // 8, "big") * count
    per_byte = 8 // width
    full = sum(1 << bit for bit in range(0, 8, width))
    whole, rest = divmod(count, per_byte)
    return bytes([full]) * whole + (bytes([full & (1 << rest * width) - 1]) if rest else b"")


def header_of(file: File, plan: Plan) -> tuple[Header, bytes]:
    """As of `new_header`."""
    return new_header(
        file,
        plan.options,
        plan.l1_size,
        plan.l1_offset,
        plan.table_offset,
        plan.table_clusters,
        luks_offset=plan.luks_offset,
    )


def new_header(
    file: File,
    options: Options,
    l1_size: int,
    l1_offset: int,
    table_offset: int,
    table_clusters: int,
    *,
    luks_offset: int = 0,
) -> tuple[Header, bytes]:
    """The header of an image with *options* that has its tables in these places; its cluster, as far as it is used.

    Raises: UnsupportedImage if it does not fit a cluster.
    """
    is_zstd = options.compression is not CompressionType.ZLIB
    record = HeaderRecord(
        magic=layout.MAGIC,
        version=options.version,
        backing_file_offset=0,
        backing_file_size=0,
        cluster_bits=options.cluster_bits,
        size=options.size,
        crypt_method=layout.CryptMethod.NONE if options.encryption is None else layout.CryptMethod.LUKS,
        l1_size=l1_size,
        l1_table_offset=l1_offset,
        refcount_table_offset=table_offset,
        refcount_table_clusters=table_clusters,
        nb_snapshots=0,
        snapshots_offset=0,
        incompatible_features=(Incompatible.COMPRESSION_TYPE if is_zstd else 0)
        | (Incompatible.EXTENDED_L2 if options.has_subclusters else 0)
        | (Incompatible.EXTERNAL_DATA if options.data_file_name is not None else 0),
        compatible_features=Compatible.LAZY_REFCOUNTS if options.lazy_refcounts else 0,
        autoclear_features=layout.Autoclear.RAW_EXTERNAL_DATA if options.data_file_raw else 0,
        refcount_order=options.refcount_order,
        header_length=layout.V2_HEADER_LENGTH if options.version < 3 else layout.V3_HEADER_LENGTH_WITH_COMPRESSION,
        compression_type=options.compression,
    )
    later_fields = bytes(record.header_length - len(record.pack()))
    extensions = feature_names(options.version, options.cluster_size)
    if options.encryption is not None:
        data = layout.CRYPTO.pack(luks_offset, options.luks_bytes)
        extensions = (Extension(ExtensionMagic.CRYPTO, data), *extensions)
    if options.data_file_name is not None:
        extensions = (Extension(ExtensionMagic.DATA_FILE, os.fsencode(options.data_file_name)), *extensions)
    header = Header(record, later_fields, extensions, None).with_backing(options.backing_name, options.backing_format)
    record, packed = pack_header(file, header)
    return replace(header, record=record), packed


def feature_names(version: int, cluster_size: int) -> tuple[Extension, ...]:
    """The header extension that names the bits we know, if *version* has such bits."""
    if version < 3:
        return ()
    names = FEATURE_NAMES[:2] if cluster_size <= SMALL_CLUSTER_SIZE else FEATURE_NAMES
    entries = [layout.FEATURE_NAME.pack(word, mask.bit_length() - 1, name.encode()) for word, mask, name in names]
    return (Extension(ExtensionMagic.FEATURE_NAMES, b"".join(entries)),)
