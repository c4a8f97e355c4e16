"""`qcow2://PATH` for fsspec, and with it pandas, pyarrow and dask: the disk inside an image as a file of bytes."""

import os
from typing import Any

try:
    from fsspec.spec import AbstractFileSystem
except ImportError as error:
    raise ImportError("qcow2:// needs fsspec: pip install 'vhost-user-qcow2[fsspec]'") from error

from qcow2.library.disk import open_disk
from qcow2.library.file import DiskFile


class _OwnedFile(DiskFile):
    """The one file of a disk: closing it closes the disk."""

    @property
    def size(self) -> int:
        """What fsspec counts from the end with."""
        return self._disk.size

    def close(self) -> None:
        """Leave the image clean."""
        if not self.closed:
            try:
                super().close()
            finally:
                self._disk.close()


class DiskFileSystem(AbstractFileSystem):  # type: ignore[misc] # fsspec has no types
    """Images of this host, each of which is one file: its disk. Options are those of `qcow2.open`: `format`, `key`."""

    protocol = "qcow2"
    cachable = False  # what an image holds may change

    def __init__(self, format: str = "qcow2", snapshot: str | None = None, key: Any = None, **options: Any) -> None:
        super().__init__(**options)
        self._how = {"format": format, "snapshot": snapshot, "key": key}

    def _open(self, path: str, mode: str = "rb", **_: Any) -> _OwnedFile:
        """The disk in the image at *path*, for reading ("rb") or in place ("r+b")."""
        return _OwnedFile(open_disk(self._strip_protocol(path), mode, **self._how))

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """What fsspec wants to know of a file: the size is the disk's."""
        path = self._strip_protocol(path)
        if os.path.isdir(path):
            return {"name": path, "size": 0, "type": "directory"}
        with open_disk(path, **self._how) as disk:
            return {"name": path, "size": disk.size, "type": "file"}

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """The images of a directory as their host names them, or the one at *path*."""
        path = self._strip_protocol(path)
        if not os.path.isdir(path):
            return [self.info(path) if detail else path]
        names = [os.path.join(path, name) for name in sorted(os.listdir(path))]
        if not detail:
            return names
        kinds = {True: "directory", False: "file"}
        return [{"name": name, "size": None, "type": kinds[os.path.isdir(name)]} for name in names]

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        """The path, or the paths if there are many, without the protocol."""
        if isinstance(path, list):
            return [cls._strip_protocol(each) for each in path]
        path = os.path.expanduser(str(path))
        return path.removeprefix("qcow2://")
