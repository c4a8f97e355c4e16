"""Images to measure on, made by qemu-img: what is the same in every run is made once and copied."""

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

CHUNK = 1 << 20
COMPRESSIBLE = bytes(b"0123456789abcdef"[byte & 15] for byte in range(256))  # four bits of news in a byte


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to make one image.

    The base, if any, is full of data: of *base_nbytes*, compressed or not, under *chain* overlays, the image included.
    """

    nbytes: int
    options: str = "compat=1.1"  # for qemu-img create -o
    is_filled: bool = False  # with data, every cluster
    base_nbytes: int = 0
    base_is_compressed: bool = False
    chain: int = 1
    name: str = field(kw_only=True)


class Kitchen:
    """Makes images in *directory*, and keeps templates of those that take long."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._templates: dict[str, Path] = {}

    def path(self, name: str) -> Path:
        """Where the image called *name* is, or will be."""
        return self._directory / f"{name}.qcow2"

    def make(self, recipe: Recipe, name: str) -> None:
        """A new image called *name*. Raises: CalledProcessError."""
        image = self.path(name)
        if recipe.is_filled:
            template = self._template(f"filled-{recipe.nbytes}", lambda path: self._fill(path, recipe.nbytes))
            run("cp", "--sparse=always", template, image)
        elif recipe.base_nbytes:
            overlay(self._base(recipe), recipe.options, image)
        else:
            run("qemu-img", "create", "-q", "-f", "qcow2", "-o", recipe.options, image, recipe.nbytes)

    def _base(self, recipe: Recipe) -> Path:
        nbytes, compressed = recipe.base_nbytes, recipe.base_is_compressed
        name = f"base-{nbytes}{'-compressed' if compressed else ''}"
        base = self._template(name, lambda path: self._fill(path, nbytes, compressed=compressed))
        for depth in range(1, recipe.chain):
            base = self._template(f"{name}-{depth}", partial(overlay, base, recipe.options))
        return base

    def _template(self, name: str, make: Callable[[Path], None]) -> Path:
        if name not in self._templates:
            path = self.path(name)
            make(path)
            self._templates[name] = path
        return self._templates[name]

    def _fill(self, path: Path, nbytes: int, *, compressed: bool = False) -> None:
        raw = path.with_suffix(".raw")
        try:
            with raw.open("wb") as file:
                for _ in range(0, nbytes, CHUNK):
                    data = os.urandom(CHUNK)
                    file.write(data.translate(COMPRESSIBLE) if compressed else data)
            options = ["-c"] if compressed else []
            run("qemu-img", "convert", "-q", "-W", "-f", "raw", "-O", "qcow2", *options, raw, path)
        finally:
            raw.unlink(missing_ok=True)
        warm(path)


def overlay(base: Path, options: str, image: Path) -> None:
    """An empty *image* over *base*."""
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "-b", base, "-F", "qcow2", image)


def warm(path: Path) -> None:
    """Read *path* into the page cache, and have it written out."""
    with path.open("rb") as file:
        while file.read(CHUNK):
            pass
        os.fsync(file.fileno())


def run(*command: str | Path | int) -> None:
    subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL, check=True)
