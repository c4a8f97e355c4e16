"""What can be wrong with an image, by whose fault; a failure of the host stays an OSError."""

import errno
import os
from typing import Any


class ImageError(Exception):
    """Something is wrong with the image at *path*; the text is one line that starts with it."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        """Its text and fields: another process of a pool gets it as it is, however it was made."""
        return _made_again, (type(self), self.args), self.__dict__


def _made_again(kind: type[ImageError], args: tuple[Any, ...]) -> ImageError:
    return kind.__new__(kind, *args)


class UnsupportedImage(ImageError):
    """Valid, as far as one can tell, but beyond us."""


class UnknownFeatures(UnsupportedImage):
    """The image has incompatible features that nobody here knows: the *names* it gives some, the bits of the others."""

    def __init__(self, path: str, names: list[str], bits: list[int]) -> None:
        wanted = ", ".join([*names, *(f"bit {bit}" for bit in bits)])
        super().__init__(path, f"unknown incompatible features: {wanted}")
        self.names = names
        self.nameless = sum(1 << bit for bit in bits)


class CorruptImage(ImageError):
    """The image contradicts itself; *host_offset* is where the contradiction was read."""

    def __init__(self, path: str, host_offset: int, message: str) -> None:
        super().__init__(path, message)
        self.host_offset = host_offset


class WrongKey(ImageError):
    """The image is encrypted, and what was given opens no key slot of it, or nothing was given."""


class MetadataOverlap(CorruptImage):
    """What is guest data or free by one table is metadata by another: who goes on writing would destroy it."""


class BitmapError(ValueError):
    """A bitmap that is not there, cannot be used, or cannot be made: in qemu-img's words."""


class NotTried(OSError):
    """The host lacked something that an operation needs before it begins: nothing has happened, so nothing is lost."""


class BelowUnclean(OSError):
    """A file under the image, which was written, is not clean; the image is."""


NO_MEMORY = os.strerror(errno.ENOMEM)  # which takes memory from the C library


def no_memory() -> OSError:
    """What an operation fails with that finds no memory to begin."""
    return NotTried(errno.ENOMEM, NO_MEMORY)
