"""Copy from file to file, a little at a time: what a thread reads, searches and writes is in its core's cache."""

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from qcow2.driver.operation import LARGEST_UNIT, SCRATCH_BYTES, CopyData, File
from qcow2.job.blame import WRITING, blamed
from qcow2.job.crew import Buffers, Turn
from qcow2.job.source import Piece, Source
from qcow2.job.target import Plain, Runs, Target


class Stretch(NamedTuple):
    """Data of the disk, which begins and ends at whole units of the target, and the memory for it."""

    offset: int
    data: memoryview


class FileToFile:
    """Copies stretches whose bytes lie in files as they are, and are to."""

    def __init__(self, source: Source, target: Target, sparse_unit: int, *, keeps_order: bool, offloads: bool) -> None:
        """As the copy's `Manner` says."""
        self._source = source
        self._target = target
        self._unit = sparse_unit
        self._keeps_order = keeps_order
        self._offloads = offloads
        self._scratch = Buffers(SCRATCH_BYTES)

    async def copy(self, stretches: Sequence[Stretch], turn: Turn) -> bool:
        """Copy all of *stretches*; false: nothing is done.

        Raises: CopyFailed.
        """
        there = [await self._source.in_one_piece(offset, len(data)) for offset, data in stretches]
        pieces = [each for each in there if each is not None]
        if len(pieces) < len(stretches) or len({id(each.file) for each in pieces}) > 1:
            return False
        if self._offloads:
            await self._offload(stretches, pieces, turn)
            return True
        if not self._unit or LARGEST_UNIT % self._unit:
            return False
        plain = self._target.plain
        if plain is not None and not self._keeps_order:
            await self._copy_placed(plain, stretches, pieces)
            return True
        return await self._copy_straight(stretches, pieces)

    async def _copy_straight(self, stretches: Sequence[Stretch], pieces: Sequence[Piece]) -> bool:
        """If the target has a place for each whatever it holds."""
        places = [place for offset, _ in stretches if (place := self._target.straight(offset)) is not None]
        if len(places) < len(stretches):
            return False
        pairs = [
            (there.host_offset, place.host_offset, len(data))
            for (_, data), there, place in zip(stretches, pieces, places, strict=True)
        ]
        with suppress(OSError):  # whose it is shows when it is read, and written
            await self._copy_pairs(pieces[0].file, places[0].file, pairs)
            return True
        return False

    async def _copy_pairs(self, source: File, target: File, pairs: Sequence[tuple[int, int, int]]) -> list[Runs]:
        scratch = self._scratch.take()
        found: list[Runs] = await CopyData(source, target, pairs, self._unit, scratch)
        self._scratch.give(scratch)
        return found

    async def _copy_placed(self, plain: Plain, stretches: Sequence[Stretch], pieces: Sequence[Piece]) -> None:
        """Place all as if it were data, and tell the target afterwards what was."""
        placed = []
        for offset, data in stretches:
            whole: Runs = [(0, len(data))]
            placed.append((offset, data, whole, self._target.place(offset, len(data), whole, None)))
        spots = [plain.spots(offset, whole, place) for offset, _, whole, place in placed]
        pairs = [
            (there.host_offset + start, at.host_offset, end - start)
            for some, there in zip(spots, pieces, strict=True)
            for start, end, at in some
        ]
        try:
            found = iter(await self._copy_pairs(pieces[0].file, spots[0][0][2].file, pairs))
        except OSError:  # which of them it is
            for put, there in zip(placed, pieces, strict=True):
                await self._put(*put, there)
            return
        for (offset, _, _, place), some in zip(placed, spots, strict=True):
            runs = [(start + low, start + high) for start, _, _ in some for low, high in next(found)]
            plain.settle(offset, runs, place)

    async def _put(self, offset: int, data: memoryview, runs: Runs, place: object, there: Piece) -> None:
        with blamed("reading at byte", offset):
            await there.reading(data)
        with blamed(WRITING, offset):
            await self._target.put(offset, data, runs, place)

    async def _offload(self, stretches: Sequence[Stretch], pieces: Sequence[Piece], turn: Turn) -> None:
        """Have the host copy them, and do it ourselves if it cannot."""
        if self._keeps_order:
            await turn.come()
        whole: list[Runs] = [[(0, len(data))] for _, data in stretches]
        places = [
            self._target.place(offset, len(data), runs, None)
            for (offset, data), runs in zip(stretches, whole, strict=True)
        ]
        turn.give_way()
        for (offset, data), there, runs, place in zip(stretches, pieces, whole, places, strict=True):
            with blamed(WRITING, offset):
                could = await self._target.take(offset, len(data), place, there)
            if not could:
                await self._put(offset, data, runs, place, there)
