"""The images that daemons are killed on, built byte by byte."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.builder import Recipe, build
from tests.builder.record import BACKING_FORMAT, EXTENDED_L2, LAZY_REFCOUNTS
from tests.kill.ledger import Ledger
from tests.oracle import qemu_check, qemu_read

NBYTES = 24 << 20  # of the disk
BASE_CLUSTER_BITS = 16


@dataclass(frozen=True)
class Start:
    """An image on the host, and what its guest sees."""

    path: Path
    contents: bytes
    lazy: bool
    cluster_bits: int

    @property
    def paths(self) -> list[Path]:
        """The files that a daemon has locked."""
        return [self.path]

    @property
    def options(self) -> list[str]:
        """What its daemons are told of it."""
        return []

    def read(self) -> bytes:
        """All of the disk, as QEMU reads it."""
        return qemu_read(self.path)

    def check(self) -> tuple[int, dict[str, Any]]:
        """Exit code and report of QEMU's check."""
        return qemu_check(self.path)

    def judge(self, ledger: Ledger) -> None:
        """What else there is, once the image is closed. Raises: AssertionError."""


def old_data(draw: random.Random, nbytes: int) -> bytes:
    """Compressible, and different in every sector."""
    return b"".join(b"old %12d" % draw.randrange(10**12) * 32 for _ in range(nbytes // 512))


def recipe_of(cluster_bits: int, nbytes: int, *, lazy: bool, incompatible: int = 0) -> Recipe:
    compatible = LAZY_REFCOUNTS if lazy else 0
    return Recipe(size=nbytes, cluster_bits=cluster_bits, compatible=compatible, incompatible=incompatible)


def some_clusters(recipe: Recipe, draw: random.Random, *, compressed: bool) -> None:
    """Old content in three of four stretches of 256 KiB; half of the last third stays unallocated."""
    nbytes = recipe.cluster_size
    for index in range(recipe.size // nbytes):
        if (index * nbytes >> 18) % 4 == 3:
            continue
        (recipe.compressed if compressed else recipe.data)(index, old_data(draw, nbytes))


def plain(
    directory: Path, draw: random.Random, nbytes: int, *, lazy: bool, cluster_bits: int, incompatible: int = 0
) -> Start:
    """Empty, but for a little old data."""
    recipe = recipe_of(cluster_bits, nbytes, lazy=lazy, incompatible=incompatible)
    for index in range(0, min(64, nbytes // recipe.cluster_size), 3):
        recipe.data(index, old_data(draw, recipe.cluster_size))
    return Start(build(recipe, directory / "a").path, recipe.contents(), lazy, cluster_bits)


def overlay(
    directory: Path,
    draw: random.Random,
    nbytes: int,
    *,
    lazy: bool,
    cluster_bits: int,
    compressed: bool,
    incompatible: int = 0,
) -> Start:
    """Empty over a base image full of old data, which may be compressed."""
    base = recipe_of(BASE_CLUSTER_BITS, nbytes, lazy=False)
    some_clusters(base, draw, compressed=compressed)
    build(base, directory / "base")
    recipe = recipe_of(cluster_bits, nbytes, lazy=lazy, incompatible=incompatible)
    recipe.backing = "base"
    recipe.extensions = [(BACKING_FORMAT, b"qcow2")]
    contents = base.contents()
    return Start(build(recipe, directory / "a").path, recipe.contents(contents), lazy, cluster_bits)


def compressed(directory: Path, draw: random.Random, nbytes: int, *, lazy: bool, cluster_bits: int) -> Start:
    """An image that is compressed itself."""
    recipe = recipe_of(cluster_bits, nbytes, lazy=lazy)
    some_clusters(recipe, draw, compressed=True)
    return Start(build(recipe, directory / "a").path, recipe.contents(), lazy, cluster_bits)


KINDS = ("lazy", "accurate", "overlay", "overlay-lazy", "compressed-base", "compressed", "parts", "parts-overlay")


def make(kind: str, directory: Path, draw: random.Random, nbytes: int = NBYTES) -> Start:
    """A new image of *kind*, a disk of *nbytes*, of clusters of 4 or 64 KiB."""
    bits = draw.choice((12, 16))
    match kind:
        case "lazy" | "accurate":
            return plain(directory, draw, nbytes, lazy=kind == "lazy", cluster_bits=bits)
        case "overlay" | "overlay-lazy":
            return overlay(directory, draw, nbytes, lazy=kind == "overlay-lazy", cluster_bits=bits, compressed=False)
        case "compressed-base":
            return overlay(directory, draw, nbytes, lazy=draw.random() < 0.5, cluster_bits=bits, compressed=True)
        case "compressed":
            return compressed(directory, draw, nbytes, lazy=draw.random() < 0.5, cluster_bits=bits)
        case "parts":
            bits = draw.choice((14, 17))
            return plain(directory, draw, nbytes, lazy=draw.random() < 0.5, cluster_bits=bits, incompatible=EXTENDED_L2)
        case "parts-overlay":
            bits, lazy = draw.choice((14, 17)), draw.random() < 0.5
            more = {"compressed": False, "incompatible": EXTENDED_L2}
            return overlay(directory, draw, nbytes, lazy=lazy, cluster_bits=bits, **more)
    raise ValueError(kind)
