"""From the header of an encrypted image to what deciphers its data."""

from collections.abc import Callable, Iterable

from qcow2.driver.operation import File
from qcow2.engine.data import ByGuest, Data
from qcow2.error import WrongKey
from qcow2.format.header import Header
from qcow2.format.layout import CryptMethod
from qcow2.format.luks import CipherSpec

Keys = Callable[[str], Iterable[bytes]]  # what may open the image at a path; asked for when it is opened
LEGACY = CipherSpec("aes", "cbc", "plain64", None, 16)


class Sealed:
    """Stands for the cipher of an image that nobody gave a key for: its mapping can be looked at, its data cannot."""

    def __init__(self, path: str) -> None:
        self._path = path

    def encrypt(self, sector: int, data: bytes | bytearray | memoryview) -> bytearray:
        """Raises: WrongKey."""
        raise WrongKey(self._path, "the image is encrypted, and no key was given")

    def decrypt(self, sector: int, data: bytearray | memoryview) -> None:
        """Raises: WrongKey."""
        raise WrongKey(self._path, "the image is encrypted, and no key was given")


async def open_data(file: File, header: Header, keys: Keys | None, *, has_data: bool) -> Data:
    """Where the data of the image with *header* lies, opened with one of *keys* if it is encrypted.

    Raises: WrongKey, UnsupportedImage, CorruptImage.
    """
    if header.record.crypt_method == CryptMethod.NONE:
        return Data(file)
    if not has_data:
        return Data(file, Sealed(file.path))
    passphrases = [] if keys is None else list(keys(file.path))
    if not passphrases:
        raise WrongKey(file.path, "the image is encrypted, and no key was given")
    from qcow2.plane.cipher import Cipher  # and with it libcrypto

    if header.record.crypt_method == CryptMethod.AES:  # nothing tells a wrong key from the right one
        return ByGuest(file, Cipher(file.path, LEGACY, passphrases[0][:16].ljust(16, b"\0")))
    from qcow2.engine.luks import Vault, wipe

    vault = await Vault.read(file, *header.luks_area)
    key = await vault.open(passphrases)
    try:
        return Data(file, Cipher(file.path, vault.luks.spec, key))
    finally:
        wipe(key)
