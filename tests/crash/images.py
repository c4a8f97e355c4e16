"""The images that workloads start from, built byte by byte, and how a crashed one is opened again."""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.operation import Store
from qcow2.engine.create import Options, create
from qcow2.engine.image import Image
from qcow2.engine.linkpolicy import LinkPolicy
from qcow2.engine.opened import OpenOptions
from qcow2.engine.plain import Preallocation
from qcow2.engine.replay import clear_mark, replay
from qcow2.engine.restore import restore_bits
from qcow2.format.header import read_header
from qcow2.judge.check import check
from qcow2.judge.repair import repair
from qcow2.node.raw import RawImage
from qcow2.plane.linklog import LIMIT, LinkLog, read_log
from tests.builder import Recipe, build
from tests.builder.record import EXTENDED_L2, MAGIC
from tests.crash.driver import CrashDriver, SimulatedFile
from tests.crash.explorer import Violation
from tests.crash.history import SECTOR
from tests.engine import ENCRYPTION, KEYS, ORIGIN, waiting

LAZY = 1  # compatible feature bit
TAG, LOG_CAPACITY = 0xC0FFEE, 8  # of the link log
LOG_NUMBERS = 20  # of a process's first log, before another must begin


@dataclass(frozen=True)
class Kind:
    """A sort of image: how it is made, and whether a backing file lies under it."""

    name: str
    cluster_bits: int = 16
    nclusters: int = 12
    lazy: bool = False
    version: int = 3
    refcount_order: int = 4
    backing: bool = False
    beyond: int = -5  # sectors of the backing file past the end of the disk
    incompatible: int = 0
    fill: Callable[[Recipe], None] = field(default=lambda recipe: None)
    encrypted: bool = False  # a new image, with data in two clusters
    data_file: bool = False  # the same, with its data in a file that holds something
    raw: bool = False  # which is the disk

    @property
    def cluster_sectors(self) -> int:
        return (1 << self.cluster_bits) // SECTOR

    @property
    def nsectors(self) -> int:
        """The virtual size; the last cluster is partial."""
        return self.nclusters * self.cluster_sectors - (3 if self.cluster_bits > 12 else 0)


@dataclass(frozen=True)
class Start:
    """The bytes of an image before anything happened, and what its guest sees."""

    image: SimulatedFile
    backing: SimulatedFile | None
    contents: bytes
    data: SimulatedFile | None = None  # the file of its data, if that is another one


def content(seed: int, nbytes: int) -> bytes:
    """Old data of a cluster: compressible, different everywhere."""
    draw = random.Random(seed)
    return b"".join(b"old%05d" % draw.randrange(100000) * 64 for _ in range(-(-nbytes // SECTOR)))[:nbytes]


def some_data(recipe: Recipe) -> None:
    """A few data clusters, not in order, a zero and a preallocated zero cluster with something hidden in it."""
    for index in (1, 2, 5):
        recipe.data(index, content(index, recipe.cluster_size))
    if recipe.version >= 3:
        recipe.zero(6)
        recipe.preallocated_zero(7, content(99, recipe.cluster_size))


def some_compressed(recipe: Recipe) -> None:
    """Compressed clusters that share host clusters, beside data."""
    for index in (0, 1, 2, 3):
        recipe.compressed(index, content(index, recipe.cluster_size))
    recipe.data(4, content(4, recipe.cluster_size))


def a_snapshot(recipe: Recipe) -> None:
    """Data that an internal snapshot shares, and data that it does not."""
    some_data(recipe)
    recipe.snapshot("kept")
    recipe.data(3, content(33, recipe.cluster_size))


def some_bitmaps(recipe: Recipe) -> None:
    """Data, and bitmaps that record what becomes of it: one of single sectors, one of more than a cluster."""
    some_data(recipe)
    recipe.bitmaps += [("fine", 9), ("coarse", recipe.cluster_bits + 2)]
    recipe.are_bitmaps_clean = True


def some_parts(recipe: Recipe) -> None:
    """Clusters of which a part is data, a part zeros and the rest nothing, beside whole ones and a compressed one."""
    some_data(recipe)
    recipe.parts(3, content(3, recipe.cluster_size), data=0x0000FF07, zero=0x000F0030)
    recipe.parts(8, content(8, recipe.cluster_size), data=0, zero=0x80000001)
    recipe.compressed(9, content(9, recipe.cluster_size))


def shared_parts(recipe: Recipe) -> None:
    """The same, most of them shared with a snapshot."""
    some_parts(recipe)
    recipe.snapshot("kept")
    recipe.parts(3, content(34, recipe.cluster_size), data=0x00FF0001, zero=0x0000FF00)


PARTS: dict[str, dict[str, Any]] = {
    "": {"fill": some_parts},
    "-lazy": {"fill": some_parts, "lazy": True},
    "-backing": {"fill": some_parts, "backing": True, "lazy": True},
    "-snapshot": {"fill": shared_parts, "backing": True},
}  # with subclusters
KINDS = {
    kind.name: kind
    for kind in (
        Kind("lazy", lazy=True),
        Kind("accurate", fill=some_data),
        Kind("backing", backing=True, lazy=True, fill=some_data),
        Kind("v2", version=2, fill=some_data, cluster_bits=12, nclusters=24),
        Kind("v2-backing", backing=True, version=2, fill=some_data, cluster_bits=12, nclusters=24),
        Kind("compressed", fill=some_compressed, cluster_bits=12, nclusters=24),
        Kind("compressed-lazy", lazy=True, fill=some_compressed, cluster_bits=12, nclusters=24),
        Kind("snapshot", fill=a_snapshot, cluster_bits=12, nclusters=24),
        Kind("snapshot-lazy", lazy=True, fill=a_snapshot, cluster_bits=12, nclusters=24),
        Kind("small", cluster_bits=9, nclusters=150, fill=some_data),
        Kind("small-lazy", cluster_bits=9, nclusters=150, lazy=True, fill=some_data),
        Kind("small-backing", cluster_bits=9, nclusters=150, backing=True),
        Kind("longer-backing", nclusters=20, cluster_bits=10, backing=True, beyond=200, fill=some_data),
        Kind("encrypted", cluster_bits=10, nclusters=60, encrypted=True),
        Kind("encrypted-lazy", cluster_bits=10, nclusters=60, encrypted=True, lazy=True, refcount_order=3),
        Kind("encrypted-backing", cluster_bits=10, nclusters=60, encrypted=True, backing=True),
        Kind("encrypted-parts", cluster_bits=14, encrypted=True, backing=True, incompatible=EXTENDED_L2),
        Kind("encrypted-v2", cluster_bits=10, nclusters=60, encrypted=True, version=2),
        *(Kind(f"parts{name}", cluster_bits=14, incompatible=EXTENDED_L2, **what) for name, what in PARTS.items()),
        Kind("width-1", refcount_order=0, cluster_bits=9, nclusters=100),
        Kind("width-64", refcount_order=6, cluster_bits=9, nclusters=100, fill=some_data),
    )
}


BITMAPS = {
    kind.name: kind
    for kind in (
        Kind("bitmaps", cluster_bits=9, nclusters=150, fill=some_bitmaps),
        Kind("bitmaps-lazy", cluster_bits=9, nclusters=150, lazy=True, fill=some_bitmaps),
        Kind("bitmaps-backing", cluster_bits=12, nclusters=24, backing=True, fill=some_bitmaps),
    )
}


APART = {
    kind.name: kind
    for kind in (
        Kind("data-file", cluster_bits=11, nclusters=24, data_file=True),
        Kind("data-file-backing", cluster_bits=11, nclusters=24, data_file=True, backing=True, lazy=True),
        Kind("data-file-raw", cluster_bits=11, nclusters=24, data_file=True, raw=True),
        Kind("data-file-parts", cluster_bits=14, data_file=True, backing=True, incompatible=EXTENDED_L2),
        Kind("data-file-raw-parts", cluster_bits=14, data_file=True, raw=True, incompatible=EXTENDED_L2),
        Kind("data-file-encrypted", cluster_bits=11, nclusters=24, data_file=True, encrypted=True, backing=True),
        Kind("data-file-raw-encrypted", cluster_bits=11, nclusters=24, data_file=True, encrypted=True, raw=True),
    )
}


@cache
def start(name: str) -> Start:
    """The image of that kind; copy it before use."""
    kind = (KINDS | BITMAPS | APART)[name]
    nbytes = kind.nsectors * SECTOR
    under = content(7, nbytes + kind.beyond * SECTOR) if kind.backing else b""
    if kind.encrypted or kind.data_file:
        return _made(kind, nbytes, under)
    recipe = Recipe(
        size=nbytes,
        version=kind.version,
        cluster_bits=kind.cluster_bits,
        refcount_order=kind.refcount_order,
        incompatible=kind.incompatible,
        compatible=LAZY if kind.lazy else 0,
        backing="base.raw" if kind.backing else None,
    )
    kind.fill(recipe)
    with TemporaryDirectory() as directory:
        path = Path(directory) / "image"
        build(recipe, path)
        image = SimulatedFile.parse(f"{name}.qcow2", path.read_bytes())
    backing = SimulatedFile.parse("base.raw", under) if kind.backing else None
    return Start(image, backing, recipe.contents(under))


def _made(kind: Kind, nbytes: int, under: bytes) -> Start:
    """What the builder knows nothing of: ciphers, with a key slot that costs little to open, and data files."""
    options = Options(
        nbytes,
        version=kind.version,
        cluster_bits=kind.cluster_bits,
        refcount_order=kind.refcount_order,
        lazy_refcounts=kind.lazy,
        has_subclusters=bool(kind.incompatible & EXTENDED_L2),
        backing_name="base.raw" if kind.backing else None,
        backing_format="raw" if kind.backing else None,
        encryption=ENCRYPTION if kind.encrypted else None,
        data_file_name="data" if kind.data_file else None,
        data_file_raw=kind.raw,
        preallocation=Preallocation.METADATA if kind.raw else Preallocation.OFF,
    )
    file, driver = SimulatedFile(f"{kind.name}.qcow2", {}, 0), CrashDriver()
    data = _untidy(options) if kind.data_file else None
    backing = SimulatedFile.parse("base.raw", under) if kind.backing else None
    driver.run(create(file, options))
    image = driver.run(open_image(file, backing, data=data))
    for index in (1, 5):
        old = content(index, options.cluster_size)
        driver.run(image.write(index << kind.cluster_bits, MemoryBuffer(memoryview(old))))
    contents = driver.run(read_all(image))
    driver.run(image.close())
    return Start(file, backing, contents, data)


def _untidy(options: Options) -> SimulatedFile:
    """A file with something in it, and holes."""
    data = SimulatedFile.parse("data", content(8, options.size))
    for index in range(0, options.size // options.cluster_size, 3):
        data.zero(index * options.cluster_size, options.cluster_size)
    return data


async def open_image(
    file: SimulatedFile,
    backing: SimulatedFile | None,
    *,
    data: SimulatedFile | None = None,
    writethrough: bool = False,
    life: int = 0,
) -> Image:
    """Open for writing over the backing file, as the daemon does: the link log replayed, then repaired if it is dirty.

    What the guest writes next has a log of its own, short enough to become full, whose tag depends on *life*, a number
    of the process; the cache is as small as can be.
    """
    base = None if backing is None else await _open_backing(backing)
    await replay_log(file, data)
    if (await read_header(file, trust_refcounts=False)).is_dirty:
        report = await repair(file)
        if report.corruptions or report.check_errors or report.leaks:
            raise Violation(f"{report} after repair")
    tags = itertools.count(TAG + life)
    log = LinkLog(file.memory, file, ORIGIN, next(tags), LOG_CAPACITY, renew=lambda: next(tags))
    log.native.first = log.native.next = LIMIT - LOG_NUMBERS
    options = OpenOptions(writable=True, cache_size=0, keys=KEYS)
    image = await Image.open(file, backing=base, data_file=data, options=options, log=log)
    image.set_link_policy(LinkPolicy(may_wait=lambda: not writethrough))
    return image


async def _open_backing(file: SimulatedFile) -> Image | RawImage:
    return await (Image.open(file) if file.read(0, 4) == MAGIC.to_bytes(4, "big") else RawImage.open(file))


async def replay_log(file: SimulatedFile, data: SimulatedFile | None = None) -> None:
    """Bring what the shared memory holds into the file, and clear the memory; after a power loss there is nothing."""
    content = bytes(file.memory.content)
    header = await read_header(file, trust_refcounts=False)
    if header.log_mark and not any(content):
        await clear_mark(file)
    elif header.log_mark:
        links = waiting(file)
        if links is None:
            raise Violation("the link log does not know the state of the image")
        found = read_log(content)
        if found is not None and found.live is not None:
            await restore_bits(file, header, found.live)
        outcome = await replay(file, header, links, data)
        if outcome.dropped:
            raise Violation(f"link log after a kill: {outcome}")
    await Store(file.memory, (0, bytes(len(content))))


async def read_all(image: Image) -> bytes:
    """The whole disk as the guest sees it."""
    target = bytearray(image.size)
    await image.read(0, MemoryBuffer(memoryview(target)))
    return bytes(target)


async def check_image(file: SimulatedFile) -> None:
    """Raises Violation if our check finds a corruption; leaks are permitted."""
    found: list[str] = []
    report = await check(file, say=found.append)
    if report.corruptions or report.check_errors:
        raise Violation("; ".join(line for line in found if line.startswith("ERROR")))
