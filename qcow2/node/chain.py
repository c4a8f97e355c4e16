"""Opening a chain: the image, the backing file it names, and so on to the base, each locked."""

import os
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from qcow2.driver.file import HostFile, run
from qcow2.driver.memory import DEFAULT_DIRECTORY, SharedMemory
from qcow2.driver.uri import is_nbd
from qcow2.engine.opened import OpenOptions
from qcow2.error import ImageError, UnsupportedImage
from qcow2.lock import lock_image, show_life, unlock
from qcow2.node.formats import Format, Outline, format_of
from qcow2.node.gate import ANY, BACKING, DATA, MAX_DEPTH, Gate, require_room
from qcow2.node.node import Node

if TYPE_CHECKING:
    from qcow2.judge.census import Progress


def outline(path: str, image_format: str, luks_header: str | None = None) -> Outline:
    """Look at an image that another process may be writing: one read of its header, no lock.

    *luks_header* is the file of its LUKS header, if that is another one.
    Raises: OSError, UnsupportedImage, CorruptImage.
    """
    known = format_of(path, image_format)
    with HostFile.open(path) as file:
        if luks_header is None:
            return known.outline(file)
        from qcow2.node.luks import read_luks  # and with it the engine

        with HostFile.open(luks_header) as header:
            return Outline(run(read_luks(file, header))[1], 0)


def chain_paths(path: str, image_format: str, gate: Gate = ANY) -> list[str]:
    """The image and what is under it, top first, as their headers say now; no locks are taken.

    Raises: OSError, UnsupportedImage, CorruptImage.
    """
    return [path for path, _ in chain_places(path, image_format, gate)]


def chain_places(
    path: str, image_format: str, gate: Gate = ANY, data_file: str | None = None
) -> list[tuple[str, str | None]]:
    """The same, each with the file its data is in if that is another one; *data_file* is the top's, if it is said."""
    places: list[tuple[str, str | None]] = []
    file = HostFile.open(path)
    while True:
        known = format_of(path, image_format)
        with file:
            below, data = known.below(file), known.data(file)
        if data is not None:
            data = data_file if data_file is not None and not places else gate.way(path, DATA, data)
        places.append((path, data))
        if below is None or below.image_format is None or len(places) > MAX_DEPTH:
            return places
        file = gate.open(path, BACKING, below.name, writable=False)
        path, image_format = file.path, below.image_format


@dataclass
class Chain:
    """The files of an image and of everything under it; closes them as a context manager."""

    data_file: str | None = None  # what the top's data is in, whatever it says; None: as it says
    data_files: list[HostFile] = field(default_factory=list)  # that images have besides
    luks_header: str | None = None  # where the top's, a raw disk's, is; None: in front of it
    headers: list[HostFile] = field(default_factory=list)  # such files
    files: list[HostFile] = field(default_factory=list)  # top first
    nodes: list[Node] = field(default_factory=list)  # the same disks, top first
    image_format: str = "qcow2"  # of the top
    progress: "Progress | None" = None  # told how far the repair of a dirty image is
    force_share: bool = False  # read without locks, though others may be writing
    needs_all: bool = False  # refuse what is read while writes wait in its link log, which would be missing
    log_directory: str = DEFAULT_DIRECTORY  # of the link log of an image that is written
    discard_log: bool = False  # go on without one that is missing or does not count
    memory: SharedMemory | None = None  # which that log is in
    written_below: Node | None = None  # one under the top that is written, and not closed yet
    end_below: Callable[[], Coroutine[Any, Any, None]] | None = None  # first, if a snapshot has left links of it
    writable_depth: int = 0  # of the one besides the top that is writable, if that is; 0: none
    gate: Gate = ANY  # for what the images name
    reaches_exports: bool = False  # the path of the top may be an NBD URI
    on_wait: Callable[[], None] = lambda: None  # called while a dead process's transfers keep the image locked

    def __enter__(self) -> "Chain":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files, and with them give the locks back; a link log stays for the next process."""
        with ExitStack() as stack:  # one that cannot be closed keeps none of the others open
            if self.memory is not None:
                stack.callback(self.memory.close)
            for file in reversed([*self.files, *self.data_files, *self.headers]):
                stack.callback(file.close)

    def unlock(self) -> None:
        """Give the locks back before the files are closed, which copies of their descriptors survive; nothing is done
        to them any more.
        """
        for file in [*self.files, *self.data_files, *self.headers]:
            for fd in (file.fd, file.life_fd):
                if fd >= 0:
                    unlock(fd)

    def open(self, path: str, image_format: str, options: OpenOptions) -> Node:
        """Open the image at *path* and what is under it.

        Raises: OSError, UnsupportedImage, CorruptImage; for a backing file the text shows the way to it.
        """
        known = format_of(path, image_format)
        self.image_format = image_format
        if self.reaches_exports and is_nbd(path):
            return self._open_export(path, known, options)
        file = self._hold(path, lambda: HostFile.open(path, writable=options.writable), writable=options.writable)
        return self._know(known.open(self, file, options))

    def _open_export(self, uri: str, known: Format, options: OpenOptions) -> Node:
        from qcow2.driver.nbdexport import NbdExport  # and with it sockets

        if known.has_metadata or known.has_key_slots:
            raise UnsupportedImage(uri, f"an export is a raw disk here, not {known.name}")
        export = NbdExport(uri, writable=options.writable).connect()
        self.files.append(export)
        return self._know(known.open(self, export, options))

    def open_below(self, file: HostFile, name: str, image_format: str, options: OpenOptions) -> Node:
        """Open what the image in *file*, opened with *options*, names as its backing file. Raises: as `open`."""
        path = self.gate.way(file.path, BACKING, name)
        if len(self.files) >= MAX_DEPTH:
            raise UnsupportedImage(file.path, f"more than {MAX_DEPTH} files in the backing chain")
        self._refuse_cycle(file, path)
        known = format_of(path, image_format)
        is_writable = 0 < self.writable_depth == len(self.files)
        below = replace(options, writable=is_writable, lazy_refcounts=None, snapshot=None)
        opened = self._hold(
            path, lambda: self.gate.open(file.path, BACKING, name, writable=is_writable), writable=is_writable
        )
        return self._know(known.open(self, opened, below))

    def open_data_file(self, file: HostFile, name: str | None, options: OpenOptions) -> HostFile:
        """Open what the image in *file*, opened with *options*, calls its data file. Raises: as `open`."""
        is_writable = options.writable
        if file is self.files[0] and self.data_file is not None:
            path = self.data_file
            begin = partial(HostFile.open, path, writable=is_writable)
        elif name:
            path = self.gate.way(file.path, DATA, name)
            self._refuse_cycle(file, path)
            begin = partial(self.gate.open, file.path, DATA, name, writable=is_writable)
        else:
            raise UnsupportedImage(file.path, "it does not say which its external data file is")
        return self._hold(path, begin, writable=is_writable, among=self.data_files)

    def open_luks_header(self, file: HostFile) -> HostFile | None:
        """Open the LUKS header of the raw disk in *file*, if it is in a file of its own. Raises: as `open`."""
        path = self.luks_header
        if path is None or file is not self.files[0]:
            return None
        return self._hold(path, lambda: HostFile.open(path), writable=False, among=self.headers)

    def require_room(self) -> None:
        """Whether the next open takes one file more, an overlay. Raises: UnsupportedImage."""
        require_room(self.files[0].path, len(self.files))

    def drop_between(self, base: Node | None) -> list[HostFile]:
        """Forget what is between the top, which does not show it any more, and *base*; its files, open."""
        depth = len(self.nodes) if base is None else next(i for i, node in enumerate(self.nodes) if node is base)
        gone = self.nodes[1:depth]
        own, others = self.files[1:depth], [file for file in self.data_files if any(file is n.data_file for n in gone)]
        del self.nodes[1:depth], self.files[1:depth]
        self.data_files = [file for file in self.data_files if file not in others]
        return [*own, *others]

    def _know(self, node: Node) -> Node:
        """What is under it is known already."""
        self.nodes.insert(0, node)
        return node

    def _hold(
        self, path: str, begin: Callable[[], HostFile], *, writable: bool, among: list[HostFile] | None = None
    ) -> HostFile:
        """The file at *path*, which *begin* opens, locked; ours to close with those it is *among*."""
        way = " -> ".join(self._way_to(path))
        try:
            file = begin()
            (self.files if among is None else among).append(file)
            if not self.force_share:
                lock_image(file.fd, path, writable=writable, on_wait=self.on_wait)
                file.life_fd = show_life(path, file.fd)
        except OSError as error:
            error.filename = way
            raise
        return file

    def _way_to(self, path: str) -> list[str]:
        names = [file.path for file in self.files]
        return names if path in names else [*names, path]

    def _refuse_cycle(self, file: HostFile, path: str) -> None:
        way = " -> ".join(self._way_to(path))
        if os.path.exists(path) and any(
            os.path.samestat(os.stat(path), os.fstat(f.fd)) for f in [*self.files, *self.data_files]
        ):
            raise ImageError(file.path, f"the backing chain is a cycle: {way} -> {path}")
