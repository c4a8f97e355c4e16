"""The header: read, refused for what we cannot keep, rewritten without losing what we do not know."""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from qcow2.driver.operation import File, Read, Size, Sync, Write, WriteDespite
from qcow2.error import CorruptImage, UnsupportedImage
from qcow2.format import layout, refusal
from qcow2.format.layout import (
    LOG_MARK_SHIFT,
    Autoclear,
    Compatible,
    CompressionType,
    CryptMethod,
    ExtensionMagic,
    HeaderRecord,
    Incompatible,
)

MAX_NAME_AREA = 2 * layout.SECTOR_SIZE  # bytes of a backing file's name, in whole sectors


@dataclass(frozen=True, slots=True)
class Extension:
    """One header extension, known or not, without its padding."""

    magic: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Header:
    """Everything cluster 0 says, enough to write it again."""

    record: HeaderRecord
    later_fields: bytes  # header bytes past the last known field, up to header_length
    extensions: tuple[Extension, ...]  # in their order, without the end marker
    backing_name: str | None

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return 1 << self.record.cluster_bits

    @property
    def refcount_bits(self) -> int:
        """Width of a refcount."""
        return 1 << self.record.refcount_order

    @property
    def is_dirty(self) -> bool:
        """Whether refcounts may be too low: the image was not closed cleanly."""
        return bool(self.record.incompatible_features & Incompatible.DIRTY)

    @property
    def is_corrupt(self) -> bool:
        """Whether a writer found the image corrupt and marked it."""
        return bool(self.record.incompatible_features & Incompatible.CORRUPT)

    @property
    def log_mark(self) -> int:
        """Which link log the image as it is continues with, up to which record; 0 for none."""
        return self.record.autoclear_features >> LOG_MARK_SHIFT

    @property
    def has_lazy_refcounts(self) -> bool:
        """Whether the image asks for lazy refcounts."""
        return bool(self.record.compatible_features & Compatible.LAZY_REFCOUNTS)

    @property
    def compression_type(self) -> CompressionType:
        """How compressed clusters are packed."""
        return CompressionType(self.record.compression_type)

    @property
    def luks_area(self) -> tuple[int, int]:
        """Where the LUKS header with its key material is: host offset and bytes; (0, 0) if there is none."""
        data = self.extension(ExtensionMagic.CRYPTO)
        if self.record.crypt_method != CryptMethod.LUKS or data is None:
            return 0, 0
        host_offset, nbytes = layout.CRYPTO.unpack_from(data)
        return host_offset, nbytes

    @property
    def data_file_name(self) -> str | None:
        """The recorded name of the external data file; None if there is none, or whoever opens it has to say."""
        return self._name(ExtensionMagic.DATA_FILE) if self.record.has_data_file else None

    @property
    def kept_promises(self) -> int:
        """The autoclear bits that hold whatever we write: that the external data file is a raw image."""
        return int(Autoclear.RAW_EXTERNAL_DATA) if self.record.has_data_file else 0

    @property
    def backing_format(self) -> str | None:
        """The recorded format of the backing file."""
        return self._name(ExtensionMagic.BACKING_FORMAT)

    def _name(self, magic: int) -> str | None:
        """What the last extension with *magic* says: of several QEMU goes by that."""
        said = [extension.data for extension in self.extensions if extension.magic == magic]
        return os.fsdecode(said[-1]) if said else None

    def extension(self, magic: int) -> bytes | None:
        """The data of the first extension with *magic*."""
        return next((extension.data for extension in self.extensions if extension.magic == magic), None)

    def with_version(self, version: int) -> "Header":
        """This header in another version: no feature bits, and none of the fields that version 2 has no place for."""
        length = layout.V2_HEADER_LENGTH if version < 3 else layout.V3_HEADER_LENGTH_WITH_COMPRESSION
        record = replace(
            self.record,
            version=version,
            incompatible_features=0,
            compatible_features=0,
            autoclear_features=0,
            refcount_order=layout.V2_REFCOUNT_ORDER,
            compression_type=CompressionType.ZLIB,
            header_length=length,
        )
        kept = tuple(each for each in self.extensions if each.magic != ExtensionMagic.FEATURE_NAMES)
        return replace(self, record=record, later_fields=bytes(length - len(record.pack())), extensions=kept)

    def with_backing(self, name: str | None, backing_format: str | None) -> "Header":
        """This header with another backing file; the other extensions keep their order and bytes."""
        wanted = (
            None if backing_format is None else Extension(ExtensionMagic.BACKING_FORMAT, os.fsencode(backing_format))
        )
        extensions: list[Extension] = []
        for extension in self.extensions:
            if extension.magic != ExtensionMagic.BACKING_FORMAT:
                extensions.append(extension)
            elif wanted is not None:
                extensions.append(wanted)
                wanted = None
        if wanted is not None:
            extensions.insert(0, wanted)
        return replace(self, backing_name=name, extensions=tuple(extensions))


async def read_header(file: File, *, trust_refcounts: bool = True) -> Header:
    """Read and validate the header of *file*; tables it points at are inside the file, aligned and within limits.

    Without *trust_refcounts* the refcount and the snapshot table may lie anywhere: the caller counts references itself.

    Raises: UnsupportedImage naming the field or feature; CorruptImage with the place of the contradiction.
    """
    header = await load_header(file)
    file_size = await Size(file)
    refusal.refuse_features(file, header.record, feature_names(header))
    refusal.validate_tables(file, header.record, file_size, trust_refcounts=trust_refcounts)
    _validate_crypto(file, header, file_size)
    return header


def _validate_crypto(file: File, header: Header, file_size: int) -> None:
    """An image has a LUKS header if it is encrypted with LUKS, and else none."""
    method, data = header.record.crypt_method, header.extension(ExtensionMagic.CRYPTO)
    if method == CryptMethod.LUKS:
        if data is None or len(data) != layout.CRYPTO.size:
            raise CorruptImage(file.path, 32, "crypt_method 2, and no header extension says where the LUKS header is")
        refusal.validate_crypto(file, header.record, *header.luks_area, file_size)
    elif data is not None:
        message = f"crypt_method {int(method)}, and a header extension says where a LUKS header is"
        raise CorruptImage(file.path, 32, message)


async def load_header(file: File) -> Header:
    """Take cluster 0 apart, whatever features the image uses; nothing outside of it is looked at.

    Raises: UnsupportedImage or CorruptImage if it cannot be taken apart.
    """
    file_size = await Size(file)
    start = await Read(file, 0, layout.V3_HEADER_LENGTH_WITH_COMPRESSION)
    record = HeaderRecord.parse(start)
    refusal.validate_identity(file, record, file_size)
    first_cluster = await Read(file, 0, 1 << record.cluster_bits)
    known = len(record.pack())
    extensions = tuple(_extensions(file, record, first_cluster))
    name = _backing_name(file, record, first_cluster)
    return Header(record, first_cluster[known : record.header_length], extensions, name)


def _extensions(file: File, record: HeaderRecord, first_cluster: bytes) -> Iterator[Extension]:
    """Walk the extensions; they end at the end marker, at the backing file name or with the cluster."""
    offset = record.header_length
    end = min(record.backing_file_offset or len(first_cluster), len(first_cluster))
    while offset + layout.EXTENSION.size <= end:
        magic, nbytes = layout.EXTENSION.unpack_from(first_cluster, offset)
        if magic == ExtensionMagic.END:
            return
        start = offset + layout.EXTENSION.size
        if nbytes > end - start:
            message = f"header extension {magic:#010x} is {nbytes} bytes long, {end - start} are left"
            raise CorruptImage(file.path, offset, message)
        data = first_cluster[start : start + nbytes]
        if magic == ExtensionMagic.DATA_FILE and record.has_data_file:
            _require_name(file, "data file", start, data)
        yield Extension(magic, data)
        offset = start + _padded(nbytes)


def _backing_name(file: File, record: HeaderRecord, first_cluster: bytes) -> str | None:
    offset, nbytes = record.backing_file_offset, record.backing_file_size
    if not offset or not nbytes:
        return None
    if nbytes > layout.MAX_BACKING_NAME_BYTES:
        message = f"backing_file_size {nbytes}, limit {layout.MAX_BACKING_NAME_BYTES}"
        raise CorruptImage(file.path, 16, message)
    if offset < record.header_length or offset + nbytes > len(first_cluster):
        message = f"backing_file_offset {offset:#x}, the name of {nbytes} bytes lies outside the first cluster"
        raise CorruptImage(file.path, 8, message)
    name = first_cluster[offset : offset + nbytes]
    _require_name(file, "backing file", offset, name)
    return os.fsdecode(name)


def _require_name(file: File, what: str, host_offset: int, name: bytes) -> None:
    """Refuse a name that no file has: cut off, it would be another file's."""
    if b"\0" in name:
        raise CorruptImage(file.path, host_offset, f"{what} name {name!r} holds a zero byte")


def feature_names(header: Header) -> dict[tuple[int, int], str]:
    """The image's own feature name table: (FeatureNameType, bit number) -> name."""
    data = header.extension(ExtensionMagic.FEATURE_NAMES) or b""
    return {(kind, bit): printable(name) for kind, bit, name in feature_entries(data)}


def feature_entries(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """The entries (FeatureNameType, bit number, padded name) of a feature name table; the last may be short."""
    yield from layout.FEATURE_NAME.iter_unpack(data + bytes(-len(data) % layout.FEATURE_NAME.size))


def printable(name: bytes) -> str:
    """A name from an untrusted table, safe on a terminal and on one line."""
    text = name.split(b"\0", 1)[0].decode("utf-8", "replace")
    return "".join(character if character.isprintable() else "?" for character in text)


def require_uncorrupted(file: File, header: Header) -> None:
    """Refuse an image marked corrupt to who would write to it.

    Raises: CorruptImage.
    """
    if header.is_corrupt:
        raise CorruptImage(file.path, layout.HEADER_INCOMPATIBLE_OFFSET, "marked corrupt, cannot be opened for writing")


def pack_header(file: File, header: Header) -> tuple[HeaderRecord, bytes]:
    """The first cluster that says what *header* says, as far as it is used; the record knows where the name went.

    Raises: UnsupportedImage if it does not fit a cluster.
    """
    area = b"".join(_pack_extension(extension) for extension in header.extensions)
    area += _pack_extension(Extension(ExtensionMagic.END, b""))
    name = os.fsencode(header.backing_name or "")
    offset = header.record.header_length + len(area) if name else 0
    record = replace(header.record, backing_file_offset=offset, backing_file_size=len(name))
    packed = record.pack() + header.later_fields + area + name
    if len(name) > layout.MAX_BACKING_NAME_BYTES:
        message = f"backing file name of {len(name)} bytes, limit {layout.MAX_BACKING_NAME_BYTES}"
        raise UnsupportedImage(file.path, message)
    if len(packed) > header.cluster_size:
        message = f"header, extensions and backing file name take {len(packed)} bytes, limit {header.cluster_size}"
        raise UnsupportedImage(file.path, message)
    return record, packed


def header_over(file: File, header: Header, name: str | None, backing_format: str | None) -> Header:
    """*header* with another backing file, or none. Raises: UnsupportedImage if that cannot be."""
    if name is not None and header.record.has_raw_data:
        raise UnsupportedImage(file.path, "its raw external data file is the whole disk: nothing can show through it")
    changed = header.with_backing(name, backing_format)
    pack_header(file, changed)
    return changed


def _pack_extension(extension: Extension) -> bytes:
    data = extension.data
    return layout.EXTENSION.pack(extension.magic, len(data)) + data + bytes(_padded(len(data)) - len(data))


def _padded(nbytes: int) -> int:
    return nbytes + -nbytes % 8


async def rewrite_header(file: File, header: Header) -> Header:
    """Make cluster 0 say what *header* says; stable on return. A power loss leaves what it said before, or this.

    One sector decides. If more than one changes, a short header of one sector comes between, without feature names and
    with the backing file's name at a place that neither the old nor the new one uses. Where there is no room for that
    (extensions of others that fill a sector, names that fill a small cluster) a power loss may leave a mixture.

    Raises: UnsupportedImage, before any write, if it does not fit.
    """
    record, packed = pack_header(file, header)
    new = packed + bytes(header.cluster_size - len(packed))
    old = await Read(file, 0, header.cluster_size)
    has_more = new[layout.SECTOR_SIZE :] != old[layout.SECTOR_SIZE :]
    if has_more:
        await _write_rest(file, header, old, new)
    await Write(file, 0, new[: layout.SECTOR_SIZE])
    await make_stable(file)
    used = max(_sectors_end(old), _sectors_end(new))
    if has_more and used < header.cluster_size:  # a name was there for a while
        await Write(file, used, bytes(min(header.cluster_size - used, MAX_NAME_AREA)))
    return replace(header, record=record)


async def _write_rest(file: File, header: Header, old: bytes, new: bytes) -> None:
    """Write all sectors of *new* but the first, stable; at each moment the cluster says what one of both does."""
    place = max(_sectors_end(old), _sectors_end(new))
    name = os.fsencode(header.backing_name or "")
    first = _short_header(header, place if name else 0)
    if first is not None and place + len(name) <= header.cluster_size:
        if name:
            await Write(file, place, name)
            await make_stable(file)
        await Write(file, 0, first)
        await make_stable(file)
    await Write(file, layout.SECTOR_SIZE, new[layout.SECTOR_SIZE : place])
    await make_stable(file)


def _sectors_end(cluster: bytes) -> int:
    """Where the sectors of *cluster* that hold anything end."""
    used = len(cluster.rstrip(b"\0"))
    return max(layout.SECTOR_SIZE, used + -used % layout.SECTOR_SIZE)


def _short_header(header: Header, name_offset: int) -> bytes | None:
    """One sector that says what *header* does, but for the feature names; None if it does not fit."""
    kept = [each for each in header.extensions if each.magic != ExtensionMagic.FEATURE_NAMES]
    area = b"".join(map(_pack_extension, [*kept, Extension(ExtensionMagic.END, b"")]))
    nbytes = len(os.fsencode(header.backing_name or ""))
    record = replace(header.record, backing_file_offset=name_offset, backing_file_size=nbytes)
    packed = record.pack() + header.later_fields + area
    return packed.ljust(layout.SECTOR_SIZE, b"\0") if len(packed) <= layout.SECTOR_SIZE else None


async def set_lazy_refcounts(file: File, header: Header, *, is_lazy: bool) -> Header:
    """Let the image ask for lazy refcounts, or for none; it is clean, and of version 3. Stable on return."""
    word = header.record.compatible_features
    word = word | Compatible.LAZY_REFCOUNTS if is_lazy else word ^ (word & int(Compatible.LAZY_REFCOUNTS))
    await Write(file, layout.HEADER_COMPATIBLE_OFFSET, layout.FEATURE_WORD.pack(word))
    await make_stable(file)
    return replace(header, record=replace(header.record, compatible_features=word))


async def mark_repaired(file: File, header: Header) -> Header:
    """Clear the dirty and the corrupt bit once everything written before is stable; stable on return.

    Eight bytes inside one sector, never the whole header: a power loss leaves the old or the new bits.
    """
    await make_stable(file)
    word = header.record.incompatible_features
    cleared = word ^ (word & int(Incompatible.DIRTY | Incompatible.CORRUPT))  # `& ~bits` would lose unknown ones
    if cleared == word:
        return header
    await Write(file, layout.HEADER_INCOMPATIBLE_OFFSET, layout.FEATURE_WORD.pack(cleared))
    await make_stable(file)
    return replace(header, record=replace(header.record, incompatible_features=cleared))


async def warn_next(file: File) -> None:
    """Set the dirty bit, as far as that can be done: a sync has failed, and the next open writes all tables again.

    One byte, and whatever else is under way here: that has failed, too. Version 2 has no such bit.
    """
    offset = layout.HEADER_INCOMPATIBLE_OFFSET + layout.FEATURE_WORD.size - 1
    with suppress(OSError):
        known = await Read(file, 0, offset + 1)
        (version,) = layout.HEADER_VERSION.unpack_from(known, layout.HEADER_VERSION_OFFSET)
        if version >= 3:
            await WriteDespite(file, offset, bytes([known[offset] | Incompatible.DIRTY]))


async def make_stable(file: File) -> None:
    """Sync an image that nobody serves; the next one knows if that fails. Raises: OSError."""
    try:
        await Sync(file)
    except OSError:
        await warn_next(file)
        raise


async def clear_autoclear(file: File, header: Header, *, maintained: int = 0) -> Header:
    """Clear the autoclear bits that are not *maintained*: those whose promise the coming writes may break.

    For the first writable open; stable on return.
    """
    word = header.record.autoclear_features & (int(maintained) | header.kept_promises)
    if word == header.record.autoclear_features:
        return header
    await Write(file, layout.HEADER_AUTOCLEAR_OFFSET, layout.FEATURE_WORD.pack(word))
    await make_stable(file)
    return replace(header, record=replace(header.record, autoclear_features=word))
