"""The synchronous face: an image as ordinary Python uses it."""

import errno
import logging
import os
import time
import warnings
from collections.abc import Callable, Coroutine, Iterable, Iterator
from functools import partial
from operator import index
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from qcow2.driver.buffer import MemoryBuffer, fillable
from qcow2.driver.file import BlockingDriver, HostFile
from qcow2.driver.memory import DEFAULT_DIRECTORY
from qcow2.driver.pool import PoolDriver
from qcow2.engine.image import Image
from qcow2.engine.opened import DEFAULT_CACHE_SIZE, OpenOptions
from qcow2.engine.packing import PART_BYTES
from qcow2.engine.plain import Preallocation
from qcow2.error import BelowUnclean, UnsupportedImage
from qcow2.format.geometry import require_inside, whole_sectors
from qcow2.format.snapshot import Snapshot
from qcow2.job.pace import Pace
from qcow2.library.awaitable import AwaitableDisk
from qcow2.library.bitmaps import Bitmaps
from qcow2.library.facts import Facts, facts_of_file
from qcow2.library.file import DiskFile
from qcow2.library.glance import Glance
from qcow2.library.hostfile import is_writable, path_of_descriptor
from qcow2.library.key import Key, keys_of
from qcow2.library.lengthen import lengthen
from qcow2.library.own_thread import OwnThread
from qcow2.library.snapshots import SnapshotList
from qcow2.node.chain import Chain
from qcow2.node.extent import Extent, extents_of
from qcow2.node.gate import Gate
from qcow2.node.node import Node

T = TypeVar("T")

log = logging.getLogger("qcow2")


class Disk(AwaitableDisk):
    """An open image with its chain of files; a context manager that closes it cleanly.

    Offsets and sizes are bytes of the virtual disk and need no alignment, except where a method says so.

    Threads may share it: calls are served one after the other, each as a whole. A call that is interrupted
    (KeyboardInterrupt, or what a signal handler raises) comes to its end before the exception is raised. The child of a
    fork cannot use it, and need not close it.
    """

    def __init__(self, image: Node, chain: Chain) -> None:
        self.image = image
        self.chain = chain
        self._driver = BlockingDriver()
        self._thread = OwnThread()
        self._glance = Glance(image, self.files, self._thread)
        self._path = self.files[0].path
        for problem in image.bitmap_problems:
            log.warning("%s: %s", self._path, problem)
        image.on_bitmaps_void = partial(_tell_of_void_bitmaps, self._path)  # no cycle: a dropped disk ends at once

    @classmethod
    def of(cls, chain: Chain, path: str, image_format: str, options: OpenOptions) -> "Disk":
        """The image at *path*, and what is under it, opened by *chain*, which is the disk's to close from now on.

        Raises: OSError, ImageError; *chain* is closed then.
        """
        try:
            return cls(chain.open(path, image_format, options), chain)
        except BaseException:
            chain.close()
            raise

    @property
    def size(self) -> int:
        """Length of the virtual disk in bytes."""
        return self.image.size

    @property
    def files(self) -> list[HostFile]:
        """The open host files, the image's own first, then what is under it."""
        return self.chain.files + self.chain.data_files

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return the *nbytes* at *offset*.

        Raises: ValueError if they are not inside the disk; OSError, CorruptImage.
        """
        if self._require_inside(offset, nbytes) < 2:
            small = bytearray(nbytes)
            self._fill(offset, memoryview(small))
            return bytes(small)
        content, memory = fillable(nbytes)
        self._fill(offset, memory)
        return content

    def readinto(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill *buffer*, anything writable, from *offset* on. Raises: as `read`."""
        view = memoryview(buffer).cast("B")
        self._require_inside(offset, len(view))
        self._fill(offset, view)

    def _fill(self, offset: int, view: memoryview) -> None:
        if not self._glance.fills(offset, view):
            self._run(lambda: self.image.read(offset, MemoryBuffer(view)))

    def file(self) -> DiskFile:
        """The disk as a raw binary file, at its start; `io.BufferedReader(disk.file())` reads ahead."""
        self._require_open()
        return DiskFile(self)

    def __len__(self) -> int:
        """Its size in bytes."""
        return self.size

    def __bool__(self) -> bool:
        """Also of a disk without bytes."""
        return True

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Put *data* at *offset*; it survives this process at once, a power loss after `flush`.

        Raises: ValueError if it does not fit the disk; OSError.
        """
        view = memoryview(data).cast("B")
        self._require_inside(offset, len(view))
        self._run(lambda: self.image.write(offset, MemoryBuffer(view)))

    def write_compressed(self, offset: int, data: bytes | bytearray | memoryview, *, level: int | None = None) -> None:
        """As `write`, compressed: *data* is whole clusters, the disk's last as long as it is; noise stays as it is.

        Many clusters are compressed side by side. *level* is 1 to 12 of zlib, 1 to 19 of zstd.
        Raises: ValueError if they are not, or not inside the disk; UnsupportedImage, OSError.
        """
        view = memoryview(data).cast("B")
        self._require_inside(offset, len(view))
        image = self._qcow2("compressed clusters")
        nthreads = os.cpu_count() or 1 if len(view) > PART_BYTES else 0
        self._run(lambda: image.write_compressed(offset, view, level), nthreads=nthreads)

    def write_zeroes(self, offset: int, nbytes: int, *, unmap: bool = True) -> None:
        """Make *nbytes* at *offset* read as zeros; *unmap* gives their space back."""
        self._require_inside(offset, nbytes)
        self._run(lambda: self.image.write_zeroes(offset, nbytes, unmap=unmap))

    def discard(self, offset: int, nbytes: int) -> None:
        """Give back the space of the whole clusters in the range, which then read as zeros."""
        self._require_inside(offset, nbytes)
        self._run(lambda: self.image.discard(offset, nbytes))

    def flush(self) -> None:
        """Make everything written so far survive a power loss."""
        self._run(lambda: self.image.flush())

    def resize(self, nbytes: int, *, shrink: bool = False, preallocation: Preallocation | str = "off") -> None:
        """Let the disk be *nbytes* long, rounded up to 512; what is new reads as zeros. It survives a power loss.

        A raw file is *nbytes* long. A disk gets shorter only with *shrink*: what is past its end is lost, also what an
        interrupted shrink has left past the same size. *preallocation* is for what is new; an interrupt ends it early.
        Raises: ValueError for a size that it cannot have; UnsupportedImage, CorruptImage, OSError: it is as long as
        before then, unless the host fails again or the disk was to get shorter.
        """
        self._require_open()
        whole_sectors(self._path, index(nbytes))
        kind = Preallocation(preallocation)
        if shrink and nbytes <= self.size:
            if nbytes < self.size and self.files[0].is_device and not isinstance(self.image, Image):
                raise UnsupportedImage(self.files[0].path, "Cannot resize device files")
            self._run(lambda: self.image.shrink(nbytes))
            return
        pace = Pace()
        self._call(lambda: lengthen(self.image, self.files, nbytes, kind, pace), pace.cancel)

    @property
    def snapshots(self) -> "SnapshotList":
        """The internal snapshots of the image, oldest first as far as its table is in order."""
        image = self._qcow2()
        return SnapshotList(self._run(image.snapshots))

    @property
    def info(self) -> Facts:
        """What the image is, as its file says now: the keys and values of `qcow2 info --output=json`."""
        header = next(iter(self.chain.headers), None)
        return self._call(partial(facts_of_file, self.files[0], self.chain.image_format, header))

    def create_snapshot(self, name: str) -> Snapshot:
        """Keep what the disk holds now as the internal snapshot *name*, which may be there twice.

        Raises: ValueError for a name that is empty or longer than 255 bytes; UnsupportedImage, CorruptImage, OSError.
        """
        image = self._qcow2()
        return self._run(lambda: image.create_snapshot(name, time.time_ns()))

    def apply_snapshot(self, wanted: str) -> None:
        """Let the disk hold what it held, and be as long as it was, at the snapshot of the id or else name *wanted*.

        What the disk holds now is lost, unless it is in another snapshot.
        Raises: FileNotFoundError, UnsupportedImage, CorruptImage, OSError.
        """
        image = self._qcow2()
        self._run(lambda: image.apply_snapshot(wanted))

    def delete_snapshot(self, name: str) -> None:
        """Forget the internal snapshot *name*. Raises: FileNotFoundError, CorruptImage, OSError."""
        image = self._qcow2()
        self._run(lambda: image.delete_snapshot(name))

    @property
    def bitmaps(self) -> Bitmaps:
        """The persistent dirty bitmaps of the image."""
        return Bitmaps(partial(self._qcow2, "bitmaps"), self._run)

    def _qcow2(self, what: str = "internal snapshots") -> Image:
        self._require_open()
        if not isinstance(self.image, Image):
            raise UnsupportedImage(self._path, f"a raw image has no {what}")
        return self.image

    def extents(self, offset: int = 0, nbytes: int | None = None) -> Iterator[Extent]:
        """Tell where the *nbytes* at *offset*, or all from there on, come from, in stretches as long as possible.

        They are looked for while the iteration goes on, and show what changes meanwhile or not.
        Raises: ValueError at the call if the range is not inside the disk; later CorruptImage, OSError.
        """
        end = offset + self._require_inside(offset, max(0, self.size - offset) if nbytes is None else nbytes)
        return extents_of(self.image, offset, end, self._run)

    def clean(self) -> None:
        """Leave the image clean, and no link log; its files stay open, and nothing but to close it is left to be asked.

        Raises: OSError if a write or sync failed, now or before; BelowUnclean if only of a base that was committed to.
        """
        if self.chain.end_below is not None:
            self._run(self.chain.end_below)
        below, self.chain.written_below = self.chain.written_below, None
        failure: OSError | None = None
        try:
            if below is not None:
                self._run(below.close)
        except OSError as error:  # the image does not need what was written there, and has not failed
            failure = error
        self._run(self.image.close)
        self._remove_log()
        if below is not None and failure is not None:
            raise BelowUnclean(failure.errno, failure.strerror, below.file.path) from failure

    def close(self) -> None:
        """Leave the image clean and close its files; a second time does nothing.

        Raises: OSError if a write or sync failed, now or before; the files are closed all the same.
        """
        if not self._thread.is_ours:  # the parent's to clean
            self.chain.close()
            return
        try:
            self._thread.call(self._close)
        finally:
            self._thread.stop()

    def _close(self) -> None:
        if not self.files[0].is_open:
            return
        try:
            self._driver.run(self.image.close())
            self._remove_log()
        finally:
            self.chain.unlock()
            self.chain.close()

    def _remove_log(self) -> None:
        if self.chain.memory is not None and self.chain.memory.is_made:
            self.chain.memory.remove()

    def _run(self, begin: Callable[[], Coroutine[Any, Any, T]], *, nthreads: int = 0) -> T:
        """Run the coroutine that *begin* makes to its end, in this disk's turn; *nthreads* help where it takes long."""

        def run() -> T:
            if not nthreads:
                return self._driver.run(begin())
            with PoolDriver(nthreads) as driver:
                return driver.run(begin())

        return self._call(run)

    def _call(self, function: Callable[[], T], interrupted: Callable[[], None] = lambda: None) -> T:
        """Call *function* in this disk's turn; *interrupted* each time the caller is."""

        def call() -> T:
            self._require_open()  # it may have been closed while this call waited for its turn
            return function()

        if not self._thread.is_ours:
            raise OSError(errno.EBADF, "the disk was opened by the parent process", self._path)
        return self._thread.call(call, interrupted)

    def _require_open(self) -> None:
        if not self.files[0].is_open:
            self._refuse_closed()

    def _require_inside(self, offset: int, nbytes: int) -> int:
        self._require_open()
        require_inside(self.size, index(offset), index(nbytes))
        return nbytes

    def __repr__(self) -> str:
        state = "closed" if not self.files[0].is_open else "read-only" if self.image.read_only else "writable"
        return f"<qcow2.Disk {self._path!r}, {self.size} bytes, {state}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self!r} can be neither copied nor pickled: open the image there")

    def __del__(self, warn: Callable[..., None] = warnings.warn) -> None:
        """A dropped disk is as one whose process died: its files are closed, and the next open recovers it."""
        if (thread := getattr(self, "_thread", None)) is None:
            return
        if self.files[0].is_open and thread.is_ours:
            warn(f"unclosed {self!r}", ResourceWarning, source=self)
        self.abandon()

    def abandon(self) -> None:
        """Close the files as they are, clean or not. Raises: OSError if one cannot be; the others are closed."""
        self._thread.stop()
        self.chain.close()

    def __enter__(self) -> "Disk":
        self._require_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _tell_of_void_bitmaps(path: str) -> None:
    """A line of the logger, no warning: where warnings are errors this would be one in the middle of a write."""
    log.warning("%s: persistent bitmaps are not maintained: they are void from now on", path)


def open_disk(
    path: str | bytes | os.PathLike[str] | os.PathLike[bytes] | int,
    mode: str = "r",
    *,
    writable: bool | None = None,
    format: str = "qcow2",
    snapshot: str | None = None,
    key: Key = None,
    lazy_refcounts: bool | None = None,
    cache_size: int = DEFAULT_CACHE_SIZE,
    log_directory: str = DEFAULT_DIRECTORY,
    discard_log: bool = False,
    data_file: str | None = None,
    luks_header: str | None = None,
    allow_files: Iterable[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_wait: Callable[[], None] = lambda: None,
) -> Disk:
    """Open the image at *path*, or what a file descriptor is of, and the backing files it names.

    *path* may be the URI of an NBD export, which is a raw disk, where libnbd's Python binding is installed.

    *mode* is "r" or "r+", with or without a "b"; *writable* says the same. A descriptor stays its owner's.

    *format* is "qcow2", "raw" or one that was registered (`qcow2.node.formats`), and never guessed.
    *snapshot*, an id or else a name, is an internal snapshot to read in place of the disk.
    *lazy_refcounts* overrides what the image says about writing refcounts only at close.
    *key* opens what is encrypted, of the whole chain: bytes as they are, with no newline taken off; several of them, to
    be tried one after the other; or what gives them for the path of an image, called for those that are encrypted.
    *data_file* is the external data file of the image, whatever it names itself; *luks_header* the file of the LUKS
    header of a raw disk ("luks"), if that is not in front of it.
    *allow_files* are directories: what an image names has to lie beneath one; None lets images name what they like.
    *cache_size* bounds the bytes of mapping tables in memory, of each file of the chain.
    What is written over a backing file is kept in *log_directory*, which outlives the process, until `flush`; a log
    that a killed process left and that is not found there is an error, unless *discard_log* says that it may be lost.
    *on_wait()* is called again and again while the transfers of a process that died keep the image locked.
    An image that was not closed cleanly is repaired before it is written; *progress(done, total)* sees that.
    The logger "qcow2" gets a warning when writes of a dead process are lost, and when the first change makes the
    persistent bitmaps of the image void.

    Raises: OSError; UnsupportedImage, CorruptImage and WrongKey, each an ImageError; one line that names the file.
    """
    name = path_of_descriptor(path) if isinstance(path, int) else os.fsdecode(path)
    options = OpenOptions(is_writable(mode, writable), lazy_refcounts, cache_size, snapshot, keys_of(key))
    chain = Chain(
        data_file=data_file,
        luks_header=luks_header,
        progress=progress,
        log_directory=log_directory,
        discard_log=discard_log,
        gate=Gate.beneath(allow_files),
        on_wait=on_wait,
        reaches_exports=True,
    )
    return Disk.of(chain, name, format, options)
