"""qcow2 images from Python.

import qcow2

with qcow2.open("disk.qcow2", writable=True) as disk:
    boot_sector = disk.read(0, 512)
    disk.write(1 << 20, b"hello")
    disk.flush()

qcow2.create("clone.qcow2", backing="disk.qcow2")
qcow2.convert("disk.qcow2", "disk.raw", format="raw", progress=lambda done, total: print(done, total))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qcow2.error import CorruptImage, ImageError, UnsupportedImage, WrongKey

if TYPE_CHECKING:
    from qcow2.library.disk import Disk
    from qcow2.library.disk import open_disk as open
    from qcow2.library.jobs import commit, compare, convert, rebase, stream
    from qcow2.library.make import create

    __version__: str

__all__ = [
    "CorruptImage",
    "Disk",
    "ImageError",
    "UnsupportedImage",
    "WrongKey",
    "__version__",
    "commit",
    "compare",
    "convert",
    "create",
    "open",
    "rebase",
    "stream",
]
LATER = {
    "Disk": ("disk", "Disk"),
    "open": ("disk", "open_disk"),
    "create": ("make", "create"),
    "commit": ("jobs", "commit"),
    "compare": ("jobs", "compare"),
    "convert": ("jobs", "convert"),
    "rebase": ("jobs", "rebase"),
    "stream": ("jobs", "stream"),
}  # module of the library, name there


def __getattr__(name: str) -> Any:
    """Bring the engine in when it is wanted: `qcow2 check` and `info` do without, and start in half the time."""
    if name == "__version__":
        from importlib.metadata import version

        return globals().setdefault(name, version("vhost-user-qcow2"))
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, there = LATER[name]
    return globals().setdefault(name, getattr(import_module(f"qcow2.library.{module}"), there))


def __dir__() -> list[str]:
    """What there is for others, whether it is here already or not."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
