"""The external data file of a new image: made, or one that exists, which nobody empties without being told to."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from qcow2.driver.file import HostFile, run
from qcow2.driver.operation import Resize, Sync
from qcow2.engine.create import Options
from qcow2.engine.plain import Preallocation, write_raw, write_zeros
from qcow2.library.hostfile import are_one_file, created, opened, reserve
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
        old_size = file.size() if use == KEEP else 0
        run(_prepare(file, options, old_size))
        if options.preallocation is Preallocation.FALLOC:
            reserve(file)
        yield file


def _validate(image_path: str, path: str, options: Options, use: str | None) -> None:
    if use not in (None, KEEP, EMPTY):
        raise ValueError(f"data_file_use={use} is not one of {KEEP}, {EMPTY}")
    if not os.path.exists(path):
        if use == KEEP:
            raise FileNotFoundError(2, os.strerror(2), path)
        return
    if are_one_file(path, image_path):
        raise ValueError(f"{path}: an image cannot be its own data file")
    if use is None:
        raise ValueError(f"data file {path!r} exists: say data_file_use={KEEP}, or {EMPTY} to lose what it holds")
    if use == KEEP and options.encryption is not None:
        raise ValueError(f"data_file_use={KEEP}: what is there is not encrypted with the key of a new image")
    if use == KEEP and not options.data_file_raw:
        raise ValueError(f"data_file_use={KEEP} needs data_file_raw=on: else the image would not show what is there")


async def _prepare(file: HostFile, options: Options, old_size: int) -> None:
    """Let *file*, of which *old_size* bytes are kept, be a raw disk of *options*' size at least."""
    if not old_size:
        await write_raw(file, options.size, options.preallocation)
        return
    if old_size < options.size:
        await Resize(file, options.size)
        if options.preallocation is Preallocation.FULL:
            await write_zeros(file, old_size, options.size)
    await Sync(file)
