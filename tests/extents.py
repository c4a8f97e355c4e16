"""The C extent map of an image, asked one thing at a time over the crash driver: for tests of the map alone."""

import errno
import random
from collections.abc import Callable, Mapping
from typing import Any

from qcow2.driver.operation import Buffer
from qcow2.engine.image import Image
from qcow2.native import ffi, lib
from tests.crash.driver import CrashDriver, SimulatedFile
from tests.engine import Bench

TOP, BASE, OWN = 3, 4, 5
COLD = 1 / 4  # of the tables
PUNT, DATA, ZERO, FRESH = 0, 1, 2, 3
UNTOUCHED, SPOILED, NAMED = 0, 1, 2
DISCARD, UNMAP, KEEP = 0, 1, 2
AGAIN, BUSY = -errno.EAGAIN, -errno.EBUSY
WRITE = "int(*)(struct extent_writer *, uint32_t, uint64_t, void const *, uint32_t)"


class TableReader:
    """A `struct extent_reader` over simulated files, by slot: what the files hold now, unless *is_cold()*."""

    def __init__(self, files: Mapping[int, SimulatedFile], is_cold: Callable[[], bool] = lambda: False) -> None:
        self.asked: list[tuple[int, int, int]] = []  # slot, host offset, nbytes of each read
        self._files = files
        self._is_cold = is_cold
        self._read = ffi.callback("int(struct extent_reader *, uint32_t, uint64_t, void *, uint32_t)", self._fill)
        self.native = ffi.new("struct extent_reader *", {"read": self._read})

    def _fill(self, native: Any, slot: int, host_offset: int, to: Any, nbytes: int) -> int:
        file = self._files[slot]
        self.asked.append((slot, host_offset, nbytes))
        if host_offset + nbytes > file.size or self._is_cold():
            return AGAIN
        ffi.memmove(to, file.read(host_offset, nbytes), nbytes)
        return 0


class TableWriter:
    """A `struct extent_writer` over the file in slot TOP; `error`, if not 0, is what comes of the next writes."""

    def __init__(self, driver: CrashDriver, file: SimulatedFile) -> None:
        self.error = 0
        self._driver = driver
        self._file = file
        self._write = ffi.callback("int(struct extent_writer *, uint32_t, uint64_t, void *, uint32_t)", self._put)
        self.native = ffi.new("struct extent_writer *", {"write": ffi.cast(ffi.typeof(WRITE), self._write)})

    def _put(self, native: Any, slot: int, host_offset: int, data: Any, nbytes: int) -> int:
        assert slot == TOP
        if not self.error:
            self._driver.write_at_once(self._file, host_offset, bytes(ffi.buffer(data, nbytes)))
        return self.error


def ciphered(native: Any, host_offset: int, data: bytes, how: str) -> bytes:
    """*data* at *host_offset*, through the cipher *native* if there is one."""
    if native == ffi.NULL:
        return data
    cipher, result = native[0], bytearray(data)
    view = ffi.from_buffer("uint8_t[]", result, require_writable=True)
    sector = (host_offset - cipher.origin) // 512
    assert getattr(cipher, how)(cipher.context, sector, view, view, len(data)) == 0
    return bytes(result)


class Plane:
    """Asks *image* where things are and takes places of it, through the addresses the worker gets.

    Some of the tables that it wants to read are not in the page cache.
    """

    def __init__(
        self,
        driver: CrashDriver,
        image: Image,
        file: SimulatedFile,
        base: SimulatedFile | None,
        data: SimulatedFile | None = None,
    ) -> None:
        """*data*: the file that the data of *image* is in, if that is not its own."""
        image.set_slot(file, TOP)
        if base is not None:
            image.set_slot(base, BASE)
        if data is not None:
            image.set_slot(data, OWN)
        file.memory.address = 1  # of no use to the engine, which only hands it on
        translate, context, places = image.extent_map
        draw = random.Random(0)
        self.answer = 0  # of the last `take`
        self.syncs = False  # whether writes are to be stable
        self._driver = driver
        self._file = file
        by_slot = {TOP: file, BASE: base, OWN: data}
        self._files = {slot: one for slot, one in by_slot.items() if one is not None}
        self.tables = TableReader(self._files, lambda: draw.random() < COLD)
        self.writer = TableWriter(driver, file)
        self._translate = ffi.cast("extent_translate", translate)
        self._context = ffi.cast("void *", context)
        self._places = ffi.cast("struct extent_places *", places)

    def translate(self, guest_offset: int, nbytes: int, *, is_write: bool) -> Any:
        """The extent at *guest_offset*, tables read on the way."""
        extent = ffi.new("struct extent *")
        self._translate(self._context, guest_offset, nbytes, is_write, self.tables.native, extent)
        assert 0 < extent.nbytes <= nbytes
        return extent

    def read(self, guest_offset: int, nbytes: int) -> bytes | None:
        """The guest's bytes; None: it punts."""
        content = b""
        while len(content) < nbytes:
            extent = self.translate(guest_offset + len(content), nbytes - len(content), is_write=False)
            if extent.kind == PUNT:
                return None
            assert extent.kind in (DATA, ZERO)
            file = self._files[extent.slot] if extent.kind == DATA else None
            stored = file.read(extent.host_offset, extent.nbytes) if file else bytes(extent.nbytes)
            content += ciphered(extent.cipher, extent.host_offset, stored, "decrypt")
        return content

    def take(self, guest_offset: int, nbytes: int) -> Any:
        """A place, or None: only Python can, or one is held."""
        place = ffi.new("struct extent_place *")
        self.answer = self._places.take(self._context, guest_offset, nbytes, self.syncs, place)
        assert self.answer in (0, AGAIN, BUSY)
        return place if self.answer == 0 else None

    def hold(self, place: Any) -> None:
        """Its bytes take a while."""
        self._places.hold(self._context, place)

    def land(self, place: Any, data: bytes) -> bool:
        """The bytes of a place that is held are there: name it; False: it has to be given up."""
        self._driver.write_at_once(self._files[place.slot], place.host_offset - place.ahead, self._filled(place, data))
        if place.after_sync:
            self._driver.sync_at_once(self._file)
        if self._places.find(self._context, place) == AGAIN:
            self.conclude(place, SPOILED)
            return False
        name = bytes(ffi.buffer(place.name, place.name_nbytes))
        self._driver.write_at_once(self._files[place.name_slot], place.name_offset, name)
        return self.conclude(place, NAMED) == 0

    def conclude(self, place: Any, outcome: int, error: int = 0) -> int:
        return int(self._places.conclude(self._context, place, outcome, error))

    def clear(self, guest_offset: int, nbytes: int, how: int = DISCARD) -> bool:
        """A discard, or zeros that give the space back or keep it; False: it punts."""
        result = self._places.clear(self._context, guest_offset, nbytes, how, self.writer.native)
        assert result in (0, AGAIN, self.writer.error)
        return bool(result == 0)

    def write(self, guest_offset: int, data: bytes) -> bool:
        """All of it at once, nothing else in between; False: it punts."""
        extent = self.translate(guest_offset, len(data), is_write=True)
        if extent.nbytes < len(data) or extent.kind not in (DATA, FRESH):
            return False
        if extent.kind == FRESH:
            return self._write_fresh(guest_offset, data)
        assert extent.slot == (OWN if OWN in self._files else TOP)
        stored = ciphered(extent.cipher, extent.host_offset, data, "encrypt")
        self._driver.write_at_once(self._files[extent.slot], extent.host_offset, stored)
        return True

    def _write_fresh(self, guest_offset: int, data: bytes) -> bool:
        place = self.take(guest_offset, len(data))
        if place is None:
            return False
        assert (place.slot, place.name_slot) == (OWN if OWN in self._files else TOP, TOP)
        self._driver.write_at_once(self._files[place.slot], place.host_offset - place.ahead, self._filled(place, data))
        name = bytes(ffi.buffer(place.name)[: place.name_nbytes])
        if place.after_sync:
            self._driver.sync_at_once(self._file)
        if place.memory:
            self._driver.store(self._file.memory, place.name_offset, name)
            self._driver.write_at_once(self._file, place.mark_offset, bytes(ffi.buffer(place.mark)))
        else:
            self._driver.write_at_once(self._file, place.name_offset, name)
        assert self.conclude(place, NAMED) == 0
        return True

    def _filled(self, place: Any, data: bytes) -> bytes:
        """*data* in the midst of what was there."""
        if not place.old_nbytes:
            return data
        old = bytes(place.old_nbytes)
        if place.old_slot != lib.EXTENT_NO_SLOT:
            assert place.old_slot == BASE
            stored = self._files[BASE].read(place.old_offset, place.old_nbytes)
            old = ciphered(place.old_cipher, place.old_offset, stored, "decrypt")
        whole = old[: place.ahead] + data + old[place.ahead + len(data) :]
        return ciphered(place.cipher, place.host_offset - place.ahead, whole, "encrypt")


class Served:
    """An image beside a data plane: a change that the extent map can make alone it makes, else the engine."""

    def __init__(self, image: Image, plane: Plane) -> None:
        self._image = image
        self._plane = plane
        self.served = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._image, name)

    async def write(self, guest_offset: int, source: Buffer) -> None:
        """Cluster by cluster; where one cannot be written at once the engine writes all."""
        size, data, done = self._image.geometry.cluster_size, source.load(), 0
        while done < len(data):
            nbytes = min(len(data) - done, size - (guest_offset + done) % size)
            if not self._plane.write(guest_offset + done, data[done : done + nbytes]):
                await self._image.write(guest_offset, source)
                return
            self.served += 1
            done += nbytes

    async def write_zeroes(self, guest_offset: int, nbytes: int, *, unmap: bool) -> None:
        if not self._clear(guest_offset, nbytes, UNMAP if unmap else KEEP):
            await self._image.write_zeroes(guest_offset, nbytes, unmap=unmap)

    async def discard(self, guest_offset: int, nbytes: int) -> None:
        if not self._clear(guest_offset, nbytes, DISCARD):
            await self._image.discard(guest_offset, nbytes)

    def _clear(self, guest_offset: int, nbytes: int, how: int) -> bool:
        is_served = self._plane.clear(guest_offset, nbytes, how)
        self.served += is_served
        return is_served


def write_by(plane: Plane | None, bench: Bench, offset: int, data: bytes) -> bool:
    """Write as *plane* does, or, where it punts, as the engine; whether *plane* did."""
    served = plane is not None and plane.write(offset, data)
    if not served:
        bench.write(offset, data)
    return served


def clear_by(plane: Plane | None, bench: Bench, offset: int, nbytes: int, how: int) -> bool:
    """The same of a discard, or of zeros."""
    served = plane is not None and plane.clear(offset, nbytes, how)
    if not served and how == DISCARD:
        bench.driver.run(bench.image.discard(offset, nbytes))
    elif not served:
        bench.driver.run(bench.image.write_zeroes(offset, nbytes, unmap=how == UNMAP))
    return served
