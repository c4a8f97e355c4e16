"""Images to measure on, made by qemu-img: what is the same in every run is made once and copied."""

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

CHUNK = 1 << 20
KEY = b"the key of the encrypted images"
COMPRESSIBLE = bytes(b"0123456789abcdef"[byte & 15] for byte in range(256))  # four bits of news in a byte


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to make one image.

    The base, if any, is full of data: of *base_nbytes*, compressed or not, under *chain* overlays, the image included.
    Data may be in a file of its own, raw if the options say so, or encrypted; *nbitmaps* bitmaps record. The page cache
    holds an image that is filled as `cp` leaves it, in large folios, or *in_pages*, as a guest that wrote it does.
    """

    nbytes: int
    options: str = "compat=1.1"  # for qemu-img create -o
    is_filled: bool = False  # with data, every cluster
    base_nbytes: int = 0
    base_is_compressed: bool = False
    chain: int = 1
    has_data_file: bool = False
    is_encrypted: bool = False
    nbitmaps: int = 0
    in_pages: bool = False
    name: str = field(kw_only=True)


class Kitchen:
    """Makes images in *directory*, and keeps templates of those that take long."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._templates: dict[str, Path] = {}

    def path(self, name: str) -> Path:
        """Where the image called *name* is, or will be."""
        return self._directory / f"{name}.qcow2"

    @property
    def key(self) -> Path:
        """The file with the key of encrypted images."""
        path = self._directory / "key"
        if not path.exists():
            path.write_bytes(KEY)
        return path

    def make(self, recipe: Recipe, name: str) -> None:
        """A new image called *name*. Raises: CalledProcessError."""
        image = self.path(name)
        if recipe.is_filled and recipe.has_data_file:
            self._fill(image, recipe)
        elif recipe.is_filled:
            what = f"{recipe.nbytes}-{recipe.options}-{recipe.is_encrypted}".replace("/", "-")
            template = self._template(f"filled-{what}", lambda path: self._fill(path, recipe))
            if recipe.in_pages:
                run("dd", f"if={template}", f"of={image}", "bs=4k", "status=none")
            else:
                run("cp", "--sparse=always", template, image)
        elif recipe.base_nbytes:
            apart = f",data_file={data_path(image)}" if recipe.has_data_file else ""
            overlay(self._base(recipe), recipe.options + apart, image)
        else:
            run("qemu-img", "create", "-q", "-f", "qcow2", *self._options(recipe, image), image, recipe.nbytes)
        for number in range(recipe.nbitmaps):
            run("qemu-img", "bitmap", "--add", image, f"bitmap{number}")

    def remove(self, image: Path) -> None:
        """*image* and its data file, as far as they are there."""
        image.unlink(missing_ok=True)
        data_path(image).unlink(missing_ok=True)

    def _options(self, recipe: Recipe, image: Path) -> list[str]:
        """What qemu-img is told of the format."""
        options, words = [recipe.options], []
        if recipe.has_data_file:
            options.append(f"data_file={data_path(image)}")
        if recipe.is_encrypted:
            options.append("encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10")
            words = ["--object", f"secret,id=key,file={self.key}"]
        return [*words, "-o", ",".join(options)]

    def _base(self, recipe: Recipe) -> Path:
        nbytes, compressed = recipe.base_nbytes, recipe.base_is_compressed
        name = f"base-{nbytes}{'-compressed' if compressed else ''}"
        plain = Recipe(nbytes, name=name)
        base = self._template(name, lambda path: self._fill(path, plain, compressed=compressed))
        for depth in range(1, recipe.chain):
            base = self._template(f"{name}-{depth}", partial(overlay, base, recipe.options))
        return base

    def _template(self, name: str, make: Callable[[Path], None]) -> Path:
        if name not in self._templates:
            path = self.path(name)
            make(path)
            self._templates[name] = path
        return self._templates[name]

    def _fill(self, path: Path, recipe: Recipe, *, compressed: bool = False) -> None:
        raw = path.with_suffix(".raw")
        try:
            with raw.open("wb") as file:
                for _ in range(0, recipe.nbytes, CHUNK):
                    data = os.urandom(CHUNK)
                    file.write(data.translate(COMPRESSIBLE) if compressed else data)
            options = [*(["-c"] if compressed else []), *self._options(recipe, path)]
            run("qemu-img", "convert", "-q", "-W", "-f", "raw", "-O", "qcow2", *options, raw, path)
        finally:
            raw.unlink(missing_ok=True)
        warm(path)
        if recipe.has_data_file:
            copy_again(data_path(path))


def data_path(image: Path) -> Path:
    """Where the data of *image* is if that is a file of its own."""
    return image.with_suffix(".data")


def copy_again(path: Path) -> None:
    """Let the page cache hold *path* as it holds what `cp` made.

    What `qemu-img convert -W` wrote is there in large folios, and ext4 looks at all of one for each 4 KiB overwritten.
    """
    copy = path.with_suffix(".copy")
    run("cp", "--sparse=always", path, copy)
    copy.replace(path)
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
    """Raises: CalledProcessError. QEMU 7.2 now and then cannot tell its processor time, which a key slot asks for."""
    words = [str(word) for word in command]
    for _ in range(20):
        done = subprocess.run(words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if "accurate CPU usage" not in done.stderr:
            break
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, words, stderr=done.stderr)
