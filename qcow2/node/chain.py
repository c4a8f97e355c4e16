"""Opening a chain: the image, the backing file it names, and so on to the base, each locked."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import TracebackType

from qcow2.driver.file import HostFile, run
from qcow2.driver.lock import lock_image, show_life
from qcow2.driver.memory import DEFAULT_DIRECTORY, SharedMemory
from qcow2.engine.image import Image, OpenOptions
from qcow2.engine.logplace import new_log
from qcow2.engine.raw import RawImage
from qcow2.engine.recovery import recover, warn_of_waiting
from qcow2.error import CorruptImage, ImageError, UnsupportedImage
from qcow2.format.geometry import Geometry
from qcow2.format.header import Header, read_header, require_uncorrupted
from qcow2.format.layout import HEADER_INCOMPATIBLE_OFFSET
from qcow2.judge.census import Progress
from qcow2.judge.repair import repair
from qcow2.node.formats import FORMATS

MAX_DEPTH = 100


@dataclass(frozen=True, slots=True)
class Outline:
    """What can be told of an image without opening it."""

    size: int  # of the disk, in bytes
    cluster_size: int  # 0 for a raw image


def outline(path: str, image_format: str) -> Outline:
    """Look at an image that another process may be writing: one read of its header, no lock.

    Raises: OSError, UnsupportedImage, CorruptImage.
    """
    with HostFile.open(path) as file:
        if image_format == "raw":
            return Outline(run(RawImage.open(file)).size, 0)
        geometry = Geometry.of(run(read_header(file, trust_refcounts=False)).record)
        return Outline(geometry.size, geometry.cluster_size)


def chain_paths(path: str, image_format: str) -> list[str]:
    """The image and what is under it, top first, as their headers say now; no locks are taken.

    Raises: OSError, UnsupportedImage, CorruptImage.
    """
    paths = [path]
    while image_format == "qcow2" and len(paths) <= MAX_DEPTH:
        with HostFile.open(path) as file:
            header = run(read_header(file, trust_refcounts=False))
        if header.backing_name is None or header.backing_format is None:
            break
        path, image_format = backing_path(path, header.backing_name), header.backing_format
        paths.append(path)
    return paths


@dataclass
class Chain:
    """The files of an image and of everything under it; closes them as a context manager."""

    files: list[HostFile] = field(default_factory=list)  # top first
    progress: Progress | None = None  # told how far the repair of a dirty image is
    force_share: bool = False  # read without locks, though others may be writing
    log_directory: str = DEFAULT_DIRECTORY  # of the link log of an image that is written
    discard_log: bool = False  # go on without one that is missing or does not count
    memory: SharedMemory | None = None  # which that log is in
    writable_depth: int = 0  # of the one besides the top that is writable, if that is; 0: none
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
            for file in reversed(self.files):
                stack.callback(file.close)

    def open(self, path: str, image_format: str, options: OpenOptions) -> Image | RawImage:
        """Open the image at *path* and what is under it.

        Raises: OSError, UnsupportedImage, CorruptImage; for a backing file the text shows the way to it.
        """
        if image_format not in FORMATS:
            raise UnsupportedImage(path, f"format {image_format!r} is not supported, only {' and '.join(FORMATS)}")
        file = self._open_file(path, writable=options.writable)
        if image_format == "raw":
            return run(RawImage.open(file, writable=options.writable))
        if options.writable:
            recover(file, self.log_directory, discard=self.discard_log)
        header = run(read_header(file, trust_refcounts=False))
        backing = self._open_backing(file, header, options)
        if options.writable and header.is_dirty:
            self._repair(file, header)
        log = None
        if options.writable and file is self.files[0]:
            log, self.memory = new_log(file, self.log_directory)
        elif not options.writable and not self.force_share:
            warn_of_waiting(file, header.log_mark)
        return run(Image.open(file, backing=backing, options=options, log=log))

    def _repair(self, file: HostFile, header: Header) -> None:
        """Make the refcounts of an image that was not closed cleanly right."""
        require_uncorrupted(file, header)
        report = run(repair(file, progress=self.progress))
        wrong = report.check_errors + report.corruptions
        if wrong:
            message = f"not closed cleanly, and {wrong} errors cannot be repaired; see qcow2 check"
            raise CorruptImage(file.path, HEADER_INCOMPATIBLE_OFFSET, message)

    def _open_file(self, path: str, *, writable: bool) -> HostFile:
        way = " -> ".join(self._way_to(path))
        try:
            file = HostFile.open(path, writable=writable)
            self.files.append(file)
            if not self.force_share:
                lock_image(file.fd, path, writable=writable, on_wait=self.on_wait)
                file.life_fd = show_life(path, file.fd)
        except OSError as error:
            error.filename = way
            raise
        return file

    def _open_backing(self, file: HostFile, header: Header, options: OpenOptions) -> Image | RawImage | None:
        if header.backing_name is None:
            return None
        if header.backing_format is None:
            message = f"the format of backing file {header.backing_name!r} is not recorded, and never guessed"
            raise UnsupportedImage(file.path, message)
        path = backing_path(file.path, header.backing_name)
        self._refuse_cycle(file, path)
        is_writable = 0 < self.writable_depth == len(self.files)
        below = replace(options, writable=is_writable, lazy_refcounts=None, snapshot=None)
        return self.open(path, header.backing_format, below)

    def _way_to(self, path: str) -> list[str]:
        names = [file.path for file in self.files]
        return names if path in names else [*names, path]

    def _refuse_cycle(self, file: HostFile, path: str) -> None:
        way = " -> ".join(self._way_to(path))
        if len(self.files) >= MAX_DEPTH:
            raise UnsupportedImage(file.path, f"more than {MAX_DEPTH} files in the backing chain")
        if os.path.exists(path) and any(os.path.samestat(os.stat(path), os.fstat(f.fd)) for f in self.files):
            raise ImageError(file.path, f"the backing chain is a cycle: {way} -> {path}")


def backing_path(path: str, name: str) -> str:
    """Where the backing file *name* of the image at *path* is; relative names start at the image's directory.

    As with QEMU, one that begins with "file:" is a file's name as it is: it starts where this process does.

    Raises: UnsupportedImage for what is not the name of a file.
    """
    if name.startswith("json:"):
        raise UnsupportedImage(path, f"backing file {name!r}: json: names are not supported")
    local = name.removeprefix("file:")
    if local == name and ":" in name.split("/", 1)[0]:
        raise UnsupportedImage(path, f"backing file {name!r}: protocol {name.split(':', 1)[0]!r} is not supported")
    return local if local != name else os.path.join(os.path.dirname(path), name)
