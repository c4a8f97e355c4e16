"""qcow2 images from Python.

import qcow2

with qcow2.open("disk.qcow2", writable=True) as disk:
    boot_sector = disk.read(0, 512)
    disk.write(1 << 20, b"hello")
    disk.flush()
"""

from qcow2.disk import Disk
from qcow2.disk import open_disk as open
from qcow2.error import CorruptImage, ImageError, UnsupportedImage

__all__ = ["CorruptImage", "Disk", "ImageError", "UnsupportedImage", "open"]
