"""Where a mirror's copy lies: a file, which is new or there already, or an NBD export."""

import errno
import os
from collections.abc import Callable
from contextlib import ExitStack
from itertools import zip_longest
from typing import Protocol

from qcow2 import Disk
from qcow2.driver.file import HostFile, perform, run
from qcow2.driver.nbdexport import NbdExport
from qcow2.driver.operation import Sync
from qcow2.engine.create import Options, create
from qcow2.engine.image import Image
from qcow2.engine.plain import Preallocation, write_raw
from qcow2.error import UnsupportedImage
from qcow2.format.header import read_header
from qcow2.format.luks import Encryption
from qcow2.job.pace import Cancelled
from qcow2.node.chain import Chain, outline
from qcow2.node.node import Node
from qcow2.node.pivot import NewFile
from qcow2.node.raw import RawImage
from vhost.beside import beside
from vhost.exportline import ExportLine
from vhost.held import HeldImage
from vhost.job import RoomWanted
from vhost.servedchain import ServedChain

PATIENCE_SECONDS = 10.0  # of the guest's writes, while a server answers nothing


class CopyPlace(Protocol):
    """Where the copy lies. Used by one thread at a time, but for `abort`."""

    path: str
    image_format: str
    is_new: bool  # all of the copy shows what it would if nothing had been written to it
    on_lost: Callable[[OSError], None]  # told, on any thread, when an open copy is gone

    def try_out(self, source: Node) -> None:
        """Say what can be known at once. Raises: OSError, ImageError, ValueError."""

    def reach(self) -> None:
        """Do what may take long before `open`, which nobody is to wait for.

        Raises: OSError, ImageError, ValueError, Cancelled.
        """

    def open(self, source: Node) -> Disk:
        """The copy of *source*, to be written.

        Raises: OSError, ImageError, ValueError; RoomWanted: it is to be reached again first.
        """

    def require_servable(self) -> None:
        """Whether the copy can be served. Raises: ValueError."""

    def settle(self) -> None:
        """Make stable most of what it has, beside who writes to it. Raises: OSError."""

    def name(self) -> None:
        """It is whole: let it have its name. Raises: OSError."""

    @property
    def place(self) -> str:
        """Where it is now, under its name or not yet. Raises: OSError."""

    def unname(self) -> None:
        """It is not served after all: let it have no name again. Raises: OSError."""

    def discard(self) -> None:
        """It is not whole, and closed: let it be gone. Raises: OSError."""

    def abort(self) -> None:
        """For any thread: wait for no other host any more."""


class CopyFile:
    """The file *target*, as seen from the directory of the image: a new one, or one that *exists*."""

    def __init__(self, served: ServedChain, target: str, image_format: str, *, only_top: bool, exists: bool) -> None:
        """Raises: ValueError, OSError."""
        held = served.held
        assert held.disk is not None
        self.on_lost: Callable[[OSError], None] = lambda error: None  # never told
        self.path = os.path.join(os.path.dirname(os.path.realpath(held.disk.files[0].path)), target)
        self.image_format = image_format
        self.is_new = not exists
        self._held = held
        self._device = served.device
        self._backend = served.backend
        self._copy: Disk | None = None  # opened last
        self._is_aborted = False
        self._length = 0  # that what is there has at least
        self._only_top = only_top
        if exists and only_top:
            raise ValueError(f"{target}: what is there may show more than the top: give a new name")
        served.require_foreign(self.path)
        self._new = None if exists else NewFile(self.path, held.options.link_log, image_format)
        if self._new is not None:
            held.left_copies.know(self._new.temporary)

    def try_out(self, source: Node) -> None:
        """As of a `CopyPlace`; repairs nothing, as the device is kept."""
        self._held.close_beside(self._open(source, writable=not self._is_unclean()))

    def _is_unclean(self) -> bool:
        """Whether what is there has to be repaired before it is written. Raises: OSError, ImageError."""
        if self._new is not None or self.image_format != "qcow2":
            return False
        with HostFile.open(self.path) as file:
            return run(read_header(file, trust_refcounts=False)).is_dirty

    def reach(self) -> None:
        """Repair what is there, and let it be as long as the disk has become. Raises: as of a `CopyPlace`."""
        if self._new is not None:
            return
        length = self._held.properties.size
        if self._is_unclean() or outline(self.path, self.image_format).size < length:
            with self._held.repaired(self.path, self.image_format, self._require_going) as copy:
                if copy.size < length:
                    copy.resize(length)
        self._length = length

    def _require_going(self) -> None:
        if self._is_aborted:
            raise Cancelled

    def open(self, source: Node) -> Disk:
        """As of a `CopyPlace`."""
        if self._new is None and source.size > self._length:  # it has grown meanwhile
            raise RoomWanted
        self._copy = self._open(source, writable=True)
        return self._copy

    def _open(self, source: Node, *, writable: bool) -> Disk:
        assert self._held.disk is not None
        if self._new is not None:
            if self._is_served():
                raise OSError(errno.ESTALE, "the path that is served leads to it", self.path)
            self._new.make(self._held.disk.files[0], lambda file: self._fill(file, source))
        try:
            path = self.path if self._new is None else self._new.temporary
            copy = self._held.open_beside(path, self.image_format, writable=writable)
            try:
                self._require_fit(copy, source)
            except BaseException:
                self._held.close_beside(copy)
                raise
        except BaseException:
            self.discard()
            raise
        return copy

    def _require_fit(self, copy: Disk, source: Node) -> None:
        if copy.size != source.size:
            raise ValueError(f"{self.path}: is {copy.size} bytes long, the disk is {source.size}")
        if self._held.encrypted_in(only_top=self._only_top) is not None and not copy.image.is_encrypted:
            raise UnsupportedImage(self.path, "not encrypted, as the disk is: it would hold that in plain")
        if self._only_top:
            self._require_same_below(copy)

    def _require_same_below(self, copy: Disk) -> None:
        """Names lead to what is open under the disk, or the copy would show what was put in its place."""
        assert self._held.disk is not None
        for file, other in zip_longest(self._held.disk.files[1:], copy.files[1:]):
            if not _is_same(file, other):
                raise OSError(errno.ESTALE, "another file has this name by now", (other or file).path)

    def _fill(self, file: HostFile, source: Node) -> None:
        if self.image_format == "raw":
            run(write_raw(file, source.size, Preallocation.OFF))
            return
        with self._held.encrypted_as_copied(only_top=self._only_top) as encryption:
            run(create(file, self._options(source, encryption)))

    def _options(self, source: Node, encryption: Encryption | None) -> Options:
        """As the disk is, if it is qcow2."""
        if not isinstance(source, Image):
            return Options(size=source.size, encryption=encryption)
        header = source.header
        return Options(
            size=source.size,
            cluster_bits=header.record.cluster_bits,
            refcount_order=header.record.refcount_order,
            lazy_refcounts=header.has_lazy_refcounts,
            has_subclusters=header.record.has_subclusters,
            compression=header.compression_type,
            backing_name=self._backing_name(header.backing_name) if self._only_top else None,
            backing_format=header.backing_format if self._only_top else None,
            encryption=encryption,
        )

    def _backing_name(self, name: str | None) -> str | None:
        """As the image says, or, from another directory, in full."""
        assert self._held.disk is not None
        top, below = self._held.disk.files[:2]
        here = os.path.dirname(os.path.realpath(top.path))
        is_beside = os.path.samefile(here, os.path.dirname(self.path))
        return name if is_beside else os.path.realpath(below.path)

    def require_servable(self) -> None:
        """It can."""

    def settle(self) -> None:
        """As of a `CopyPlace`; does nothing once the image was let go."""
        with ExitStack() as closing:
            with self._device.keeping():
                if not self._is_beside():
                    return
                assert self._copy is not None
                try:
                    own = [closing.enter_context(_second(file)) for file in self._copy.files if file.writable]
                except OSError:  # no descriptor is to be had; nothing is lost but time: who goes on syncs all of it
                    return
            for file in own:  # the guest may let the others go meanwhile
                self._sync(file)

    def _sync(self, file: HostFile) -> None:
        """Raises: OSError; then the copy takes no more writes, and who opens it next knows (law 7)."""
        try:
            run(_sync(file))
        except OSError as error:
            with self._device.keeping():
                if self._is_beside():
                    assert self._copy is not None
                    beside(self._device, self._backend, self._copy.image.lose(error))
            raise

    def _is_beside(self) -> bool:
        """Whether the copy is open and written; the device is kept."""
        return self._copy is not None and self._held.beside is self._copy

    def name(self) -> None:
        """As of a `CopyPlace`."""
        if self._new is not None:
            self._new.name()

    @property
    def place(self) -> str:
        """As of a `CopyPlace`."""
        return self.path if self._new is None else self._new.place

    def unname(self) -> None:
        """As of a `CopyPlace`; what the path that is served leads to keeps its name."""
        if self._new is not None and not self._is_served():
            self._new.unname()

    def discard(self) -> None:
        """As of a `CopyPlace`; what was there, or the path that is served leads to, stays."""
        if self._new is not None and not self._is_served():
            self._new.discard()

    def _is_served(self) -> bool:
        """Whether the path that is served leads to the new file."""
        return self._new is not None and self._new.is_led_to_by(self._held.options.blk_file)

    def abort(self) -> None:
        """It is here; a repair of it ends early."""
        self._is_aborted = True


def _second(file: HostFile) -> HostFile:
    return HostFile(file.path, os.dup(file.fd), writable=True)


async def _sync(file: HostFile) -> None:
    await Sync(file)


def _is_same(file: HostFile | None, other: HostFile | None) -> bool:
    if file is other or file is None or other is None:
        return file is other
    return os.path.samestat(os.fstat(file.fd), os.fstat(other.fd))


class CopyExport:
    """The NBD export at *uri*, a raw disk."""

    image_format = "raw"
    is_new = False

    def __init__(self, held: HeldImage, uri: str, *, exists: bool) -> None:
        """Raises: UnsupportedImage, ValueError."""
        self.on_lost: Callable[[OSError], None] = lambda error: None
        self.path = uri
        self._line = ExportLine(uri, held.options, exists=exists, patience=PATIENCE_SECONDS)
        self._reached: NbdExport | None = None  # and not opened
        self._export: NbdExport | None = None

    def try_out(self, source: Node) -> None:
        """A server may take its time: its export is seen when the job begins."""

    def reach(self) -> None:
        """Connect. Raises: OSError, Cancelled."""
        self._reached = self._line.reach()

    def open(self, source: Node) -> Disk:
        """What was reached. Raises: ValueError if its length is another."""
        export, self._reached = self._reached, None
        assert export is not None
        if export.size() != source.size:
            self._line.close()
            raise ValueError(f"{self.path}: is {export.size()} bytes long, the disk is {source.size}")
        self._export = export
        export.connection.on_lost = lambda error: self.on_lost(error)
        image = RawImage(export, export.size(), read_only=False)
        return Disk(image, Chain(files=[export], nodes=[image], image_format=self.image_format))

    def require_servable(self) -> None:
        """Raises: ValueError."""
        raise ValueError(f"{self.path}: a disk is not served from an export: the copy can be left only")

    def settle(self) -> None:
        """As of a `CopyPlace`: a server may take its time."""
        assert self._export is not None
        perform(Sync(self._export))

    def name(self) -> None:
        """It has its own."""

    @property
    def place(self) -> str:
        """The export."""
        return self.path

    def unname(self) -> None:
        """It keeps it."""

    def discard(self) -> None:
        """Leave the server. What was overwritten is."""
        self._line.close()

    def abort(self) -> None:
        """As of a `CopyPlace`."""
        self._line.give_up()
