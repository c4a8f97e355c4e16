"""Hostile images: a sound one from the independent builder, and patches to its fields; any bytes say which.

An input is the number of a base image and patches of 12 bytes: where, how, with what. Fuzzers, tests and the corpus
share the language, so what one of them finds is an input for the others.
"""

import random
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qcow2.engine.create import Options, plan
from tests.builder import Built, Recipe, build
from tests.builder.record import (
    BACKING_FORMAT,
    BITMAPS_EXTENSION,
    COMPRESSED,
    COPIED,
    DIRTY,
    EXTENDED_L2,
    FEATURE_NAMES,
    HEADER_FIELDS,
    LAZY_REFCOUNTS,
    V2_FIELDS,
    feature_name_table,
)
from tests.fuzz.made import MADE, image_of, places_of

PATCH = struct.Struct("<HBBQ")  # place, mode, argument, value
MAX_PATCHES = 24
SNAPSHOT_FIELDS = [(0, "Q"), (8, "I"), (12, "H"), (14, "H"), (16, "I"), (20, "I"), (24, "Q"), (32, "I"), (36, "I")]
SNAPSHOT_FIELDS += [(40, "Q"), (48, "Q")]  # the extra data of version 3
BITMAP_FIELDS = [(0, "Q"), (8, "I"), (12, "I"), (16, "B"), (17, "B"), (18, "H"), (20, "I")]
EDGES = [0, 1, 2, 7, 8, 9, 21, 22, 31, 32, 63, 64, 71, 72, 104, 112, 511, 512, 513, 4095, 4096, 65535, 65536, 65537]
EDGES += [1 << 20, (1 << 25) + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, (1 << 55) - 512, 1 << 56]
EDGES += [(1 << 62) - 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 512, (1 << 64) - 1]
FLAGS = [0, 1, COPIED, COPIED | 1, COMPRESSED, COMPRESSED | COPIED, 1 << 61, 1 << 56, 2, 256]
MAX_FILE = 1 << 40


@dataclass(frozen=True)
class Place:
    """A field of an image: what it is called, where it lies, its struct code."""

    name: str
    host_offset: int
    code: str

    @property
    def nbytes(self) -> int:
        return struct.calcsize(">" + self.code)


@dataclass(frozen=True)
class Base:
    """A sound image, and every field of it that means something."""

    name: str
    content: bytes
    cluster_bits: int
    places: tuple[Place, ...]


def _something(recipe: Recipe, seed: int, *, compressed: bool = True) -> Recipe:
    """Fill a recipe with a bit of everything its version has."""
    rng = random.Random(seed)
    for index in range(0, 12, 2):
        recipe.data(index, rng.randbytes(40))
    if compressed:
        for index in range(20, 25):
            recipe.compressed(index, rng.randbytes(90), skip=index % 3)
    if recipe.version == 3:
        recipe.zero(30)
        recipe.preallocated_zero(31, b"hidden")
    recipe.data(recipe.size - 1 >> recipe.cluster_bits, b"last")
    return recipe


def _recipe(size_clusters: int = 90, cluster_bits: int = 9, version: int = 3, **options: object) -> Recipe:
    size = (size_clusters << cluster_bits) - 512
    return Recipe(size=size, cluster_bits=cluster_bits, version=version, **options)


def _with_snapshots(recipe: Recipe) -> Recipe:
    recipe.snapshot("one")
    recipe.data(2, b"newer")
    recipe.snapshot("two")
    recipe.data(4, b"newest")
    return recipe


def _plain() -> Recipe:
    return _something(_recipe(), 1)


def _old() -> Recipe:
    return _with_snapshots(_something(_recipe(version=2, layout="scattered"), 2))


def _snapshots() -> Recipe:
    return _with_snapshots(_something(_recipe(layout="reversed", seed=3), 3))


def _dirty() -> Recipe:
    return _something(_recipe(incompatible=DIRTY, compatible=LAZY_REFCOUNTS), 4)


def _bit_refcounts() -> Recipe:
    return _something(_recipe(refcount_order=0), 5, compressed=False)


def _wide_refcounts() -> Recipe:
    return _with_snapshots(_something(_recipe(refcount_order=6), 6))


def _bitmaps() -> Recipe:
    recipe = _something(_recipe(), 7)
    recipe.bitmaps = [("first", 9), ("second", 16)]
    return recipe


def _zstd() -> Recipe:
    return _something(_recipe(compression="zstd", cluster_bits=12, size_clusters=64), 8)


def _backing() -> Recipe:
    names = feature_name_table([(0, 0, "dirty bit"), (1, 0, "lazy refcounts")])
    extensions = [(BACKING_FORMAT, b"raw"), (FEATURE_NAMES, names), (0xCAFE, b"unknown")]
    return _something(_recipe(backing="base", extensions=extensions, cluster_bits=10), 9)


def _usual() -> Recipe:
    return _with_snapshots(_something(_recipe(cluster_bits=14, size_clusters=40, layout="scattered"), 10))


def _parts() -> Recipe:
    recipe = _recipe(cluster_bits=14, size_clusters=40, layout="scattered", incompatible=EXTENDED_L2)
    _with_snapshots(_something(recipe, 11))
    recipe.parts(7, random.Random(11).randbytes(9000), data=0x0000FF07, zero=0x000F0030)
    recipe.parts(8, b"", data=0, zero=0x80000001)
    return recipe


RECIPES: tuple[Callable[[], Recipe], ...] = (
    _plain,
    _old,
    _snapshots,
    _dirty,
    _bit_refcounts,
    _wide_refcounts,
    _bitmaps,
    _zstd,
    _backing,
    _usual,
    _parts,
)
BUILT, BASES = len(RECIPES), len(RECIPES) + len(MADE)  # the former QEMU can check by themselves


@cache
def bases() -> tuple[Base, ...]:
    """Every base image, built once."""
    with tempfile.TemporaryDirectory() as directory:
        built = [_base(recipe, Path(directory) / "a") for recipe in RECIPES]
    return (*built, *map(_made_base, MADE))


def _base(recipe: Callable[[], Recipe], path: Path) -> Base:
    built = build(recipe(), path)
    content = path.read_bytes()
    places = tuple(_places(built, content))
    return Base(recipe.__name__.strip("_"), content, built.recipe.cluster_bits, places)


def _made_base(make: Callable[[], Options]) -> Base:
    options = make()
    content = image_of(options)
    fields = [Place(name, *HEADER_FIELDS[name]) for name in HEADER_FIELDS]
    fields += _extension_places(content, _field(content, "header_length"))
    fields += (Place(*each) for each in places_of(content, options, plan(options).luks_offset))
    return Base(make.__name__.strip("_"), content, options.cluster_bits, tuple(fields))


def _field(content: bytes, name: str) -> int:
    offset, code = HEADER_FIELDS[name]
    return int(struct.unpack_from(">" + code, content, offset)[0])


def _places(built: Built, content: bytes) -> Iterator[Place]:
    recipe = built.recipe
    for name in V2_FIELDS if recipe.version == 2 else HEADER_FIELDS:
        yield Place(name, *HEADER_FIELDS[name])
    yield from _extension_places(content, 72 if recipe.version == 2 else _field(content, "header_length"))
    yield from (Place(f"L1 {i}", built.l1_offset + 8 * i, "Q") for i in range(_field(content, "l1_size")))
    for index, table in built.l2_offsets.items():
        yield from (Place(f"L2 {index}.{i}", table + 8 * i, "Q") for i in range(min(34, recipe.cluster_size // 8)))
    for i in range(3):
        yield Place(f"refcount table {i}", built.refcount_table_offset + 8 * i, "Q")
    for index, block in built.refcount_block_offsets.items():
        yield from (Place(f"refcounts {index}.{i}", block + 8 * i, "Q") for i in range(12))
    at = _field(content, "snapshots_offset")
    for name, _ in recipe.snapshots:
        yield from (Place(f"snapshot {name} +{start}", at + start, code) for start, code in SNAPSHOT_FIELDS)
        yield Place(f"snapshot {name} L1", int.from_bytes(content[at : at + 8], "big"), "Q")
        at += (40 + 16 + 1 + len(name) + 7) // 8 * 8
    for cluster, _ in recipe.stream_members:
        yield from (Place("compressed", cluster.host_offset + i, "B") for i in range(6))


def _extension_places(content: bytes, at: int) -> Iterator[Place]:
    while True:
        kind, nbytes = struct.unpack_from(">II", content, at)
        yield Place(f"extension {kind:#x} magic", at, "I")
        yield Place(f"extension {kind:#x} length", at + 4, "I")
        if kind == BITMAPS_EXTENSION:
            yield from _bitmap_places(content, at + 8)
        elif nbytes:
            yield Place(f"extension {kind:#x} data", at + 8, "B")
        if kind == 0:
            return
        at += 8 + (nbytes + 7) // 8 * 8


def _bitmap_places(content: bytes, at: int) -> Iterator[Place]:
    for start, code in [(0, "I"), (4, "I"), (8, "Q"), (16, "Q")]:
        yield Place(f"bitmaps +{start}", at + start, code)
    directory = struct.unpack_from(">Q", content, at + 16)[0]
    for start, code in BITMAP_FIELDS:
        yield Place(f"bitmap +{start}", directory + start, code)
    yield Place("bitmap table", struct.unpack_from(">Q", content, directory)[0], "Q")


@dataclass(frozen=True)
class Mutant:
    """A hostile image in memory; what its patches changed, in words."""

    base: Base
    content: bytes
    changes: tuple[str, ...]


def mutate(data: bytes) -> Mutant:
    """The image that *data* stands for; every input stands for one."""
    base = bases()[data[0] % BASES] if data else bases()[0]
    content = bytearray(base.content)
    starts = range(1, min(len(data) - PATCH.size + 1, MAX_PATCHES * PATCH.size), PATCH.size)
    changes = tuple(_apply(base, content, *PATCH.unpack_from(data, at)) for at in starts)
    return Mutant(base, bytes(content), changes)


def _apply(base: Base, content: bytearray, place_number: int, mode: int, argument: int, value: int) -> str:
    place = base.places[place_number % len(base.places)]
    if mode % 9 == 7:
        del content[value % (len(base.content) + 1) :]
        return f"truncated to {len(content)}"
    if mode % 9 == 8:
        at = value % len(base.content)
        if at < len(content):
            content[at] = argument
        return f"byte {at:#x} = {argument:#x}"
    if place.host_offset + place.nbytes > len(content):
        return f"{place.name} is gone"
    (old,) = struct.unpack_from(">" + place.code, content, place.host_offset)
    new = _changed(base, mode % 9, argument, value, old) % (1 << 8 * place.nbytes)
    struct.pack_into(">" + place.code, content, place.host_offset, new)
    return f"{place.name}: {old:#x} -> {new:#x}"


def _changed(base: Base, mode: int, argument: int, value: int, old: int) -> int:
    nclusters = len(base.content) >> base.cluster_bits
    match mode:
        case 0:
            return value
        case 1:
            return value % (nclusters + 3) << base.cluster_bits | FLAGS[argument % len(FLAGS)]
        case 2:
            return old ^ 1 << value % 64
        case 3:
            return old + argument - 128
        case 4:
            return EDGES[value % len(EDGES)]
        case 5:
            other = base.places[value % len(base.places)]
            return int(struct.unpack_from(">" + other.code, base.content, other.host_offset)[0])
        case _:
            return old ^ FLAGS[argument % len(FLAGS)]


def random_input(rng: random.Random, nbases: int = BASES) -> bytes:
    """An input with one patch, or a few, of the first *nbases*; places are drawn alike for all kinds of fields."""
    number = rng.randrange(nbases)
    patches = b"".join(
        PATCH.pack(rng.randrange(1 << 16), rng.choices(range(9), [1, 4, 2, 2, 3, 2, 3, 0.2, 0.5])[0], *_operands(rng))
        for _ in range(rng.choice([1, 1, 1, 2, 3, 6]))
    )
    return bytes([number]) + patches


def _operands(rng: random.Random) -> tuple[int, int]:
    return rng.randrange(256), rng.choice([rng.randrange(1 << 8), rng.randrange(1 << 16), rng.randrange(1 << 64)])
