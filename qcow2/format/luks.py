"""LUKS version 1: its header, in front of a raw disk or in clusters of a qcow2 image; nothing here needs a key.

Spec: LUKS On-Disk Format Specification 1.2.3.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from qcow2.error import CorruptImage, UnsupportedImage
from qcow2.format.header import printable
from qcow2.format.layout import SECTOR_SIZE, values_of

MAGIC = b"LUKS\xba\xbe"
VERSION = 1
NSLOTS = 8
STRIPES = 4000  # the only number that the specification's programs write
SALT_BYTES = 32
DIGEST_BYTES = 20  # of the master key's digest, whatever the hash
ENABLED, DISABLED = 0x00AC71F3, 0x0000DEAD
MIN_SECTOR = 8  # of key material and of the payload
AREA_ALIGNMENT = 8  # sectors
MIN_ITERATIONS = 1000
MAX_ITERATIONS = 1 << 27  # some minutes: what an image asks of us has to end
MAX_ALL_ITERATIONS = 2 * MAX_ITERATIONS  # of all key slots that are on, each with the digest: a wrong key tries them
HASHES = ("sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160", "md5", "sm3")
DEFAULT_ITER_TIME_MS = 2000
MAX_ITER_TIME_MS = 60_000
MODES = ("ecb", "cbc", "ctr", "xts")
IV_GENERATORS = ("plain", "plain64", "essiv")
ONE_KEY = {  # bytes, of the ciphers that libcrypto always has, and of those that libgcrypt has
    "aes": (16, 24, 32),
    "serpent": (16, 24, 32),
    "twofish": (16, 32),
    "cast5": (16,),
}
TWO_KEYS = {"aes": (32, 64), "serpent": (32, 48, 64), "twofish": (32, 64)}  # the same of XTS, which wants wide blocks


@dataclass(frozen=True, slots=True)
class SlotRecord:
    """One key slot: 48 bytes of the header."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct(">II32sII")

    state: int
    iterations: int
    salt: bytes
    material_sector: int
    stripes: int

    @property
    def is_enabled(self) -> bool:
        """Whether a passphrase opens it."""
        return self.state == ENABLED


@dataclass(frozen=True, slots=True)
class LuksRecord:
    """The 592 bytes of the header, big-endian; offsets count from its own start."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct(">6sH32s32s32sII20s32sI40s")
    NBYTES: ClassVar[int] = FORMAT.size + NSLOTS * SlotRecord.FORMAT.size

    magic: bytes
    version: int
    cipher_name: bytes
    cipher_mode: bytes
    hash_spec: bytes
    payload_sector: int
    key_bytes: int
    digest: bytes
    digest_salt: bytes
    digest_iterations: int
    uuid: bytes
    slots: tuple[SlotRecord, ...]

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Take NBYTES apart; nothing is judged."""
        slots = SlotRecord.FORMAT.iter_unpack(data[cls.FORMAT.size : cls.NBYTES])
        return cls(*(*cls.FORMAT.unpack_from(data), tuple(SlotRecord(*fields) for fields in slots)))

    def pack(self) -> bytes:
        """The header as it is in the file."""
        return self.FORMAT.pack(*values_of(self)[:-1]) + b"".join(
            SlotRecord.FORMAT.pack(*values_of(slot)) for slot in self.slots
        )

    @property
    def payload_offset(self) -> int:
        """Bytes; 0 in a header that is detached from its payload."""
        return self.payload_sector * SECTOR_SIZE

    @property
    def material_sectors(self) -> int:
        """Of one slot."""
        return -(-self.key_bytes * STRIPES // SECTOR_SIZE)

    @property
    def end_offset(self) -> int:
        """Where the last key material ends."""
        return max(self.material_end(number) for number in range(NSLOTS))

    def material_end(self, number: int) -> int:
        """Where the key material of slot *number* ends."""
        return (self.slots[number].material_sector + self.material_sectors) * SECTOR_SIZE

    def with_slot(self, number: int, slot: SlotRecord) -> "LuksRecord":
        """This header with another *slot*."""
        return replace(self, slots=(*self.slots[:number], slot, *self.slots[number + 1 :]))


@dataclass(frozen=True, slots=True)
class CipherSpec:
    """How sectors are encrypted, in the words of the format."""

    name: str
    mode: str
    iv_generator: str
    iv_hash: str | None
    key_bytes: int

    @property
    def mode_text(self) -> str:
        """As the header has it."""
        return f"{self.mode}-{self.iv_generator}" + (f":{self.iv_hash}" if self.iv_hash else "")

    @property
    def algorithm(self) -> str:
        """As QEMU names it: the bits of one key."""
        return f"{self.name}-{self.key_bytes * 8 // (2 if self.mode == 'xts' else 1)}"


@dataclass(frozen=True, slots=True)
class Luks:
    """A header that holds together."""

    record: LuksRecord
    spec: CipherSpec
    hash_name: str
    uuid: str

    @property
    def enabled(self) -> list[int]:
        """The numbers of the slots that a passphrase opens."""
        return [number for number, slot in enumerate(self.record.slots) if slot.is_enabled]

    @property
    def all_iterations(self) -> int:
        """What it takes at most to try each of them once, and its master key."""
        digest = self.record.digest_iterations
        return sum(self.record.slots[number].iterations + digest for number in self.enabled)


def parse_luks(path: str, data: bytes, limit: int, host_offset: int = 0, *, is_detached: bool = False) -> Luks:
    """Take apart the header that begins *data*, lies at *host_offset* and has *limit* bytes with its key material.

    The material of a slot that is off may lie past that: nobody reads it. Raises: UnsupportedImage, CorruptImage.
    """
    if len(data) < LuksRecord.NBYTES or data[:6] != MAGIC:
        raise UnsupportedImage(path, f"not a LUKS header: magic {data[:6].hex()}, not {MAGIC.hex()}")
    record = LuksRecord.parse(data)
    if record.version != VERSION:
        raise UnsupportedImage(path, f"LUKS version {record.version} is not supported, only {VERSION}")
    spec = _spec(path, host_offset, record)
    hash_name = _text(path, host_offset + 72, "hash", record.hash_spec)
    require_hash(path, hash_name)
    for name, count in _iterations(record):
        if not 0 < count <= MAX_ITERATIONS:
            raise CorruptImage(path, host_offset, f"LUKS {name} {count}, not from 1 to {MAX_ITERATIONS}")
    _validate_areas(path, host_offset, record, limit, is_detached=is_detached)
    return Luks(record, spec, hash_name, printable(record.uuid))


def luks_problem(path: str, data: bytes, limit: int, host_offset: int) -> str:
    """Why nobody can open such a header, as `parse_luks` takes it, whatever ciphers they have; empty: somebody may."""
    try:
        luks = parse_luks(path, data, limit, host_offset)
    except CorruptImage as problem:
        return str(problem)
    except UnsupportedImage as problem:
        return "" if _is_for_others(data) else str(problem)
    return "" if luks.enabled else "no key slot is on"


def _is_for_others(data: bytes) -> bool:
    """Whether QEMU, or this program with another OpenSSL, has the cipher and the hash of the header that begins."""
    if len(data) < LuksRecord.NBYTES or data[:6] != MAGIC:
        return False
    record = LuksRecord.parse(data)
    if record.version != VERSION:
        return False
    cipher, hash_name = (field.rstrip(b"\0").decode("latin-1") for field in (record.cipher_name, record.hash_spec))
    return cipher == "sm4" or (hash_name in HASHES and not is_available(hash_name))


def _spec(path: str, host_offset: int, record: LuksRecord) -> CipherSpec:
    name = _text(path, host_offset + 8, "cipher name", record.cipher_name)
    text = _text(path, host_offset + 40, "cipher mode", record.cipher_mode)
    mode, _, generator = text.partition("-")
    generator, _, iv_hash = generator.partition(":")
    spec = CipherSpec(name, mode, generator, iv_hash or None, record.key_bytes)
    validate_spec(path, spec)
    return spec


def validate_spec(path: str, spec: CipherSpec) -> None:
    """Raises: UnsupportedImage, naming what we do not have."""
    known = TWO_KEYS if spec.mode == "xts" else ONE_KEY
    if spec.name not in known or spec.mode not in MODES or spec.iv_generator not in IV_GENERATORS:
        raise UnsupportedImage(path, f"cipher {spec.name}-{spec.mode_text} is not supported")
    if spec.key_bytes not in known[spec.name]:
        raise UnsupportedImage(path, f"a key of {spec.key_bytes} bytes is not supported for {spec.name}-{spec.mode}")
    if (spec.iv_generator == "essiv") != (spec.iv_hash is not None):
        raise UnsupportedImage(path, f"cipher mode {spec.mode_text}: essiv, and nothing else, goes with a hash")
    if spec.iv_hash is not None:
        require_hash(path, spec.iv_hash)
        import hashlib  # and with it OpenSSL

        if hashlib.new(spec.iv_hash).digest_size not in ONE_KEY[spec.name]:  # which says which cipher makes the IV
            raise UnsupportedImage(path, f"cipher mode {spec.mode_text}: no key of {spec.name} is as long as this hash")


def require_hash(path: str, name: str) -> None:
    """Raises: UnsupportedImage for a hash that there is not, or that this OpenSSL does not give."""
    if name not in HASHES:
        raise UnsupportedImage(path, f"hash {name!r} is not supported")
    if not is_available(name):
        raise UnsupportedImage(path, f"hash {name!r} is not supported by this OpenSSL")


def is_available(hash_name: str) -> bool:
    """Whether this OpenSSL gives it."""
    import hashlib

    try:
        hashlib.new(hash_name)
    except ValueError:
        return False
    return True


def _text(path: str, host_offset: int, what: str, field: bytes) -> str:
    text, end, _ = field.partition(b"\0")
    if not end or not text.isascii() or not text.decode().isprintable():
        raise CorruptImage(path, host_offset, f"LUKS {what} {field[:16]!r} is no text that ends")
    return text.decode()


def _iterations(record: LuksRecord) -> Iterator[tuple[str, int]]:
    yield "digest iterations", record.digest_iterations
    for number, slot in enumerate(record.slots):
        if slot.is_enabled:
            yield f"key slot {number} iterations", slot.iterations


def _validate_areas(path: str, host_offset: int, record: LuksRecord, limit: int, *, is_detached: bool) -> None:
    """Key material lies behind the header, in front of the payload, and each by itself."""
    ends_at = 0
    for number, slot in sorted(enumerate(record.slots), key=lambda each: each[1].material_sector):
        what = f"LUKS key slot {number}"
        if slot.state not in (ENABLED, DISABLED):
            raise CorruptImage(path, host_offset, f"{what}: state {slot.state:#010x} is neither on nor off")
        if slot.stripes != STRIPES:
            raise UnsupportedImage(path, f"{what}: {slot.stripes} stripes, supported are {STRIPES}")
        if slot.material_sector < max(MIN_SECTOR, ends_at):
            message = f"{what}: key material at sector {slot.material_sector}, inside what ends at sector {ends_at}"
            raise CorruptImage(path, host_offset, message)
        ends_at = slot.material_sector + record.material_sectors
        if slot.is_enabled and ends_at * SECTOR_SIZE > limit:
            raise CorruptImage(path, host_offset, f"LUKS key material ends at {ends_at * SECTOR_SIZE}, limit {limit}")
    if not is_detached and not record.payload_sector:
        raise UnsupportedImage(path, "a LUKS header whose disk is in another file: open that one, and name this header")
    if not is_detached and record.payload_sector < max(MIN_SECTOR, ends_at):
        message = f"LUKS payload at sector {record.payload_sector}, key material ends at sector {ends_at}"
        raise CorruptImage(path, host_offset, message)


def require_passphrase(passphrase: bytes | bytearray) -> None:
    """Raises: ValueError if a key slot may not be made of it."""
    if not passphrase:
        raise ValueError("the passphrase is empty: anybody could open the key slot")


DEFAULT_SPEC = CipherSpec("aes", "xts", "plain64", None, 64)  # as QEMU's


@dataclass(frozen=True, slots=True)
class Encryption:
    """How a new image is encrypted, and with what its first key slot opens."""

    spec: CipherSpec
    hash_name: str
    passphrase: bytes | bytearray = field(repr=False)
    iter_time_ms: int = DEFAULT_ITER_TIME_MS  # that deriving a key takes
    iterations: int | None = None  # that do so, if they are not to be found out

    def __post_init__(self) -> None:
        """Raises: ValueError."""
        require_passphrase(self.passphrase)
        if not 0 <= self.iter_time_ms <= MAX_ITER_TIME_MS:
            limits = f"from 0 to {MAX_ITER_TIME_MS}"
            raise ValueError(f"iter_time {self.iter_time_ms} is not a number of milliseconds {limits}")

    @property
    def nbytes(self) -> int:
        """Of the header with all its key material, as far as the payload."""
        return self.new_record().payload_offset

    def new_record(self, *, is_detached: bool = False) -> LuksRecord:
        """A header without any key, of an image of its own: where QEMU has its parts."""
        from uuid import uuid4

        sectors = -(-self.spec.key_bytes * STRIPES // SECTOR_SIZE)
        area = sectors + -sectors % AREA_ALIGNMENT
        slots = tuple(
            SlotRecord(DISABLED, 0, bytes(SALT_BYTES), MIN_SECTOR + number * area, STRIPES) for number in range(NSLOTS)
        )
        return LuksRecord(
            magic=MAGIC,
            version=VERSION,
            cipher_name=self.spec.name.encode(),
            cipher_mode=self.spec.mode_text.encode(),
            hash_spec=self.hash_name.encode(),
            payload_sector=0 if is_detached else MIN_SECTOR + NSLOTS * area,
            key_bytes=self.spec.key_bytes,
            digest=bytes(DIGEST_BYTES),
            digest_salt=bytes(SALT_BYTES),
            digest_iterations=0,
            uuid=str(uuid4()).encode(),
            slots=slots,
        )
