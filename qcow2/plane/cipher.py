"""Ciphers of disks: the typed face of `cipher.c`, in an extension of its own. Imported for encrypted images alone."""

import errno
import hashlib
from typing import Any

from qcow2 import _cipher
from qcow2.error import UnsupportedImage
from qcow2.format.layout import SECTOR_SIZE
from qcow2.format.luks import CipherSpec
from qcow2.sources import require_current

require_current(_cipher)
require_current(_cipher)
ffi: Any = _cipher.ffi
lib: Any = _cipher.lib

IV = {"plain": lib.CIPHER_PLAIN, "plain64": lib.CIPHER_PLAIN64, "essiv": lib.CIPHER_ESSIV}
NONE = {"ecb": lib.CIPHER_PLAIN64}  # whatever: there is no IV


class Cipher:
    """Encrypts and decrypts sectors of 512 bytes with one key. One thread."""

    def __init__(self, path: str, spec: CipherSpec, key: bytes | bytearray) -> None:
        """Raises: UnsupportedImage naming *path* if no library of this host has it; MemoryError."""
        bits = spec.key_bytes * 8 // (2 if spec.mode == "xts" else 1)
        name = f"{spec.name}-{bits}-{spec.mode}".upper()
        essiv_name, essiv_key = ffi.NULL, b""  # the key is a secret as well: who has it knows the IVs
        if spec.iv_hash is not None:
            essiv_key = hashlib.new(spec.iv_hash, key).digest()
            essiv_name = f"{spec.name}-{len(essiv_key) * 8}-ECB".upper().encode()
        created = lib.cipher_create(
            name.encode(),
            NONE.get(spec.mode, IV[spec.iv_generator]),
            ffi.from_buffer("uint8_t[]", key),
            len(key),
            essiv_name,
            essiv_key,
            len(essiv_key),
        )
        wipe(essiv_key)
        if created == ffi.NULL:
            raise UnsupportedImage(path, f"neither libcrypto nor libgcrypt has {name} here")
        self._cipher = ffi.gc(created, lib.cipher_destroy)

    def exported(self, origin: int) -> tuple[int, object]:
        """The address of a `struct extent_cipher` for a file whose sector 0 is at *origin*, and what keeps it alive."""
        native = ffi.new("struct extent_cipher *")
        lib.cipher_export(self._cipher, origin, native)
        return int(ffi.cast("uintptr_t", native)), (native, self._cipher)

    def encrypt(self, sector: int, data: bytes | bytearray | memoryview) -> bytearray:
        """*data*, whole sectors from number *sector* on, as it is stored."""
        stored = bytearray(len(data))
        views = ffi.from_buffer("uint8_t[]", data), ffi.from_buffer("uint8_t[]", stored, require_writable=True)
        _require(lib.cipher_encrypt(self._cipher, sector, *views, len(data)))
        return stored

    def decrypt(self, sector: int, data: bytearray | memoryview) -> None:
        """Turn *data*, whole sectors as they are stored, into what they hold."""
        view = ffi.from_buffer("uint8_t[]", data, require_writable=True)
        _require(lib.cipher_decrypt(self._cipher, sector, view, view, len(data)))


def wipe(*secrets: bytes | bytearray) -> None:
    """Overwrite *secrets*. Those that are bytes must be fresh, and nobody else's: Python thinks that they never change.

    What else Python has made of them stays, unreachable, until its memory is used again.
    """
    for secret in secrets:
        if len(secret) > 1:  # shorter ones Python shares
            ffi.memmove(ffi.from_buffer(secret), bytes(len(secret)), len(secret))


def _require(result: int) -> None:
    if result < 0:
        raise OSError(errno.EIO, f"a sector of {SECTOR_SIZE} bytes could not be encrypted or decrypted")


def keep_secrets() -> None:
    """From now on this process leaves no core dump, and nobody but root may look into its memory.

    libcrypto begins here, too: it reads its configuration at its first use.
    """
    _require(lib.secrets_stay_in_memory())
    Cipher("", CipherSpec("aes", "ecb", "plain64", None, 16), bytes(16))
