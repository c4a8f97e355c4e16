"""A chain of images on a simulated host: made at random, opened, and looked at as a guest sees it."""

import random
from dataclasses import dataclass

from qcow2.driver.buffer import MemoryBuffer
from qcow2.engine.create import Options, create
from qcow2.engine.image import Image
from qcow2.engine.opened import OpenOptions
from qcow2.format.header import read_header
from qcow2.format.layout import CompressionType
from qcow2.judge.repair import repair
from qcow2.node.raw import RawImage
from qcow2.plane.linklog import LinkLog
from tests.crash.driver import CrashDriver, SimulatedFile
from tests.crash.explorer import Violation
from tests.crash.images import check_image, replay_log
from tests.engine import ORIGIN

SECTOR = 512
MAGIC = b"QFI\xfb"
TAG, LOG_CAPACITY = 0xC0FFEE, 8  # of the link log: short enough to become full
Files = dict[str, SimulatedFile]
AnyImage = Image | RawImage


@dataclass(frozen=True)
class Chain:
    """Files by name; each image names the next one."""

    files: Files
    names: list[str]  # top first; one more, "other", is in none

    def copy(self) -> Files:
        return {name: file.copy() for name, file in self.files.items()}


def is_qcow2(file: SimulatedFile) -> bool:
    return file.read(0, 4) == MAGIC


def make_chain(draw: random.Random) -> Chain:
    """Two to four files of one chain, and one beside it, with something in each."""
    files: Files = {}
    names: list[str] = []
    for number in range(draw.randrange(2, 5)):
        below = names[0] if names else None
        files[f"image{number}"] = _make_image(draw, f"image{number}", below, files)
        names.insert(0, f"image{number}")
    files["other"] = _make_image(draw, "other", draw.choice([None, names[-1]]), files)
    return Chain(files, names)


def _make_image(draw: random.Random, name: str, below: str | None, files: Files) -> SimulatedFile:
    file, driver = SimulatedFile(name, {}, 0), CrashDriver(draw.randrange(1 << 30))
    size = draw.randrange(1, 100) * SECTOR
    if below is None and draw.random() < 0.4:
        file.resize(size)
    else:
        under = None if below is None else "qcow2" if is_qcow2(files[below]) else "raw"
        driver.run(create(file, options(draw, size, below, under)))
    files[name] = file
    image = driver.run(opened(files, name, writable=True))
    for _ in range(draw.randrange(1, 7)):
        scribble(draw, driver, image)
    driver.run(image.close())
    return file


def options(draw: random.Random, size: int, below: str | None, image_format: str | None) -> Options:
    version = draw.choice((2, 3, 3, 3))
    has_subclusters = version == 3 and draw.random() < 0.25
    return Options(
        size=size * draw.choice((1, 4)) if has_subclusters else size,
        version=version,
        cluster_bits=14 if has_subclusters else draw.choice((9, 10, 11)),
        refcount_order=draw.choice((4, 4, 0, 3, 6)) if version == 3 else 4,
        lazy_refcounts=version == 3 and draw.random() < 0.3,
        has_subclusters=has_subclusters,
        compression=draw.choice((CompressionType.ZLIB, CompressionType.ZSTD)) if version == 3 else CompressionType.ZLIB,
        backing_name=below,
        backing_format=image_format,
    )


def scribble(draw: random.Random, driver: CrashDriver, image: AnyImage) -> None:
    """One change of a part of the disk."""
    start = draw.randrange(image.size) // SECTOR * SECTOR
    nbytes = min(image.size - start, draw.randrange(1, 20) * SECTOR)
    kind = draw.choice(("data", "data", "zeros", "clear", "keep", "discard", "packed"))
    if kind == "data":
        driver.run(image.write(start, MemoryBuffer(memoryview(draw.randbytes(nbytes)))))
    elif kind == "zeros":
        driver.run(image.write(start, MemoryBuffer(memoryview(bytes(nbytes)))))
    elif kind == "discard":
        driver.run(image.discard(start, nbytes))
    elif kind == "packed" and isinstance(image, Image):
        start -= start % image.geometry.cluster_size
        nbytes = min(image.size - start, draw.randrange(1, 4) * image.geometry.cluster_size)
        text = memoryview((b"%05d " % draw.randrange(1 << 16) * nbytes)[:nbytes])
        driver.run(image.write_compressed(start, text))
    else:
        driver.run(image.write_zeroes(start, nbytes, unmap=kind != "keep"))


async def opened(
    files: Files, name: str, *, writable: bool = False, writes_to: str | None = None, has_log: bool = False
) -> AnyImage:
    """The image *name* over what it names, for reading but for itself if *writable*, and for *writes_to*."""
    file = files[name]
    may_write = OpenOptions(writable=writable or name == writes_to, cache_size=0)
    if not is_qcow2(file):
        return await RawImage.open(file, writable=may_write.writable)
    below = (await read_header(file)).backing_name
    backing = None if below is None else await opened(files, below, writes_to=writes_to)
    log = LinkLog(file.memory, file, ORIGIN, TAG, LOG_CAPACITY, renew=lambda: TAG + 1) if has_log else None
    return await Image.open(file, backing=backing, options=may_write, log=log)


async def view(files: Files, top: str) -> bytes:
    """What a guest sees of *top*, as the next process finds the files, which are changed. Raises: Violation."""
    for file in files.values():
        if is_qcow2(file):
            await replay_log(file)
            if (await read_header(file, trust_refcounts=False)).is_dirty:
                report = await repair(file)
                if report.corruptions or report.check_errors or report.leaks:
                    raise Violation(f"{file.path}: {report} after repair")
            await check_image(file)
    image = await opened(files, top)
    target = bytearray(image.size)
    await image.read(0, MemoryBuffer(memoryview(target)))
    return bytes(target)
