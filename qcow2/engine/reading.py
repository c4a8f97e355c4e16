"""The read path: each run of the mapping from where it is."""

from qcow2.driver.operation import Buffer
from qcow2.engine.backing import Backing, Place, Seen
from qcow2.engine.compressed import CompressedClusters
from qcow2.engine.data import ByGuest, Data
from qcow2.engine.mapping import Mapping
from qcow2.plane.l2cache import Kind, Run

UNKNOWN = int(Kind.MISS), int(Kind.BAD)
UNALLOCATED, ZERO_PLAIN, ZERO_ALLOCATED, DATA, COMPRESSED = (
    int(kind) for kind in (Kind.UNALLOCATED, Kind.ZERO_PLAIN, Kind.ZERO_ALLOCATED, Kind.DATA, Kind.COMPRESSED)
)


class Reader:
    """Reads guest bytes of one image and, where it has none, of its backing image."""

    def __init__(self, data: Data, mapping: Mapping, compressed: CompressedClusters, backing: "Backing | None") -> None:
        self._data = data
        self._mapping = mapping
        self._compressed = compressed
        self.backing = backing  # what shows through now

    async def read(self, guest_offset: int, target: Buffer) -> None:
        """Fill *target*, which lies inside the disk.

        Each piece is what the image held at one moment between call and return.
        """
        done, nbytes = 0, len(target)
        while done < nbytes:
            start = guest_offset + done
            run = self._mapping.known(start, nbytes - done)
            if run.kind in UNKNOWN:
                run = await self._mapping.resolve(start, nbytes - done)
            # No await between the mapping and the start of the transfer: Grace then covers it (law 5).
            if run.kind == DATA:
                part = target if run.nbytes == nbytes else target.slice(done, run.nbytes)
                await self._data.read(run.host_offset, part, start)
            elif run.kind == COMPRESSED and not self._compressed.is_at_hand(run.entry):
                async with self._compressed.turn(run.entry):
                    run = await self._mapping.resolve(start, nbytes - done)  # it may be another now
                    await self._read_run(run, start, target.slice(done, run.nbytes))
            else:
                await self._read_run(run, start, target.slice(done, run.nbytes))
            done += run.nbytes

    async def _read_run(self, run: Run, guest_offset: int, target: Buffer) -> None:
        if run.kind == DATA:
            await self._data.read(run.host_offset, target, guest_offset)
        elif run.kind == COMPRESSED:
            start = guest_offset % self._mapping.geometry.cluster_size
            content = await self._compressed.read(run.entry)
            target.store(memoryview(content)[start : start + len(target)])
        elif run.kind == UNALLOCATED:
            await self._read_backing(guest_offset, target)
        elif run.kind in (ZERO_PLAIN, ZERO_ALLOCATED):
            target.zero()
        else:
            raise AssertionError(f"unresolved {run}")

    async def _read_backing(self, guest_offset: int, target: Buffer) -> None:
        """What shows through: the backing image, and zeros past its end."""
        inside = 0 if self.backing is None else max(0, min(len(target), self.backing.size - guest_offset))
        if inside and self.backing is not None:
            await self.backing.read(guest_offset, target.slice(0, inside))
        if inside < len(target):
            target.slice(inside, len(target) - inside).zero()

    async def find(self, guest_offset: int, nbytes: int) -> Place | Seen:
        """Where in the files of the chain the range is.

        No await between the mapping and the return: who starts a transfer at once is covered by Grace (law 5).
        """
        run = await self._mapping.resolve(guest_offset, nbytes)
        if run.nbytes < nbytes:
            return Seen.PIECES
        if run.kind == UNALLOCATED:
            return await self._find_backing(guest_offset, nbytes)
        if run.kind == DATA and not isinstance(self._data, ByGuest):
            return self._data, run.host_offset
        return Seen.ZEROS if run.kind in (ZERO_PLAIN, ZERO_ALLOCATED) else Seen.PIECES

    async def _find_backing(self, guest_offset: int, nbytes: int) -> Place | Seen:
        """The same of what shows through where this image has nothing."""
        if self.backing is None or guest_offset >= self.backing.size:
            return Seen.ZEROS
        if guest_offset + nbytes > self.backing.size:
            return Seen.PIECES
        return await self.backing.find(guest_offset, nbytes)

    async def reads_as_zeros(self, guest_offset: int, nbytes: int) -> bool:
        """Whether the mapping alone, through the whole chain, shows that the range reads as zeros."""
        done = 0
        while done < nbytes:
            run = await self._mapping.resolve(guest_offset + done, nbytes - done)
            if not await self._run_is_zero(run, guest_offset + done):
                return False
            done += run.nbytes
        return True

    async def _run_is_zero(self, run: Run, guest_offset: int) -> bool:
        if run.kind in (ZERO_PLAIN, ZERO_ALLOCATED):
            return True
        if run.kind != UNALLOCATED:
            return False
        if self.backing is None or guest_offset >= self.backing.size:
            return True
        return await self.backing.reads_as_zeros(guest_offset, min(run.nbytes, self.backing.size - guest_offset))
