"""qcow2 images from Python.

import qcow2

with qcow2.open("disk.qcow2", writable=True) as disk:
    boot_sector = disk.read(0, 512)
    disk.write(1 << 20, b"hello")
    disk.flush()
"""

from typing import TYPE_CHECKING, Any

from qcow2.error import CorruptImage, ImageError, UnsupportedImage, WrongKey

if TYPE_CHECKING:
    from qcow2.library.disk import Disk
    from qcow2.library.disk import open_disk as open

    __version__: str

__all__ = ["CorruptImage", "Disk", "ImageError", "UnsupportedImage", "WrongKey", "__version__", "open"]


def __getattr__(name: str) -> Any:
    """Bring the engine in when it is wanted: `qcow2 check` and `info` do without, and start in half the time."""
    if name == "__version__":
        from importlib.metadata import version

        return globals().setdefault(name, version("vhost-user-qcow2"))
    if name not in ("Disk", "open"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qcow2.library import disk

    globals().update(Disk=disk.Disk, open=disk.open_disk)
    return globals()[name]


def __dir__() -> list[str]:
    """What there is, whether it is here already or not."""
    return sorted({*globals(), *__all__})
