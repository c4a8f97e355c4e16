"""New images from Python."""

import os
from typing import TypeVar

from qcow2.driver.file import run
from qcow2.engine.create import Options, Preallocation, max_size, plan, write_header, write_raw, write_tables
from qcow2.format.layout import COMPRESSIONS, MAX_CLUSTER_SIZE, MIN_CLUSTER_SIZE, SECTOR_SIZE, VERSIONS
from qcow2.library.hostfile import created, opened, reserve
from qcow2.node.formats import FORMATS, format_of
from qcow2.node.gate import backing_path

T = TypeVar("T")

PathLike = str | bytes | os.PathLike[str] | os.PathLike[bytes]


def create(
    path: PathLike,
    size: int | None = None,
    *,
    format: str = "qcow2",
    backing: PathLike | None = None,
    backing_format: str = "qcow2",
    cluster_size: int = 64 << 10,
    compat: str = "1.1",
    lazy_refcounts: bool = False,
    refcount_bits: int = 16,
    compression: str = "zlib",
    preallocation: str = "off",
) -> None:
    """Make a new image at *path* of whatever is there; open it then to use it.

    *size* is in bytes, rounded up to 512; without one it is that of the *backing* file, whose name is recorded as it
    is: a relative one starts at the directory of the image.
    Raises: ValueError for what cannot be; OSError, ImageError. A file that was not there is gone then.
    """
    name = os.fsdecode(path)
    if format not in FORMATS or format == "luks":
        raise ValueError(f"{name}: format {format!r} cannot be created here, only qcow2 and raw")
    below = None if backing is None else os.fsdecode(backing)
    if below is not None:
        below_size = _size_of(backing_path(name, below), backing_format)
        size = below_size if size is None else size
    if size is None or size < 0:
        raise ValueError(f"{name}: size {size}, and no backing file to take it from")
    size += -size % SECTOR_SIZE
    if format == "raw":
        if below is not None:
            raise ValueError(f"{name}: a raw image has no backing file")
        kind = chosen("preallocation", preallocation, {each: Preallocation(each) for each in ("off", "falloc", "full")})
        with created(name) as file:
            run(write_raw(file, size, kind))
            if kind is Preallocation.FALLOC:
                reserve(file)
        return
    options = Options(
        size=size,
        version=chosen("compat", compat, VERSIONS),
        cluster_bits=cluster_bits_of(cluster_size),
        refcount_order=_power("refcount_bits", refcount_bits, 1, 64),
        lazy_refcounts=lazy_refcounts,
        compression=chosen("compression", compression, COMPRESSIONS),
        backing_name=below,
        backing_format=None if below is None else backing_format,
        preallocation=Preallocation(preallocation),
    )
    if size > (limit := max_size(options.cluster_bits)):
        raise ValueError(f"{name}: size {size}, limit {limit} with clusters of {cluster_size} bytes")
    whole = plan(options)
    with created(name) as file:
        run(write_tables(file, whole))
        if options.preallocation is Preallocation.FALLOC:
            reserve(file)
        run(write_header(file, whole))


def _size_of(path: str, image_format: str) -> int:
    with opened(path) as file:
        return format_of(path, image_format).outline(file).size


def cluster_bits_of(cluster_size: int) -> int:
    """The exponent of a cluster size. Raises: ValueError."""
    return _power("cluster_size", cluster_size, MIN_CLUSTER_SIZE, MAX_CLUSTER_SIZE)


def _power(name: str, value: int, low: int, high: int) -> int:
    """The exponent of a power of two in [low, high]."""
    if value & (value - 1) or not low <= value <= high:
        raise ValueError(f"{name} {value} is not a power of two from {low} to {high}")
    return value.bit_length() - 1


def chosen(name: str, text: str, choices: dict[str, T]) -> T:
    """What the option *name* stands for. Raises: ValueError."""
    if text not in choices:
        raise ValueError(f"{name} {text!r} is not one of {', '.join(choices)}")
    return choices[text]
