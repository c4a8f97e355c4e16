"""The gate: every file that an image names is opened here, if the operator's policy lets the image have it.

An image is somebody else's input. Without a policy it has QEMU's rights: whatever the process may open. With one,
what it names has to lie beneath a directory that is allowed, wherever links and `..` lead; that is asked of the file
that is open then, so nobody can exchange it in between.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass

from qcow2.driver.file import HostFile
from qcow2.error import UnsupportedImage
from qcow2.node.jsonname import PREFIX, file_of

FILE = "file:"
BACKING, DATA = "backing file", "data file"
PLAIN = ("qcow2", "raw")  # formats of which a name says no more, whatever the header calls it
MAX_DEPTH = 100  # files of a chain


def require_room(path: str, nfiles: int) -> None:
    """Whether a chain of *nfiles*, the first at *path*, opens with one more over it. Raises: UnsupportedImage."""
    if nfiles >= MAX_DEPTH:
        text = f"a chain of {nfiles} files, and more than {MAX_DEPTH} do not open: commit or stream first"
        raise UnsupportedImage(path, text)


@dataclass(frozen=True, slots=True)
class Gate:
    """What images may name."""

    directories: tuple[str, ...] | None = None  # beneath which backing files lie; None: anywhere
    data_directories: tuple[str, ...] | None = None  # the same of data files, which an image has written to

    @classmethod
    def beneath(cls, directories: Iterable[str] | None) -> "Gate":
        """For all files alike. Raises: TypeError for a text, whose letters would be directories, `/` among them."""
        if directories is None:
            return ANY
        if isinstance(directories, str | bytes):
            raise TypeError(f"allow_files is a list of directories, not {directories!r}")
        return cls(*2 * [tuple(directories)])

    def way(self, namer: str, role: str, name: str) -> str:
        """The path of the file that the image at *namer* calls *name*; *role* is BACKING or DATA.

        Raises: UnsupportedImage for what is not the name of a file, or not allowed.
        """
        path = named_path(namer, role, name)
        self._require_allowed(namer, role, name, os.path.realpath(path))
        return path

    def open(self, namer: str, role: str, name: str, *, writable: bool) -> HostFile:
        """Open that file. Raises: UnsupportedImage, OSError."""
        file = HostFile.open(self.way(namer, role, name), writable=writable)
        try:
            self._require_allowed(namer, role, name, _place_of(file))
        except BaseException:
            file.close()
            raise
        return file

    def _require_allowed(self, namer: str, role: str, name: str, place: str) -> None:
        directories = self.data_directories if role == DATA else self.directories
        if directories is None:
            return
        allowed = [os.path.realpath(directory) for directory in directories]
        if not any(os.path.commonpath([directory, place]) == directory for directory in allowed):
            where = " or ".join(allowed) or "any directory"
            raise UnsupportedImage(namer, f"{role} {name!r} is not allowed: {place} is not in {where}")


ANY = Gate()


def _place_of(file: HostFile) -> str:
    """Where the open file is; without a /proc, where its name leads."""
    try:
        return os.readlink(f"/proc/self/fd/{file.fd}")
    except FileNotFoundError:
        return os.path.realpath(file.path)


def named_path(namer: str, role: str, name: str) -> str:
    """Where the file *name* of the image at *namer* is; relative names start at the image's directory.

    As with QEMU, one after "file:", or in "json:", is a file's name as it is: it starts where this process does.

    Raises: UnsupportedImage for what is not the name of a file.
    """
    if name.startswith(PREFIX):
        try:
            return file_of(name, PLAIN)
        except ValueError as error:
            raise UnsupportedImage(namer, f"{role} {name!r}: a json: name {error} is not supported") from error
    local = name.removeprefix(FILE)
    if local == name and ":" in name.split("/", 1)[0]:
        raise UnsupportedImage(namer, f"{role} {name!r}: protocol {name.split(':', 1)[0]!r} is not supported")
    return local if local != name else os.path.join(os.path.dirname(namer), name)


def is_from_here(name: str) -> bool:
    """Whether *name* is the same file for every image, as it does not start at the image's directory."""
    return name.startswith((PREFIX, FILE, "/"))


def backing_path(namer: str, name: str) -> str:
    """Where the backing file *name* of the image at *namer* is. Raises: UnsupportedImage."""
    return named_path(namer, BACKING, name)
