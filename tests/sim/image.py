"""The images that histories start from: the explorer's, and those whose data is in a file of its own."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from qcow2.driver.buffer import MemoryBuffer
from qcow2.engine.create import Options, create
from qcow2.engine.image import Image
from qcow2.engine.opened import OpenOptions
from qcow2.node.raw import RawImage
from tests.builder.record import MAGIC
from tests.crash.driver import CrashDriver, SimulatedFile
from tests.crash.history import SECTOR
from tests.crash.images import content, open_image, read_all
from tests.crash.sequence import BACKING, MANY_TABLES, OVERLAYS, SORTS, Beginning, Sort, backing_of, beginning
from tests.engine import ENCRYPTION, KEYS


@dataclass(frozen=True)
class Apart(Sort):
    """A sort of image with a data file."""


APART = {
    sort.name: sort
    for sort in (
        Apart("data-file"),
        Apart("data-file-overlay", backing=True, backing_clusters=100, lazy=True),
    )
}
DRAWN: dict[str, Sort] = {**SORTS, **OVERLAYS, **MANY_TABLES, **APART}
MORE = {
    sort.name: sort
    for sort in (
        Apart("data-file-parts", cluster_bits=14, subclusters=True),
        Apart("data-file-parts-overlay", cluster_bits=14, subclusters=True, backing=True, backing_clusters=100),
        Apart("data-file-encrypted", encrypted=True),
        Apart("data-file-encrypted-overlay", encrypted=True, backing=True, backing_clusters=100),
    )
}
NAMED = {**DRAWN, **MORE}  # to draw from more would be other histories, and the mutants have theirs


@dataclass(frozen=True)
class Files:
    """An image, what lies under it, and the file of its data if that is another one; copy them before use."""

    begun: Beginning
    data: SimulatedFile | None = None


@cache
def files_of(sort: Sort) -> Files:
    """The files before anything happened; in a data file are holes, and old content that may not show."""
    if not isinstance(sort, Apart):
        return Files(beginning(sort, "room"))
    size, driver = 1 << sort.cluster_bits, CrashDriver()
    options = Options(
        sort.nsectors * SECTOR,
        cluster_bits=sort.cluster_bits,
        lazy_refcounts=sort.lazy,
        has_subclusters=sort.subclusters,
        encryption=ENCRYPTION if sort.encrypted else None,
        backing_name=BACKING if sort.backing else None,
        backing_format="raw" if sort.backing else None,
        data_file_name="data",
    )
    file, data = SimulatedFile("image.qcow2", {}, 0), SimulatedFile.parse("data", content(8, options.size))
    for cluster in range(options.size // size):
        if cluster % 8 < 5:
            data.zero(cluster * size, size)
    driver.run(create(file, options))
    backing = backing_of(sort, content(7, sort.backing_clusters * size - SECTOR))
    image = driver.run(open_image(file, backing, data=data))
    for index in (0, 1, 5):
        driver.run(image.write(index * size, MemoryBuffer(memoryview(bytearray(content(index, size))))))
    driver.run(image.write_zeroes(2 * size, size, unmap=False))
    contents = driver.run(read_all(image))
    driver.run(image.close())
    return Files(Beginning(file, backing, contents, {}), data)


async def open_again(file: SimulatedFile, backing: SimulatedFile | None, data: SimulatedFile | None) -> Image:
    """As a reader."""
    base: Any = None
    if backing is not None:
        is_image = backing.read(0, 4) == MAGIC.to_bytes(4, "big")
        base = await (Image.open(backing) if is_image else RawImage.open(backing))
    return await Image.open(file, backing=base, data_file=data, options=OpenOptions(keys=KEYS))
