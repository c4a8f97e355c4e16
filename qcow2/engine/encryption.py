"""From the header of an encrypted image to what deciphers its data."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from qcow2.driver.operation import File
from qcow2.engine.data import ByGuest, Data, SectorCipher
from qcow2.error import UnsupportedImage, WrongKey
from qcow2.format.header import Header
from qcow2.format.layout import CryptMethod
from qcow2.format.luks import CipherSpec, Encryption, Luks, SlotRecord

if TYPE_CHECKING:
    from qcow2.engine.luks import Vault

NO_KEY = "the image is encrypted, and no key was given"
LEGACY = CipherSpec("aes", "cbc", "plain64", None, 16)


class Keyring:
    """What opens the encrypted images of a chain, and the ciphers of those it has opened: a second time costs nothing.

    One thread at a time uses it, and the images opened with it.
    """

    def __init__(
        self,
        passphrases: Callable[[str], Iterable[bytes | bytearray]],
        on_wait: Callable[[], None] | None = None,
        *,
        are_ranked: bool = False,
    ) -> None:
        """*passphrases(path)*: what may open the image at *path*; asked for when it is opened for the first time.

        A bytearray is ours, to be wiped. *on_wait()* may raise while a key is derived, on any thread. The first of
        those that *are_ranked* is that of legacy AES, which cannot tell; else there must be one only.
        """
        self.passphrases = passphrases
        self.on_wait = on_wait
        self.are_ranked = are_ranked
        self._ciphers: dict[tuple[bytes, bytes, CipherSpec], SectorCipher] = {}
        self._opened: dict[SectorCipher, Callable[[], Encryption]] = {}

    def again(self) -> "Keyring":
        """One that has opened nothing, for another thread."""
        return Keyring(self.passphrases, self.on_wait, are_ranked=self.are_ranked)

    async def cipher(self, file: File, host_offset: int, nbytes: int, *, is_detached: bool = False) -> SectorCipher:
        """By the LUKS header there, or of a disk elsewhere. Raises: WrongKey, UnsupportedImage, CorruptImage."""
        from qcow2.engine.luks import Vault  # and with it libcrypto

        return await self.cipher_of(await Vault.read(file, host_offset, nbytes, is_detached=is_detached))

    async def cipher_of(self, vault: "Vault") -> SectorCipher:
        """What opens *vault* deciphers. Raises: WrongKey."""
        from qcow2.plane.cipher import Cipher, wipe

        file = vault.file
        record = vault.luks.record
        name = record.digest, record.digest_salt, vault.luks.spec
        if name not in self._ciphers:
            passphrases = self.require(file.path)
            try:
                unlocked = await vault.open(passphrases, self.on_wait)
            finally:
                wipe(*passphrases)
            cipher = self._ciphers[name] = Cipher(file.path, vault.luks.spec, unlocked.key)
            wipe(unlocked.key)
            self._opened[cipher] = partial(self._alike, file.path, vault.luks, unlocked.slot, unlocked.opener)
        return self._ciphers[name]

    def alike(self, path: str, cipher: SectorCipher) -> Encryption:
        """How a new image is encrypted that what opened the one at *path*, which has that *cipher*, opens as well.

        The master key will be another, the passphrase is the caller's to wipe. Raises: UnsupportedImage.
        """
        if cipher not in self._opened:
            raise UnsupportedImage(path, "not encrypted with LUKS, as a new image would be: convert it")
        return self._opened[cipher]()

    def _alike(self, path: str, luks: Luks, slot: SlotRecord, opener: int) -> Encryption:
        from qcow2.plane.cipher import wipe

        passphrases = self.require(path)
        passphrase = passphrases.pop(opener)
        wipe(*passphrases)
        return Encryption(luks.spec, luks.hash_name, passphrase, iterations=slot.iterations)

    def require(self, path: str) -> list[bytearray]:
        """The passphrases, the caller's to wipe. Raises: WrongKey if there are none."""
        given = self.passphrases(path)
        if found := [each if isinstance(each, bytearray) else bytearray(each) for each in given]:
            return found
        raise WrongKey(path, NO_KEY)


@contextmanager
def encrypted_alike(keys: Keyring | None, path: str, cipher: SectorCipher | None) -> Iterator[Encryption | None]:
    """How a new image is encrypted as the one at *path*, which has that *cipher*: in plain if it has none.

    What opened that one, with *keys*, opens the new one; the passphrase is wiped behind. Raises: UnsupportedImage.
    """
    if cipher is None:
        yield None
        return
    from qcow2.plane.cipher import wipe

    assert keys is not None  # they have opened it
    encryption = keys.alike(path, cipher)
    try:
        yield encryption
    finally:
        wipe(encryption.passphrase)


class Sealed:
    """Stands for the cipher of an image that nobody gave a key for: its mapping can be looked at, its data cannot."""

    def __init__(self, path: str) -> None:
        self._path = path

    def encrypt(self, sector: int, data: bytes | bytearray | memoryview) -> bytearray:
        """Raises: WrongKey."""
        raise WrongKey(self._path, NO_KEY)

    def decrypt(self, sector: int, data: bytearray | memoryview) -> None:
        """Raises: WrongKey."""
        raise WrongKey(self._path, NO_KEY)

    def exported(self, origin: int) -> None:
        """Nothing."""


async def open_data(
    file: File, header: Header, keys: Keyring | None, *, has_data: bool, data_file: File | None = None
) -> Data:
    """Where the data of the image with *header* lies, opened with one of *keys* if it is encrypted.

    Raises: WrongKey, UnsupportedImage, CorruptImage.
    """
    place = file if data_file is None else data_file
    if header.record.crypt_method == CryptMethod.NONE:
        return Data(place)
    if not has_data:
        return Data(place, Sealed(file.path))
    if keys is None:
        raise WrongKey(file.path, NO_KEY)
    if header.record.crypt_method == CryptMethod.LUKS:
        return Data(place, await keys.cipher(file, *header.luks_area))
    from qcow2.plane.cipher import Cipher, wipe

    passphrases = keys.require(file.path)
    key = bytearray(LEGACY.key_bytes)
    start = passphrases[0][: len(key)]
    key[: len(start)] = start
    wipe(*passphrases)
    try:
        if len(passphrases) > 1 and not keys.are_ranked:
            count = len(passphrases)
            raise WrongKey(
                file.path, f"{count} keys are given, and legacy AES tells no wrong one: name it, or give one"
            )
        return ByGuest(place, Cipher(file.path, LEGACY, key))
    finally:
        wipe(key, start)
