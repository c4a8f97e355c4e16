"""A directory tree in memory, written out as a cpio archive or as a directory."""

import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

CPIO_NEWC_MAGIC = "070701"


@dataclass
class Tree:
    """Files, symbolic links and directories by their path without a leading slash; parents are implied."""

    files: dict[str, tuple[Path | bytes, int]] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    directories: set[str] = field(default_factory=set)

    def add_file(self, path: str, source: Path | bytes, mode: int = 0o755) -> None:
        self._add_parents(path)
        self.files[path] = (source, mode)

    def add_link(self, path: str, target: str) -> None:
        self._add_parents(path)
        self.links[path] = target

    def add_directory(self, path: str) -> None:
        self._add_parents(path)
        self.directories.add(path)

    def _add_parents(self, path: str) -> None:
        self.directories.update(str(parent) for parent in PurePosixPath(path).parents if str(parent) != ".")


def write_directory(tree: Tree, top: Path) -> None:
    """Create *tree* below the existing, empty directory *top*."""
    for name in sorted(tree.directories):
        (top / name).mkdir()
    for name, target in tree.links.items():
        (top / name).symlink_to(target)
    for name, (source, mode) in tree.files.items():
        if isinstance(source, bytes):
            (top / name).write_bytes(source)
        else:
            shutil.copyfile(source, top / name)
        (top / name).chmod(mode)


def write_cpio(tree: Tree, out: BinaryIO) -> None:
    """Write *tree* as the "newc" archive the kernel unpacks; every file belongs to root."""
    for inode, (name, mode, source) in enumerate(_members(tree), start=1):
        if isinstance(source, bytes):
            _write_header(out, inode, name, mode, len(source))
            out.write(source)
            nbytes = len(source)
        else:
            with source.open("rb") as file:
                nbytes = os.fstat(file.fileno()).st_size
                _write_header(out, inode, name, mode, nbytes)
                shutil.copyfileobj(file, out)
        _pad(out, nbytes)
    _write_header(out, 0, "TRAILER!!!", 0, 0)


def _members(tree: Tree) -> Iterator[tuple[str, int, Path | bytes]]:
    for name in sorted(tree.directories):
        yield name, stat.S_IFDIR | 0o755, b""
    for name, target in tree.links.items():
        yield name, stat.S_IFLNK | 0o777, target.encode()
    for name, (source, mode) in tree.files.items():
        yield name, stat.S_IFREG | mode, source


def _write_header(out: BinaryIO, inode: int, name: str, mode: int, nbytes: int) -> None:
    encoded = name.encode() + b"\0"
    nlink = 2 if stat.S_ISDIR(mode) else 1
    # inode, mode, uid, gid, nlink, mtime, size, device (2), special device (2), name length, checksum
    numbers = (inode, mode, 0, 0, nlink, 0, nbytes, 0, 0, 0, 0, len(encoded), 0)
    header = (CPIO_NEWC_MAGIC + "".join(f"{number:08X}" for number in numbers)).encode()
    out.write(header + encoded)
    _pad(out, len(header) + len(encoded))


def _pad(out: BinaryIO, nbytes: int) -> None:
    out.write(bytes(-nbytes % 4))
