"""Where the guest's bytes of an image lie: in a file as they are, or encrypted."""

from typing import Protocol

from qcow2.driver.buffer import MemoryBuffer, zeroed
from qcow2.driver.operation import Buffer, File, Occupied, ReadInto, Size, Sync, Write, Zero
from qcow2.error import no_memory
from qcow2.format.geometry import Geometry
from qcow2.format.layout import SECTOR_SIZE
from qcow2.plane.untouched import Untouched

STEP = 1 << 20  # bytes of zeros encrypted at a time
STRETCHES = 1 << 16  # of a data file that are looked at for holes
Piece = bytes | bytearray | memoryview | Buffer


class SectorCipher(Protocol):
    """What `qcow2.plane.cipher` has: sectors of 512 bytes, each encrypted under its number."""

    def encrypt(self, sector: int, data: bytes | bytearray | memoryview) -> bytearray: ...
    def decrypt(self, sector: int, data: bytearray | memoryview) -> None: ...
    def exported(self, origin: int) -> tuple[int, object] | None: ...


class Data:
    """The file, and the cipher if there is one: then what is written are whole sectors of 512 bytes."""

    def __init__(self, file: File, cipher: SectorCipher | None = None, *, origin: int = 0) -> None:
        """*origin*: where the cipher's sector 0 begins in the file."""
        self.file = file
        self.cipher = cipher
        self._origin = origin

    @property
    def native(self) -> tuple[int, object] | None:
        """Address and owner of the `struct extent_cipher` by which the data plane may serve it, if it may."""
        return None if self.cipher is None else self.cipher.exported(self._origin)

    @property
    def is_encrypted(self) -> bool:
        """Whether what is in the file is not what the guest reads: zeros there are none."""
        return self.cipher is not None

    async def read(self, host_offset: int, target: Buffer, guest_offset: int = 0) -> None:
        """Fill *target*, the disk's bytes at *guest_offset*, from *host_offset*.

        Past the end of the file are zeros, or what those decrypt to.
        """
        if self.cipher is None:
            await ReadInto(self.file, host_offset, target, data=True)
        else:
            await self._decipher(self.cipher, host_offset, target, (host_offset - self._origin) // SECTOR_SIZE)

    async def _decipher(self, cipher: SectorCipher, host_offset: int, target: Buffer, sector: int) -> None:
        """Read whole sectors, of which the first has number *sector*, into memory of our own."""
        start = host_offset - host_offset % SECTOR_SIZE
        end = host_offset + len(target)
        stored = zeroed(end + -end % SECTOR_SIZE - start)
        await ReadInto(self.file, start, MemoryBuffer(stored), data=True)
        cipher.decrypt(sector, stored)
        target.store(stored[host_offset - start : end - start])

    async def write(self, host_offset: int, *pieces: Piece) -> None:
        """Put *pieces*, one after the other, at *host_offset*: process-safe on return, stable after the next Sync.

        After a power loss before that, any subset of its 512-byte sectors may be on the disk. What the guest wrote is
        encrypted in memory of our own.
        """
        if self.cipher is None:
            await Write(self.file, host_offset, *pieces, data=True)
            return
        assert host_offset % SECTOR_SIZE == 0
        try:
            content = b"".join(_bytes_of(piece) for piece in pieces)
            encrypted = self.cipher.encrypt((host_offset - self._origin) // SECTOR_SIZE, content)
        except MemoryError:  # nothing has happened yet
            raise no_memory() from None
        await Write(self.file, host_offset, encrypted, data=True)

    async def zero(self, host_offset: int, nbytes: int) -> None:
        """Let the range, of encrypted data whole sectors, read as zeros; stable after the next Sync."""
        if self.cipher is None:
            await Zero(self.file, host_offset, nbytes)
            return
        end = host_offset + nbytes + -nbytes % SECTOR_SIZE
        for start in range(host_offset, end, STEP):
            await self.write(start, zeroed(min(STEP, end - start)))


class ByGuest(Data):
    """Data whose sectors are numbered as the guest's, wherever they lie: crypt_method 1. It is only read."""

    @property
    def native(self) -> tuple[int, object] | None:
        """The data plane does not know of such sectors."""
        return None

    async def read(self, host_offset: int, target: Buffer, guest_offset: int = 0) -> None:
        """As `Data.read`."""
        assert self.cipher is not None
        await self._decipher(self.cipher, host_offset, target, guest_offset // SECTOR_SIZE)


async def find_untouched(data: Data, geometry: Geometry) -> Untouched:
    """The clusters of a data file that are zeros: its holes, and what lies past its end; stable on return.

    Of a file in very many pieces not all are found, of an encrypted one, where holes are noise, none. Nobody writes to
    it meanwhile. Raises: OSError.
    """
    if data.is_encrypted:
        return Untouched(0)
    file = data.file
    untouched, end = Untouched(geometry.clusters(geometry.size)), min(await Size(file), geometry.size)
    untouched.add(range(geometry.clusters(end), geometry.clusters(geometry.size)))
    offset = 0
    for _ in range(STRETCHES):
        if offset >= end:
            break
        is_data, nbytes = await Occupied(file, offset, end - offset)
        stop = offset + nbytes
        if not is_data:
            last = geometry.clusters(stop) if stop == end else geometry.cluster_of(stop)
            untouched.add(range(geometry.clusters(offset), last))
        offset = stop
    await Sync(file)  # a hole may be newer than what is on the disk
    return untouched


def _bytes_of(piece: Piece) -> bytes | bytearray | memoryview:
    return piece if isinstance(piece, bytes | bytearray | memoryview) else piece.load()
