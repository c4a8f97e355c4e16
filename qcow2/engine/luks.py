"""Key slots: a passphrase opens one, which gives the master key; slots are added and erased, the key stays.

A slot becomes a key after its material is stable, and stops being one before it is wiped, so a death at any moment
leaves the old slots or the new ones.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from qcow2.driver.operation import Compute, File, Read, Sync, Write
from qcow2.driver.thread import interruptible
from qcow2.error import UnsupportedImage, WrongKey
from qcow2.format.layout import SECTOR_SIZE
from qcow2.format.luks import (
    DIGEST_BYTES,
    DISABLED,
    ENABLED,
    MAGIC,
    MAX_ALL_ITERATIONS,
    MAX_ITERATIONS,
    MIN_ITERATIONS,
    SALT_BYTES,
    STRIPES,
    Encryption,
    Luks,
    LuksRecord,
    SlotRecord,
    parse_luks,
    require_hash,
    validate_spec,
)
from qcow2.plane.cipher import Cipher, wipe

PROBE_ITERATIONS = 1 << 15
DIGEST_SHARE = 8  # a slot's iterations to the digest's
Secret = bytes | bytearray


@dataclass(frozen=True, slots=True)
class Unlocked:
    """What a passphrase has opened: the master key, the caller's to wipe, and by which slot."""

    key: bytearray = field(repr=False)
    slot: SlotRecord
    opener: int  # which of the passphrases


@dataclass(frozen=True, slots=True)
class Vault:
    """A LUKS header where it lies: *nbytes* at *host_offset* of *file*, key material included."""

    file: File
    host_offset: int
    luks: Luks
    nbytes: int

    @classmethod
    async def read(cls, file: File, host_offset: int, nbytes: int, *, is_detached: bool = False) -> "Vault":
        """Raises: UnsupportedImage, CorruptImage."""
        data = await Read(file, host_offset, min(LuksRecord.NBYTES, nbytes))
        luks = parse_luks(file.path, data, nbytes, host_offset, is_detached=is_detached)
        return cls(file, host_offset, luks, nbytes)

    async def open(self, passphrases: Iterable[Secret], on_wait: Callable[[], None] | None = None) -> Unlocked:
        """The first slot that one of *passphrases* opens; *on_wait()* may raise meanwhile.

        Raises: WrongKey; UnsupportedImage if that would take forever.
        """
        if (count := self.luks.all_iterations) > MAX_ALL_ITERATIONS:
            raise UnsupportedImage(
                self.file.path, f"its key slots ask for {count} iterations, limit {MAX_ALL_ITERATIONS}"
            )
        for opener, passphrase in enumerate(passphrases):
            for number in self.luks.enabled:
                if key := await self.open_slot(number, passphrase, on_wait):
                    return Unlocked(key, self.luks.record.slots[number], opener)
        raise WrongKey(self.file.path, "the key opens no key slot")

    async def open_slot(
        self, number: int, passphrase: Secret, on_wait: Callable[[], None] | None = None
    ) -> bytearray | None:
        """The master key, the caller's to wipe, if *passphrase* opens that slot; *on_wait()* may raise meanwhile."""
        record, slot = self.luks.record, self.luks.record.slots[number]
        derived = await _derive(self.luks.hash_name, passphrase, slot.salt, slot.iterations, record.key_bytes, on_wait)
        where = self.host_offset + slot.material_sector * SECTOR_SIZE
        material = bytearray(await Read(self.file, where, record.material_sectors * SECTOR_SIZE))
        Cipher(self.file.path, self.luks.spec, derived).decrypt(0, material)
        key = _merge(self.luks.hash_name, memoryview(material)[: record.key_bytes * STRIPES], record.key_bytes)
        wipe(derived, material)
        digest = await _derive(
            self.luks.hash_name, key, record.digest_salt, record.digest_iterations, DIGEST_BYTES, on_wait
        )
        if digest == record.digest:
            return key
        wipe(key)
        return None

    async def add_slot(self, number: int, passphrase: Secret, key: Secret, iter_time_ms: int) -> "Vault":
        """Let *passphrase* open slot *number*, which is off; stable on return.

        Raises: ValueError if all slots together would ask for too much.
        """
        record = self.luks.record
        iterations = await _iterations(self.luks.hash_name, record.key_bytes, iter_time_ms)
        if (count := self.luks.all_iterations + iterations + record.digest_iterations) > MAX_ALL_ITERATIONS:
            text = f"with it the key slots would ask for {count} iterations, limit {MAX_ALL_ITERATIONS}"
            raise ValueError(f"Can't add a keyslot: {text}")
        sealed, material = await _seal(self.luks, number, passphrase, key, iterations)
        await Write(self.file, self.host_offset + sealed.material_sector * SECTOR_SIZE, material)
        await Sync(self.file)
        changed = record.with_slot(number, sealed)
        await self._write_header(changed, [1, 0])  # the sector that says "on" last
        return replace(self, luks=replace(self.luks, record=changed))

    async def erase_slot(self, number: int) -> "Vault":
        """Let nothing open slot *number* any more; stable on return."""
        record, slot = self.luks.record, self.luks.record.slots[number]
        changed = record.with_slot(number, replace(slot, state=DISABLED, iterations=0, salt=bytes(SALT_BYTES)))
        await self._write_header(changed, [0, 1])  # the sector that says "off" first
        nbytes = record.material_sectors * SECTOR_SIZE
        await Write(self.file, self.host_offset + slot.material_sector * SECTOR_SIZE, os.urandom(nbytes))
        await Sync(self.file)
        return replace(self, luks=replace(self.luks, record=changed))

    async def _write_header(self, record: LuksRecord, sectors: list[int]) -> None:
        """Write the *sectors* of the header that are not as before, one after the other; stable on return.

        The fields of slot 6 lie in both.
        """
        old, new = self.luks.record.pack(), record.pack()
        for start in (number * SECTOR_SIZE for number in sectors):
            piece = new[start : start + SECTOR_SIZE]
            if piece != old[start : start + SECTOR_SIZE]:
                await Write(self.file, self.host_offset + start, piece)
                await Sync(self.file)


async def _derive(
    hash_name: str,
    passphrase: Secret,
    salt: bytes,
    iterations: int,
    nbytes: int,
    on_wait: Callable[[], None] | None = None,
) -> bytes:
    """What the hash makes of *passphrase*: fresh bytes, the caller's to wipe; *on_wait()* may raise meanwhile."""

    def derive() -> bytes:
        return hashlib.pbkdf2_hmac(hash_name, passphrase, salt, iterations, nbytes)

    derived: bytes = await Compute(lambda: interruptible(derive, on_wait, wipe))
    return derived


def _random(nbytes: int) -> bytearray:
    """As `os.urandom`, without a copy that nobody wipes."""
    drawn = os.urandom(nbytes)
    found = bytearray(drawn)
    wipe(drawn)
    return found


def _merge(hash_name: str, material: memoryview, key_bytes: int) -> bytearray:
    """The key out of its stripes: anti-forensic information splitter. No integer is the key: none can be wiped."""
    mixed = bytes(key_bytes)
    for start in range(0, key_bytes * (STRIPES - 1), key_bytes):
        stripe = int.from_bytes(material[start : start + key_bytes], "big")
        mixed = _diffuse(hash_name, (int.from_bytes(mixed, "big") ^ stripe).to_bytes(key_bytes, "big"))
    key = bytearray(material[key_bytes * (STRIPES - 1) :])
    for at, byte in enumerate(mixed):
        key[at] ^= byte
    return key


def _split(hash_name: str, key: Secret) -> bytearray:
    """Stripes that give *key* only if none of them is missing."""
    material = _random(len(key) * STRIPES)
    material[-len(key) :] = bytes(len(key))
    last = _merge(hash_name, memoryview(material), len(key))
    for at, byte in enumerate(key, len(material) - len(key)):
        material[at] = byte ^ last[at - len(material)]
    wipe(last)
    return material


def _diffuse(hash_name: str, block: bytes) -> bytes:
    size = hashlib.new(hash_name).digest_size
    pieces = (block[start : start + size] for start in range(0, len(block), size))
    return b"".join(
        hashlib.new(hash_name, number.to_bytes(4, "big") + piece).digest()[: len(piece)]
        for number, piece in enumerate(pieces)
    )


async def _seal(
    luks: Luks, number: int, passphrase: Secret, key: Secret, iterations: int
) -> tuple[SlotRecord, bytearray]:
    """A slot that *passphrase* opens, and its material."""
    record, salt = luks.record, os.urandom(SALT_BYTES)
    derived = await _derive(luks.hash_name, passphrase, salt, iterations, record.key_bytes)
    stripes = _split(luks.hash_name, key)
    whole = bytearray(len(stripes) + -len(stripes) % SECTOR_SIZE)
    whole[: len(stripes)] = stripes
    material = Cipher("", luks.spec, derived).encrypt(0, whole)
    wipe(derived, stripes, whole)
    return SlotRecord(ENABLED, iterations, salt, record.slots[number].material_sector, STRIPES), material


async def _iterations(hash_name: str, nbytes: int, milliseconds: int) -> int:
    """How many iterations keep this machine busy for so long."""

    def measure() -> float:
        before = time.thread_time()
        hashlib.pbkdf2_hmac(hash_name, b"passphrase", bytes(SALT_BYTES), PROBE_ITERATIONS, nbytes)
        return time.thread_time() - before

    seconds: float = await Compute(measure)
    wanted = int(PROBE_ITERATIONS * milliseconds / 1000 / max(seconds, 1e-6))
    return max(MIN_ITERATIONS, min(wanted, MAX_ITERATIONS))


@dataclass(frozen=True, slots=True)
class NewVault:
    """A header that has one key slot."""

    luks: Luks
    header: bytes
    material: bytearray  # of slot 0

    @property
    def nbytes(self) -> int:
        """Of the header with room for all key material."""
        record = self.luks.record
        return record.payload_offset or record.end_offset

    async def write(self, file: File, host_offset: int, *, has_magic: bool = True) -> None:
        """Put it where zeros are; the header's first sector, without which it is none, last. Not stable on return.

        Unless it *has_magic* it is none yet.
        """
        record = self.luks.record
        await Write(file, host_offset + record.slots[0].material_sector * SECTOR_SIZE, self.material)
        await Write(file, host_offset + SECTOR_SIZE, self.header[SECTOR_SIZE:])
        await Sync(file)
        magic = MAGIC if has_magic else bytes(len(MAGIC))
        await Write(file, host_offset, magic + self.header[len(MAGIC) : SECTOR_SIZE])


def require_possible(path: str, encryption: Encryption) -> None:
    """Raises: UnsupportedImage, naming *path*, if nothing can be encrypted so here."""
    validate_spec(path, encryption.spec)
    require_hash(path, encryption.hash_name)
    Cipher(path, encryption.spec, bytes(range(encryption.spec.key_bytes)))


async def new_vault(path: str, encryption: Encryption, *, is_detached: bool = False) -> NewVault:
    """A fresh master key in a header, to be at *path*, whose first slot opens as *encryption* says.

    Raises: UnsupportedImage.
    """
    require_possible(path, encryption)
    record, hash_name = encryption.new_record(is_detached=is_detached), encryption.hash_name
    key = _random(record.key_bytes)
    luks = Luks(record, encryption.spec, hash_name, record.uuid.decode())
    iterations = encryption.iterations or await _iterations(hash_name, record.key_bytes, encryption.iter_time_ms)
    slot, material = await _seal(luks, 0, encryption.passphrase, key, iterations)
    salt, iterations = os.urandom(SALT_BYTES), max(MIN_ITERATIONS, iterations // DIGEST_SHARE)
    digest = await _derive(hash_name, key, salt, iterations, DIGEST_BYTES)
    wipe(key)
    sealed = replace(record, digest=digest, digest_salt=salt, digest_iterations=iterations).with_slot(0, slot)
    return NewVault(replace(luks, record=sealed), sealed.pack(), material)
