"""The formats an image may have, by name; which one is said by the user or the overlay, and never guessed.

A format that a program registers is opened, served and put under overlays as those that are here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcow2.driver.file import HostFile, run
from qcow2.error import UnsupportedImage

if TYPE_CHECKING:
    from qcow2.engine.opened import OpenOptions
    from qcow2.node.chain import Chain
    from qcow2.node.node import Node


@dataclass(frozen=True, slots=True)
class Outline:
    """What can be told of an image without opening it."""

    size: int  # of the disk, in bytes
    cluster_size: int  # 0 if it has no clusters


@dataclass(frozen=True, slots=True)
class Below:
    """A file that an image names as what is under it, as it says so."""

    name: str
    image_format: str | None  # None: it does not say


@dataclass(frozen=True, slots=True)
class Format:
    """How images of one format are opened; each function gets the image's open file and raises ImageError or OSError.

    *open* may open what the image names, and only through the chain.
    """

    name: str
    open: "Callable[[Chain, HostFile, OpenOptions], Node]"  # the file is locked
    outline: Callable[[HostFile], Outline]  # without a lock: others may be writing
    below: Callable[[HostFile], Below | None] = lambda file: None
    data: Callable[[HostFile], str | None] = lambda file: None  # the name of the file that data is in; "": it has none
    has_metadata: bool = False  # refcounts and tables, that can be checked and counted lazily
    has_snapshots: bool = False
    has_key_slots: bool = False  # at the start of the file, and all of the disk is encrypted


def _open_qcow2(chain: "Chain", file: HostFile, options: "OpenOptions") -> "Node":
    from qcow2.node.qcow2 import open_qcow2  # and with it the engine

    return open_qcow2(chain, file, options)


def _outline_qcow2(file: HostFile) -> Outline:
    from qcow2.format.geometry import Geometry
    from qcow2.format.header import read_header

    geometry = Geometry.of(run(read_header(file, trust_refcounts=False)).record)
    return Outline(geometry.size, geometry.cluster_size)


def _below_qcow2(file: HostFile) -> Below | None:
    from qcow2.format.header import read_header

    header = run(read_header(file, trust_refcounts=False))
    return None if header.backing_name is None else Below(header.backing_name, header.backing_format)


def _data_qcow2(file: HostFile) -> str | None:
    from qcow2.format.header import read_header

    header = run(read_header(file, trust_refcounts=False))
    return (header.data_file_name or "") if header.record.has_data_file else None


def _open_raw(chain: "Chain", file: HostFile, options: "OpenOptions") -> "Node":
    from qcow2.node.raw import RawImage

    return run(RawImage.open(file, writable=options.writable))


def _outline_raw(file: HostFile) -> Outline:
    from qcow2.format.layout import SECTOR_SIZE

    return Outline(-(-file.size() // SECTOR_SIZE) * SECTOR_SIZE, 0)


def _open_luks(chain: "Chain", file: HostFile, options: "OpenOptions") -> "Node":
    from qcow2.node.luks import LuksImage

    header = chain.open_luks_header(file)
    unlocked = LuksImage.unlock(file, options.keys, header=header, writable=options.writable, has_data=options.has_data)
    return run(unlocked)


def _outline_luks(file: HostFile) -> Outline:
    from qcow2.node.luks import read_luks

    return Outline(run(read_luks(file))[1], 0)


FORMATS: dict[str, Format] = {}


def register(image_format: Format) -> None:
    """Let images have *image_format* from now on. Raises: ValueError if there is one of its name."""
    if image_format.name in FORMATS:
        raise ValueError(f"there is a format {image_format.name!r} already")
    FORMATS[image_format.name] = image_format


register(Format("qcow2", _open_qcow2, _outline_qcow2, _below_qcow2, _data_qcow2, has_metadata=True, has_snapshots=True))
register(Format("raw", _open_raw, _outline_raw))
register(Format("luks", _open_luks, _outline_luks, has_key_slots=True))


def format_of(path: str, name: str) -> Format:
    """The format of that *name*, as it was said of the image at *path*. Raises: UnsupportedImage."""
    if name not in FORMATS:
        raise UnsupportedImage(path, f"format {name!r} is not supported, only {' and '.join(FORMATS)}")
    return FORMATS[name]
