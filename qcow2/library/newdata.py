"""The external data file of a new image: made, or one that exists, which nobody empties without being told to."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from qcow2.driver.file import HostFile, run
from qcow2.driver.operation import Resize, Sync, Zero
from qcow2.engine.create import Options
from qcow2.library.hostfile import created, opened
from qcow2.node.gate import DATA, named_path

KEEP, EMPTY = "keep", "empty"


def data_file_size(image_path: str, name: str) -> int:
    """Of what the image at *image_path* is to call *name*. Raises: OSError, UnsupportedImage."""
    with opened(named_path(image_path, DATA, name)) as file:
        return file.size()


@contextmanager
def new_data_file(image_path: str, options: Options, use: str | None) -> Iterator[HostFile]:
    """The data file of the new image at *image_path*, stable, and locked in this block; one that we made may go again.

    *use* says what becomes of one that exists: KEEP its content, which the image then shows, or EMPTY it.
    Raises: ValueError, OSError, UnsupportedImage.
    """
    assert options.data_file_name is not None
    path = named_path(image_path, DATA, options.data_file_name)
    _validate(image_path, path, options, use)
    with created(path) as file:
        run(_prepare(file, options.size, keeps=use == KEEP))
        yield file


def _validate(image_path: str, path: str, options: Options, use: str | None) -> None:
    if use not in (None, KEEP, EMPTY):
        raise ValueError(f"data_file_use={use} is not one of {KEEP}, {EMPTY}")
    if not os.path.exists(path):
        if use == KEEP:
            raise FileNotFoundError(2, os.strerror(2), path)
        return
    if os.path.exists(image_path) and os.path.samefile(path, image_path):
        raise ValueError(f"{path}: an image cannot be its own data file")
    if use is None:
        raise ValueError(f"data file {path!r} exists: say data_file_use={KEEP}, or {EMPTY} to lose what it holds")
    if use == KEEP and not options.data_file_raw:
        raise ValueError(f"data_file_use={KEEP} needs data_file_raw=on: else the image would not show what is there")


async def _prepare(file: HostFile, size: int, *, keeps: bool) -> None:
    """Let *file* be a raw disk of *size* bytes at least."""
    if not keeps:
        await Resize(file, 0)
        await Zero(file, 0, size)  # a device's
    if file.size() < size:
        await Resize(file, size)
    await Sync(file)
