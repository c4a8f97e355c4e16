"""A raw disk behind a LUKS header, or one that is to be."""

from qcow2.driver.buffer import MemoryBuffer, zeroed
from qcow2.driver.operation import Buffer, File, Read, Resize, Size, Sync, Zero
from qcow2.engine.backing import Capabilities
from qcow2.engine.data import STEP, Data, SectorCipher
from qcow2.engine.encryption import Keyring, Sealed
from qcow2.engine.partial import PartialWrites, is_partial
from qcow2.engine.plain import empty, write_zeros
from qcow2.engine.rangelock import RangeLocks
from qcow2.error import CorruptImage, WrongKey
from qcow2.format.layout import SECTOR_SIZE
from qcow2.format.luks import Encryption, Luks, LuksRecord, parse_luks
from qcow2.node.raw import RawImage
from qcow2.plane.l2cache import Kind, Run


async def read_luks(file: File, header: File | None = None) -> tuple[Luks, int]:
    """The header at the start of *file*, or the one that fills *header*, and the size of the disk in *file*.

    Raises: UnsupportedImage, CorruptImage.
    """
    place, nbytes = file if header is None else header, await Size(file)
    limit = nbytes if header is None else await Size(header)
    data = await Read(place, 0, min(LuksRecord.NBYTES, limit))
    luks = parse_luks(place.path, data, limit, is_detached=header is not None)
    if luks.record.payload_offset > nbytes:
        message = f"LUKS payload at {luks.record.payload_offset}, past the end of the file at {nbytes}"
        raise CorruptImage(file.path, 0, message)
    return luks, (nbytes - luks.record.payload_offset) // SECTOR_SIZE * SECTOR_SIZE


class LuksImage(RawImage):
    """A raw image whose bytes are encrypted: what nobody has written is noise, and zeros have to be written."""

    def __init__(self, file: File, data: Data, start: int, size: int, *, read_only: bool) -> None:
        """The disk begins at *start* of *file*."""
        super().__init__(file, size, read_only=read_only)
        self.header_file = file
        self._data = data
        self._start = start
        self._locks = RangeLocks()  # on sectors
        self._partial = PartialWrites(self._locks, SECTOR_SIZE)
        self._native = data.native
        if self._native is not None:
            self._map.set_cipher(start, *self._native)

    @classmethod
    async def unlock(
        cls,
        file: File,
        keys: Keyring | None,
        *,
        header: File | None = None,
        writable: bool = False,
        has_data: bool = True,
    ) -> "LuksImage":
        """The image in *file*, opened with one of *keys*; without *has_data* its data cannot be looked at.

        Its LUKS header may be in a file of its own, *header*.
        Raises: WrongKey, UnsupportedImage, CorruptImage.
        """
        luks, size = await read_luks(file, header)
        start = luks.record.payload_offset
        if has_data and keys is None:
            raise WrongKey(file.path, "the image is encrypted, and no key was given")
        cipher: SectorCipher = Sealed(file.path)
        if has_data and keys is not None:
            place, is_detached = file if header is None else header, header is not None
            cipher = await keys.cipher(place, 0, await Size(place), is_detached=is_detached)
        image = cls(file, Data(file, cipher, origin=start), start, size, read_only=not writable)
        image.header_file = file if header is None else header
        return image

    async def resolve(self, guest_offset: int, nbytes: int) -> Run:
        """Data: a hole of the file is none of the disk."""
        return Run(Kind.DATA, 1, 0, self._start + guest_offset, nbytes)

    async def find(self, guest_offset: int, nbytes: int) -> tuple[Data, int]:
        """Where the range is: behind the header."""
        return self._data, self._start + guest_offset

    async def read(self, guest_offset: int, target: Buffer) -> None:
        """Fill *target*."""
        await self._data.read(self._start + guest_offset, target)

    async def write(self, guest_offset: int, source: Buffer) -> None:
        """Put *source* at *guest_offset*; process-safe on return."""
        self._require_writable()
        if is_partial(guest_offset, len(source)):
            await self._partial.write(guest_offset, source, self.read, self._put, self.write)
        elif self._partial.are_there:
            first, end = guest_offset // SECTOR_SIZE, (guest_offset + len(source)) // SECTOR_SIZE
            async with self._locks.hold(first, end - 1):
                await self._put(guest_offset, source)
        else:
            await self._put(guest_offset, source)

    async def _put(self, guest_offset: int, source: Buffer) -> None:
        """Write whole sectors."""
        await self._data.write(self._start + guest_offset, source)

    async def write_zeroes(self, guest_offset: int, nbytes: int, *, unmap: bool) -> None:
        """Write zeros; the space stays."""
        self._require_writable()
        for start in range(guest_offset, guest_offset + nbytes, STEP):
            piece = min(STEP, guest_offset + nbytes - start)
            await self.write(start, MemoryBuffer(zeroed(piece)))

    @property
    def capabilities(self) -> Capabilities:
        """A disk that writes zeros to what is new."""
        return Capabilities(writes_to_grow=True)

    async def discard(self, guest_offset: int, nbytes: int) -> None:
        """Nothing: a hole would be noise."""
        self._require_writable()

    async def grow(self, nbytes: int) -> None:
        """Let the disk be *nbytes* long, rounded up to a sector; zeros are written to what is new. Stable on return.

        Raises: ValueError, OSError; a power loss may leave noise past the old end, a kill leaves less than all of it.
        """
        self._require_writable()
        size = await self.grown_size(nbytes)
        if size > self.size:
            await self._append(self.size, size)
        await self._end_at(size)

    async def shrink(self, nbytes: int) -> None:
        """Let the disk be *nbytes* long, rounded up to a sector; stable on return. Raises: ValueError, OSError."""
        self._require_writable()
        size = self._shrunk_size(nbytes)
        await Resize(self.file, self._start + size)
        await self._end_at(size)

    async def _append(self, old: int, size: int) -> None:
        """Write zeros behind the end: never is the file longer than what was written. Raises: OSError; it is as before.

        A death leaves the disk longer than before, or as long.
        """
        try:
            await self.write_zeroes(old, size - old, unmap=False)
        except OSError:
            await Resize(self.file, self._start + old)
            raise

    async def preallocate(self, guest_offset: int, nbytes: int, *, writes: bool) -> None:
        """All of it has space as far as the host gave it."""
        self._require_writable()


async def write_detached(file: File, encryption: Encryption) -> None:
    """Make a LUKS header, whose disk is another file, of whatever *file* holds; stable on return."""
    from qcow2.engine.luks import new_vault  # and with it libcrypto

    vault = await new_vault(file.path, encryption, is_detached=True)
    await empty(file, encryption.nbytes)
    await Resize(file, encryption.nbytes)
    await vault.write(file, 0)
    await Sync(file)


async def write_luks(file: File, encryption: Encryption, size: int, *, is_full: bool = False) -> None:
    """Make an encrypted raw disk of *size* bytes of whatever *file* holds; it is noise. Stable on return.

    If it *is_full*, all of it is written to.
    """
    await _write_luks(file, encryption, size, has_magic=True, is_full=is_full)


async def create_all_but_magic(file: File, encryption: Encryption, size: int, keys: Keyring) -> LuksImage:
    """The same, but none until who has filled it writes MAGIC at its start -> it, opened with one of *keys*."""
    from qcow2.engine.luks import Vault

    luks = await _write_luks(file, encryption, size, has_magic=False)
    cipher, start = await keys.cipher_of(Vault(file, 0, luks, encryption.nbytes)), luks.record.payload_offset
    return LuksImage(file, Data(file, cipher, origin=start), start, size, read_only=False)


async def _write_luks(file: File, encryption: Encryption, size: int, *, has_magic: bool, is_full: bool = False) -> Luks:
    from qcow2.engine.luks import new_vault  # and with it libcrypto

    vault = await new_vault(file.path, encryption)
    await empty(file, vault.nbytes + size)
    await Zero(file, 0, vault.nbytes)  # a device's
    await Sync(file)
    await Resize(file, vault.nbytes + size)
    if is_full:
        await write_zeros(file, vault.nbytes, vault.nbytes + size)
    await vault.write(file, 0, has_magic=has_magic)
    await Sync(file)
    return vault.luks
