"""The image that a daemon serves: held, that is open and locked, or let go for another process to hold."""

import errno
import gc
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace

from qcow2 import Disk, ImageError
from qcow2.driver.far import FarFile
from qcow2.driver.file import HostFile
from qcow2.driver.memory import SharedMemory
from qcow2.engine.encryption import Keyring, encrypted_alike
from qcow2.engine.image import Image
from qcow2.engine.linkpolicy import LinkPolicy
from qcow2.engine.opened import OpenOptions
from qcow2.engine.statistics import Statistics
from qcow2.error import BelowUnclean, UnsupportedImage
from qcow2.format.luks import Encryption
from qcow2.job.pace import while_going
from qcow2.node.chain import Chain, outline
from qcow2.node.formats import Outline
from qcow2.node.gate import BACKING, Gate
from qcow2.node.leftover import remove_leftovers
from qcow2.node.node import Node, encrypted_among
from qcow2.node.overlay import Overlay
from qcow2.node.reopened import Reopened
from ring.native import Pointer
from vhost.direct import PAGE
from vhost.heldfiles import HeldFiles
from vhost.leftcopies import LeftCopies
from vhost.option import Options
from vhost.overlaywish import overlay_options
from vhost.problem import describe, tell_of_lost_name
from virtio.block import Unavailable
from virtio.config import Properties

Progress = Callable[[int, int], None]

log = logging.getLogger("vhost")


class HeldImage:
    """The image *options* name, a `Lease` and a context manager that ends the holding cleanly.

    Nothing is cached over a time in which it was let go: another process may have changed the image.
    """

    def __init__(
        self,
        options: Options,
        progress: Callable[[str], Progress | None] = lambda path: None,
        on_wait: Callable[[], None] = lambda: None,
        keys: Keyring | None = None,
    ) -> None:
        """*progress(path)* makes what a repair of the dirty image there is told to; it and *on_wait()* may raise."""
        self.disk: Disk | None = None
        self.beside: Disk | None = None  # one that is written beside it, and not served
        self.is_beside_kept = False  # open, where the image is let go, for who has opened it
        self.options = options
        self._progress = progress
        self._on_wait = on_wait
        self._opening = OpenOptions(not options.read_only, options.lazy_refcounts, options.cache_size, keys=keys)
        self._outline = Outline(0, 0)  # while it is not held
        self._past = Statistics()  # of earlier holdings
        self._files = HeldFiles(are_direct=options.cache.direct, on_wait=on_wait)
        self.left_copies = LeftCopies()

    def __enter__(self) -> "HeldImage":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.end()

    @property
    def direct_fds(self) -> dict[HostFile, int]:
        """Second descriptors of files, which bypass the page cache."""
        return self._files.direct_fds

    @property
    def traits(self) -> dict[HostFile, Pointer]:
        """What a worker has to know of each file."""
        return self._files.traits

    @property
    def is_held(self) -> bool:
        return self.disk is not None

    def encrypted_in(self, *, only_top: bool = False) -> Node | None:
        """The first that is encrypted of what a copy takes: of the image, if it is *only_top*, else of its chain."""
        nodes = [] if self.disk is None else self.disk.chain.nodes
        return encrypted_among(nodes[:1] if only_top else nodes)

    @property
    def properties(self) -> Properties:
        """What a driver learns about the disk; as it was when last looked at, if the image is not held."""
        disk = self.disk  # which another thread may let go
        known = self._outline if disk is None else _outline_of(disk)
        return Properties(
            size=known.size,
            physical_block_size=PAGE,
            optimal_io_size=known.cluster_size if known.cluster_size >= PAGE else 0,
            read_only=self.options.read_only,
            serial=self.options.serial,
        )

    @property
    def statistics(self) -> Statistics:
        """Of all holdings together."""
        return self._past if self.disk is None else self._past + self.disk.image.statistics

    def take(self) -> None:
        """Open and lock the image; nothing happens if it is held.

        Raises: Unavailable, naming the file.
        """
        if self.disk is not None:
            return
        options = self.options
        try:
            self.disk = self._open(options.blk_file, options.format, options.data_file)
        except (OSError, ImageError) as error:
            raise Unavailable(describe(error)) from error
        if not options.read_only:
            remove_leftovers(options.blk_file, options.link_log)
            self.left_copies.tell(options.blk_file)

    def _open(self, path: str, image_format: str, data_file: str | None = None, *, writable: bool = True) -> Disk:
        opening = self._opening if writable else replace(self._opening, writable=False, lazy_refcounts=None)
        disk = Disk.of(self._chain(path, data_file), path, image_format, opening)
        try:
            self._files.add_disk(disk)
        except OSError:
            self._close(disk, disk.close)
            raise
        return disk

    def _chain(self, path: str, data_file: str | None = None) -> Chain:
        options = self.options
        return Chain(
            data_file=data_file,
            luks_header=options.luks_header,
            progress=self._progress(path),
            log_directory=options.link_log,
            discard_log=options.discard_link_log,
            gate=gate_of(options),
            on_wait=self._on_wait,
        )

    def repaired(self, path: str, image_format: str, require_going: Callable[[], None]) -> Disk:
        """For any thread: another image, clean, unless *require_going()* raises. Raises: OSError, ImageError."""
        chain = self._chain(path)
        chain.progress = while_going(require_going, chain.progress)
        return Disk.of(chain, path, image_format, replace(self._opening, keys=self.other_keys()))

    def _close(self, disk: Disk, close: Callable[[], None]) -> None:
        """Forget the files of *disk*, which *close* closes. Raises: OSError, the last of those that closing raised."""
        with ExitStack() as closing:
            closing.callback(close)  # last: with it go the locks
            for close_direct in self._files.forget(disk.files):
                closing.callback(close_direct)

    def admit(self, memory: set[tuple[int, int]], new: set[tuple[int, int]]) -> None:
        """Return once no daemon that died reads into what is *new* of the guest's *memory*, files by device and inode.

        Raises: Unavailable.
        """
        try:
            self._files.admit(memory, new, [disk for disk in (self.disk, self.beside) if disk is not None])
        except OSError as error:
            raise Unavailable(describe(error)) from error

    def prepare_overlay(self, name: str, given: Mapping[str, str]) -> Overlay:
        """An overlay over the image, which shall be called *name*: as yet it changes nothing of what is served.

        It has the options *given*, as of `overlay_options`.

        Raises: OSError, UnsupportedImage, ValueError.
        """
        disk = self.disk
        assert disk is not None
        if not isinstance(disk.image, Image):
            raise UnsupportedImage(disk.files[0].path, "a raw image: who opens its path by that format must find one")
        if disk.image.read_only:
            raise OSError(errno.EROFS, "opened read-only", disk.files[0].path)
        overlay = Overlay(disk.chain, disk.image, name, overlay_options(disk.image, given), self._opening)
        try:
            is_direct = self._files.are_direct and overlay.image.geometry.cluster_size >= PAGE
            self._files.add_written(overlay.file, is_direct=is_direct)
            self._files.admit_all(overlay.file, [overlay.file, *disk.files])
        except BaseException:
            self.discard_overlay(overlay)
            raise
        return overlay

    def encrypted_as_copied(self, *, only_top: bool = False) -> AbstractContextManager[Encryption | None]:
        """How a new image is encrypted that is a copy: as what `encrypted_in` finds. Raises: as `encrypted_alike`."""
        node = self.encrypted_in(only_top=only_top)
        if node is None:
            return nullcontext()
        return encrypted_alike(self._opening.keys, node.file.path, node.cipher)

    def other_keys(self) -> Keyring | None:
        """The same, for images that another thread opens."""
        return None if self._opening.keys is None else self._opening.keys.again()

    def discard_overlay(self, overlay: Overlay) -> None:
        """Serve what was served. Raises: OSError."""
        with ExitStack() as closing:
            closing.callback(overlay.discard)
            for close_direct in self._files.forget([overlay.file]):
                closing.callback(close_direct)

    def share_below(self, overlay: Overlay) -> None:
        """Let others read what is below *overlay*, which is closed: other overlays may be over it. Raises: OSError."""
        self._files.share(overlay.files_below)

    def adopt_overlay(self, overlay: Overlay) -> SharedMemory | None:
        """Hold *overlay*, which has taken its name; the worker has nothing of the image. -> as `Overlay.adopt`."""
        assert self.disk is not None
        self._past += overlay.below.statistics
        past = overlay.adopt()
        self.disk.image = overlay.image
        return past

    @property
    def written_below(self) -> Node | None:
        """The disk under the image that is written as well, if one is."""
        return None if self.disk is None else self.disk.chain.written_below

    def prepare_writer(self, node: Node, nbytes: int) -> Reopened:
        """*node*, a disk under the image, opened for writing, and made *nbytes* long if it is shorter.

        As yet it changes nothing of what is served. Raises: OSError, UnsupportedImage, CorruptImage, ValueError.
        """
        assert self.disk is not None
        chain = self.disk.chain
        old = next(file for file, each in zip(chain.files, chain.nodes, strict=True) if each is node)
        options = replace(self._opening, writable=True, lazy_refcounts=False)
        opened = Reopened(chain, node, self._files.descriptors(old), nbytes, options)
        try:
            is_direct = old in self.direct_fds and (opened.node.capabilities.cluster_size or PAGE) >= PAGE
            self._files.add_written(opened.file, is_direct=is_direct)
            self._files.admit_all(opened.file, [opened.file])
        except BaseException:
            self.discard_writer(opened)
            raise
        return opened

    def discard_writer(self, opened: Reopened) -> None:
        """Serve what was served. Raises: OSError."""
        for close in self._files.forget([opened.file]):
            close()
        opened.discard()

    def adopt_writer(self, opened: Reopened) -> list[Callable[[], None]]:
        """Let *opened* be in the chain; the worker has nothing of the image. -> what closes the one that was there."""
        old = opened.adopt()
        return [*self._files.forget([old]), old.close]

    def share(self, node: Node) -> None:
        """Let others read *node*, a disk under the image that was written, and is closed. Raises: OSError."""
        assert self.disk is not None
        chain = self.disk.chain
        if chain.written_below is node:
            chain.written_below = None
        file = next(file for file, each in zip(chain.files, chain.nodes, strict=True) if each is node)
        self._files.share([file])

    @property
    def files(self) -> list[HostFile]:
        """All that a worker needs."""
        disks = [disk for disk in (self.disk, self.beside) if disk is not None]
        return [file for disk in disks for file in disk.files if not isinstance(file, FarFile)]

    def open_beside(self, path: str, image_format: str, *, writable: bool = True) -> Disk:
        """The image at *path*, opened as the one that is served would be, which it may become if it is *writable*.

        As yet it changes nothing of what is served. Raises: OSError, ImageError.
        """
        disk = self._open(path, image_format, writable=writable)
        try:
            self._files.admit_all(disk.files[0], disk.files)
        except OSError:
            self.close_beside(disk)
            raise
        return disk

    def close_beside(self, disk: Disk) -> None:
        """Close what `open_beside` has opened as it is, clean or not; no worker has it. Raises: OSError."""
        self._close(disk, disk.abandon)

    def serve_beside(self) -> Disk:
        """Hold the disk beside, where the path leads by now, for the one that is served -> that; no worker has it."""
        assert self.disk is not None
        assert self.beside is not None
        past = self.disk
        past.image.on_failure = lambda: None
        past.image.set_link_policy(LinkPolicy())
        self._past += past.image.statistics
        self.disk, self.beside = self.beside, None
        self.disk.files[0].path = self.options.blk_file
        return past

    def close_clean(self, disk: Disk) -> None:
        """Leave *disk*, which was served or beside that, clean, and close it; no worker has it. Raises: OSError."""
        try:
            disk.clean()
        finally:
            self._close(disk, disk.abandon)

    def require_nameable(self, name: str | None) -> None:
        """Whether the next one to open the image may open *name* as its backing file. Raises: UnsupportedImage."""
        assert self.disk is not None
        if name is not None:
            self.disk.chain.gate.way(self.disk.files[0].path, BACKING, name)

    def drop_between(self, base: Node | None) -> list[Callable[[], None]]:
        """Forget what the image, which is over *base* by now or over nothing, had above that. -> what closes it."""
        assert self.disk is not None
        files = self.disk.chain.drop_between(base)
        return [*self._files.forget(files), *(file.close for file in files)]

    def look(self) -> None:
        """Read the size of an image that is not held, without a lock: another process may be writing it.

        Raises: Unavailable, naming the file.
        """
        try:
            options = self.options
            self._outline = outline(options.blk_file, options.format, options.luks_header)
        except (OSError, ImageError) as error:
            raise Unavailable(describe(error)) from error

    def let_go(self) -> None:
        """Close the image cleanly, and with it give the lock back; nothing happens if it is not held.

        One that cannot be closed cleanly is kept, and locked: reads go on from it, and nobody else may take it for
        sound.
        """
        if self.disk is None:
            return
        self._drop_beside()
        tell_of_lost_name(self.disk.files[0], self.options.blk_file)
        try:
            self.disk.clean()
        except BelowUnclean as error:
            log.error("%s: is not closed cleanly: %s", error.filename, error.strerror)
        except OSError as error:
            log.error("%s: cannot be closed cleanly, and is kept: %s", self.options.blk_file, error.strerror)
            return
        self._forget(self.disk)
        gc.collect()  # those that were closed are in cycles, which do not weigh what C has for them; no ring runs

    def end(self) -> None:
        """Close the image for good.

        Raises: OSError if that is not clean.
        """
        if self.disk is None:
            return
        self._drop_beside()
        tell_of_lost_name(self.disk.files[0], self.options.blk_file)
        try:
            self.disk.clean()
        except OSError as error:
            error.filename = error.filename or self.options.blk_file
            raise
        finally:
            self._forget(self.disk)

    def _forget(self, disk: Disk) -> None:
        self._past += disk.image.statistics
        self._outline = _outline_of(disk)
        self.disk = None
        try:
            self._close(disk, disk.abandon)
        except OSError as error:  # what matters was synced
            log.warning("%s: closing it: %s", self.options.blk_file, error.strerror)

    def _drop_beside(self) -> None:
        """Whatever it is to become, it is not whole: the image goes on without it."""
        beside, self.beside = self.beside, None
        if beside is not None:
            try:
                self._close(beside, (lambda: None) if self.is_beside_kept else beside.abandon)
            except OSError as error:
                log.warning("%s: closing a disk beside it: %s", self.options.blk_file, error.strerror)


def gate_of(options: Options) -> Gate:
    """What the images may name. What is written to is not to lie anywhere, if nobody said where."""
    own = (os.path.dirname(os.path.realpath(options.blk_file)),)
    return Gate(options.allow_files, own if options.allow_files is None else options.allow_files)


def _outline_of(disk: Disk) -> Outline:
    return Outline(disk.size, disk.image.capabilities.cluster_size)
