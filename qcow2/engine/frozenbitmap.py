"""A bitmap as it was at one moment, held for who copies what it reports; and what has changed since.

The bitmap itself records on, with all that it had: so whatever ends the copy, be it a death, nothing is forgotten. What
has changed since is noted besides, in memory of this process alone. Once the copy is stable that is what the bitmap
says: exactly the bits that were copied go.
"""

import os
from dataclasses import dataclass
from typing import Any

from qcow2.engine.bitmaptable import set_bits, trim
from qcow2.format.bitmap import bits_nbytes
from qcow2.native import ffi


class Follower:
    """What has changed since a bitmap was frozen."""

    def __init__(self, granularity_bits: int, size: int) -> None:
        self.granularity_bits = granularity_bits
        self._size = size
        self._nbytes = bits_nbytes(size, granularity_bits)
        self.bits: Any = ffi.new("uint8_t[]", self._nbytes or 1)

    def fit(self, size: int) -> None:
        """Be of a disk of *size* bytes; what is new of it has changed."""
        if size == self._size:
            return
        nbytes = bits_nbytes(size, self.granularity_bits)
        bits = bytearray(self.load()[:nbytes].ljust(nbytes, b"\0"))
        if size > self._size:
            set_bits(bits, self._size >> self.granularity_bits, size - 1 >> self.granularity_bits)
        trim(bits, size, self.granularity_bits)
        self.bits, self._size, self._nbytes = ffi.new("uint8_t[]", bytes(bits) or 1), size, nbytes

    def load(self) -> bytes:
        """The bits as of now."""
        return bytes(ffi.buffer(self.bits, self._nbytes))


@dataclass(slots=True, eq=False)
class FrozenBitmap:
    """What a bitmap said of a disk of *size* bytes; bit n is bit n % 8 of byte n // 8."""

    raw_name: bytes
    bits: bytes
    granularity_bits: int
    size: int
    follower: Follower | None = None  # None: the bitmap does not record

    @property
    def name(self) -> str:
        """As users know it."""
        return os.fsdecode(self.raw_name)

    def since(self, size: int) -> bytes:
        """What has changed since, of a disk that has *size* bytes now."""
        if self.follower is None:
            return b""
        self.follower.fit(size)
        return self.follower.load()
