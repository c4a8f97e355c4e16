"""`ctl commit`: what is frozen between the served image and a base is brought into the base, and not needed any more.

What the image itself holds is frozen first, if it is to come, too: as by `ctl snapshot`, in a file that is removed once
the base has it. The base is opened for writing in the place of the one that was only read. What is written to it nobody
sees: the files between hide it, until all of it is stable and the served image is put over the base.
"""

import errno
import logging
import os
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

from qcow2.driver.file import HostFile
from qcow2.engine.image import Image
from qcow2.error import UnsupportedImage
from qcow2.job.commit import commit
from qcow2.job.crew import BESIDE_A_GUEST, Windows
from qcow2.job.pace import Pace
from qcow2.job.reins import Reins
from qcow2.job.visible import require_hidden
from qcow2.node.leftover import COMMITTING, Named, numbers_of
from qcow2.node.node import Node, encrypted_among
from ring.thread import new_future
from vhost.beside import beside
from vhost.job import JobFailed, RoomWanted, Work
from vhost.overlaybitmaps import OverlayBitmaps
from vhost.overlaywish import OverlayWish
from vhost.servedchain import ServedChain, close_all
from vhost.snapshot import SnapshotRefused, Snapshots, SnapshotUnstable

log = logging.getLogger("vhost")


class Committing(Work):
    """Bring what is between the served image and *base*, a file of its chain, into that; None: the lowest."""

    kind = "commit"

    def __init__(self, served: ServedChain, base: str | None, *, is_active: bool) -> None:
        """*base* is as seen from the directory of the image; None: only if one file is between that and the lowest.

        *is_active*: what the image holds now comes, too; then None is its backing file.
        Raises: RoomWanted; ValueError, UnsupportedImage, OSError if that cannot be done.
        """
        served.require_free()
        self._served = served
        self._served.image()
        self._is_to_freeze = is_active
        self._frozen: list[Named] = []  # files that are in what is committed, and are removed then
        self.about: dict[str, Any] = {"base": base, "active": self._is_to_freeze}
        if self._is_to_freeze:
            self._require_freezable()
        self._base = base or (self._first_base() if is_active else self._only_base())
        self._image, self._top, self._below = self._find()
        self._require_committable()

    def _require_committable(self) -> None:
        """What can be known of it before anything is frozen or written. Raises: OSError, ImageError, ValueError."""
        served, held = self._served, self._served.held
        served.require_over(self._image, self._below)
        self._require_cipher()
        depth = self._nodes.index(self._below) - self._nodes.index(self._top)
        beside(served.device, served.backend, require_hidden(self._top, self._below, depth, Reins()))
        if self._below is not held.written_below:
            held.discard_writer(held.prepare_writer(self._below, 0))

    def _require_cipher(self) -> None:
        """Law 12: a base in plain gets nothing that is encrypted now."""
        committed = self._nodes[self._nodes.index(self._top) : self._nodes.index(self._below)]
        if encrypted_among(committed) is not None and not self._below.is_encrypted:
            raise UnsupportedImage(self._below.file.path, "is not encrypted: it would hold in plain what is committed")

    def _require_freezable(self) -> None:
        image = self._served.image()
        if image.data_file is not image.file:
            raise UnsupportedImage(image.file.path, "its data is in another file, which would be left: take a snapshot")
        assert self._served.held.disk is not None
        self._served.held.disk.chain.require_room()

    @property
    def _nodes(self) -> list[Node]:
        assert self._served.held.disk is not None
        return self._served.held.disk.chain.nodes

    @property
    def _files(self) -> list[HostFile]:
        assert self._served.held.disk is not None
        return self._served.held.disk.chain.files

    @property
    def _frozen_name(self) -> str:
        """How the files are called that what the image holds is frozen in, if not with a number."""
        return f"{os.path.realpath(self._served.image().file.path)}.{COMMITTING}"

    def _is_frozen_by_us(self, path: str) -> bool:
        return os.path.realpath(path).rstrip("0123456789") == self._frozen_name

    def _frozen_above(self, base: Node) -> list[Named]:
        files = self._files[1 : self._nodes.index(base)]
        return [Named(file.path, numbers_of(os.fstat(file.fd))) for file in files if self._is_frozen_by_us(file.path)]

    def _first_base(self) -> str:
        """Below the image, and below what commits that did not end have frozen."""
        paths = [node.file.path for node in self._nodes[1:]]
        return os.path.realpath(next((path for path in paths if not self._is_frozen_by_us(path)), paths[-1]))

    def _only_base(self) -> str:
        """The lowest, if there can be no doubt what comes into it: not one more each time. Raises: ValueError."""
        top, *between, lowest = (node.file.path for node in self._nodes)
        if not between:
            raise ValueError(f"{top} is over {lowest}: nothing is between; --active commits the disk itself")
        if len(between) > 1:
            raise ValueError(f"between {top} and {lowest} are {', '.join(between)}: say --base")
        return os.path.realpath(lowest)

    def _find(self) -> tuple[Image, Image, Node]:
        """The served image, the top of what is committed, and the base, as they are now."""
        image = self._served.image()
        top, path = image if self._is_to_freeze else image.backing, image.file.path
        base = self._served.below(self._base)
        if base is top or not isinstance(top, Image):
            raise ValueError(f"{self._base}: is the backing file of {path}: nothing is between them (--active?)")
        if top.size < min(image.size, base.size):
            raise ValueError(f"{top.file.path}: is shorter than {path} and than {base.file.path}, which would show")
        return image, top, base

    def prepare(self) -> None:
        with self._served.device.keeping() as is_held:
            if not is_held:
                raise RoomWanted
            if self._is_to_freeze:
                self._freeze()
            self._image, self._top, base = self._find()
            if base is not self._served.held.written_below:
                self._open(base)
            self._below = self._find()[2]
            self._frozen = self._frozen_above(self._below)

    def _freeze(self) -> None:
        """Let the image be an overlay over what it holds. Raises: OSError, ImageError, ValueError, JobFailed."""
        self._require_freezable()
        name, number = self._frozen_name, 1
        while os.path.lexists(name):
            number += 1
            name = f"{self._frozen_name}{number}"
        snapshots = Snapshots(self._served.device, self._served.backend, self._served.held)
        try:
            failure = snapshots.freeze(os.path.basename(name), OverlayWish(OverlayBitmaps(are_carried=True)))
        except SnapshotRefused as refusal:
            raise OSError(errno.EIO, str(refusal)) from refusal
        except SnapshotUnstable as unstable:
            self._served.on_frozen(os.path.basename(name), "", str(unstable))
            raise JobFailed(str(unstable)) from unstable
        self._is_to_freeze = False
        self._served.on_frozen(os.path.basename(name), failure, "")
        if failure:  # its content is whole all the same
            log.error("%s: is not closed cleanly: %s", name, failure)

    def _open(self, base: Node) -> None:
        opened = self._served.held.prepare_writer(base, self._top.size)
        closing: list[Callable[[], None]] = []
        try:
            refusal = self._served.device.exchange(
                lambda done: done(""),
                lambda: closing.extend(self._served.held.adopt_writer(opened)),
                lambda: None,
            )
        except BaseException:
            self._served.held.discard_writer(opened)
            raise
        if refusal:
            self._served.held.discard_writer(opened)
            raise OSError(errno.ETIMEDOUT, refusal)
        close_all(closing)

    def begin(self, pace: Pace) -> Coroutine[Any, Any, None]:
        image, _, base = self._find()
        if base is not self._below or image is not self._image:
            raise RoomWanted
        return commit(self._top, base, pace, Windows(*BESIDE_A_GUEST))

    def finish(self) -> None:
        self._served.put_over(self._image, self._below, lambda: self._find()[2] is self._below)
        for frozen in self._frozen:
            try:
                frozen.remove()
            except OSError as error:  # nobody needs it
                log.error("%s: is left: %s", frozen.path, error.strerror)

    def leave(self) -> None:
        with self._served.device.keeping() as is_held:
            below = self._served.held.written_below  # of ours, or of an attempt that came no further
            if not is_held or below is None:
                return
            outcome: Future[str] = new_future()
            worker = self._served.device.worker
            worker.call(lambda: self._served.backend.retire(below, outcome.set_result))
            failure = worker.wait(outcome)
            try:
                self._served.held.share(below)
            except OSError as error:
                failure = failure or str(error)
        if failure:  # its content is whole all the same
            log.error("%s: is not closed cleanly: %s", below.file.path, failure)
