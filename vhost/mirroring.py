"""`ctl mirror`: the disk is copied to another place and kept in step with it, until the copy is served or left.

The copy is opened as the image is, beside it, with files of its own down to the base. While requests wait it takes the
image's place: what it holds is stable before the path that is served leads to it. A death before finds the disk that
was served, a death after its copy.
"""

import errno
import logging
import os
from collections.abc import Callable, Coroutine
from typing import Any

from qcow2 import Disk
from qcow2.driver.file import HostFile, run
from qcow2.engine.create import Options, Preallocation, create, write_raw
from qcow2.engine.image import Image
from qcow2.error import UnsupportedImage
from qcow2.job.mirror import Mirror
from qcow2.job.pace import Pace
from qcow2.node.node import Node
from qcow2.node.pivot import NewFile, Pivot, require_turnable
from vhost.beside import beside
from vhost.job import JobFailed, RoomWanted, Work
from vhost.policy import COPY_FORMATS
from vhost.problem import problem_of
from vhost.servedchain import ServedChain

WIDTH = 4  # chunks at a time, which is not to keep requests waiting
FLUSHES = 4  # before the pause, which so finds little to make stable

log = logging.getLogger("vhost")


class Mirroring(Work):
    """Copy the disk that is *served* to *target*, as seen from the directory of the image, and keep the two in step."""

    kind = "mirror"
    awaits_word = True

    def __init__(
        self, served: ServedChain, target: str, image_format: str | None, *, only_top: bool, is_existing: bool
    ) -> None:
        """Raises: RoomWanted; ValueError, UnsupportedImage, OSError if that cannot be done."""
        served.require_free()
        self._device = served.device
        self._backend = served.backend
        self._held = held = served.held
        self._only_top = only_top
        self._format = image_format or held.options.format
        self._mirror: Mirror | None = None
        self._copy: Disk | None = None  # that `_mirror` writes
        self._is_over = False  # the copy is served, or left whole
        image = self._require_possible()
        path = os.path.join(os.path.dirname(os.path.realpath(image.file.path)), target)
        self._path = path
        if is_existing and only_top:
            raise ValueError(f"{target}: what is there may show more than the top: give a new name")
        served.require_foreign(path)
        self._new = None if is_existing else NewFile(path)
        self._held.close_beside(self._open(image))  # what can be known of it is said now
        self.about: dict[str, Any] = {
            "target": target,
            "format": self._format,
            "top": only_top,
            "existing": is_existing,
        }

    def _require_possible(self) -> Node:
        if self._held.disk is None:
            raise RoomWanted
        image = self._held.disk.image
        if self._format not in COPY_FORMATS:
            raise ValueError(f"a copy is {' or '.join(COPY_FORMATS)}, not {self._format!r}")
        if image.read_only:
            raise OSError(errno.EROFS, "opened read-only", image.file.path)
        if image.is_encrypted:
            raise UnsupportedImage(image.file.path, "encrypted: a copy would be in plain")
        if self._only_top and not (isinstance(image, Image) and image.backing is not None and self._format == "qcow2"):
            raise UnsupportedImage(
                image.file.path, "only what is over a backing file has a top, and a qcow2 copy of it"
            )
        return image

    # the copy

    def prepare(self) -> None:
        with self._device.keeping() as is_held:
            if not is_held:
                raise RoomWanted
            if self._is_under_way() and self._mirror is not None and not self._mirror.is_broken:
                return
            self._drop()
            self._begin_anew()

    def _is_under_way(self) -> bool:
        """Whether the guest's changes come by; the device is kept."""
        return self._mirror is not None and self._backend.layer is self._mirror

    def _begin_anew(self) -> None:
        assert self._held.disk is not None
        source = self._held.disk.image
        self._copy = copy = self._open(source)
        try:
            is_new = self._new is not None
            self._mirror = mirror = Mirror(source, copy.image, only_top=self._only_top, is_new=is_new)
            mirror.on_behind = self.on_behind
            self._exchange(
                lambda done: done(""),
                lambda: self._put_beside(copy),
                lambda: self._backend.put_between(mirror),
            )
        except BaseException:
            self._copy = None
            self._held.close_beside(copy)
            raise

    def _open(self, source: Node) -> Disk:
        """Raises: OSError, ImageError; ValueError if its length is another."""
        assert self._held.disk is not None
        if self._new is not None:
            self._new.make(self._held.disk.files[0], lambda file: self._fill(file, source))
        try:
            copy = self._held.open_beside(self._path if self._new is None else self._new.temporary, self._format)
            if copy.size != source.size:
                self._held.close_beside(copy)
                raise ValueError(f"{self._path}: is {copy.size} bytes long, the disk is {source.size}")
        except BaseException:
            if self._new is not None:
                self._new.discard()
            raise
        return copy

    def _fill(self, file: HostFile, source: Node) -> None:
        if self._format == "raw":
            run(write_raw(file, source.size, Preallocation.OFF))
        else:
            run(create(file, self._options(source)))

    def _options(self, source: Node) -> Options:
        """As the disk is, if it is qcow2."""
        if not isinstance(source, Image):
            return Options(size=source.size)
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
        )

    def _backing_name(self, name: str | None) -> str | None:
        """As the image says, or, from another directory, in full."""
        assert self._held.disk is not None
        top, below = self._held.disk.files[:2]
        here = os.path.dirname(os.path.realpath(top.path))
        is_beside = os.path.samefile(here, os.path.dirname(self._path))
        return name if is_beside else os.path.realpath(below.path)

    def begin(self, pace: Pace) -> Coroutine[Any, Any, None]:
        if not self._is_under_way() or self._mirror is None:
            raise RoomWanted
        return self._mirror.catch_up(pace, width=WIDTH)

    # its end

    def require_finishable(self) -> None:
        disk = self._held.disk
        if disk is None:
            raise ValueError("the image is not held")
        if self._format != self._held.options.format:
            path = disk.files[0].path
            raise ValueError(
                f"{path} is served as {self._held.options.format}, its copy is {self._format}: it can be left only"
            )
        if self._held.options.data_file is not None:
            raise ValueError("a daemon with --data-file would use it for the copy")
        require_turnable(self._held.options.blk_file, disk.files[0])

    def finish(self) -> None:
        with self._device.keeping() as is_held:
            if not is_held or not self._is_under_way():
                raise RoomWanted
            self.require_finishable()
            assert self._copy is not None
            for _ in range(FLUSHES):
                beside(self._device, self._backend, self._copy.image.flush())
            self._name()
            assert self._held.disk is not None
            pivot = Pivot(self._held.options.blk_file, self._held.disk.files[0], self._path, self._copy.files[0])
            past, problem = self._serve_copy(pivot)
        self._close(past)
        if problem:
            raise JobFailed(f"the copy is served, but may not be after a power loss, and no more is written: {problem}")

    def _serve_copy(self, pivot: Pivot) -> tuple[Disk, str]:
        """-> what was served, and what is wrong with the path, if anything is. Raises: RoomWanted, OSError."""
        assert self._copy is not None
        copy = self._copy.image
        past: list[Disk] = []
        problems: list[str] = []

        def turn() -> None:
            pivot.switch()
            try:
                pivot.sync()
            except OSError as error:
                problems.append(problem_of(error))

        def begin(done: Callable[[str], None]) -> None:
            self._bring(lambda problem: done(problem) if problem else self._on_host(turn, done))

        def swap() -> None:
            past.append(self._held.serve_beside())

        def attached() -> None:
            for problem in problems:
                copy.fail(OSError(errno.EIO, problem))

        pivot.prepare()
        try:
            self._exchange(begin, swap, attached)
        except BaseException:
            pivot.discard()
            raise
        self._copy = self._mirror = None
        self._is_over = True
        return past[0], "; ".join(problems)

    def _bring(self, done: Callable[[str], None]) -> None:
        """On the worker, while nothing is under way: *done("")* once what the disk holds is in the copy, and stable."""
        if self._mirror is None or not self._mirror.is_in_step:
            done(BEHIND)
        else:
            self._backend.run(self._mirror.flush(), lambda task: done(problem_of(task.take_error())))

    def _on_host(self, function: Callable[[], None], done: Callable[[str], None]) -> None:
        self._device.worker.call_host(function, lambda _, error: done(problem_of(error)))

    def part(self) -> None:
        with self._device.keeping() as is_held:
            if not is_held or not self._is_under_way() or self._mirror is None:
                raise JobFailed(f"{self._path}: the image was let go, and no copy is left")
            mirror = self._mirror
            self._exchange(
                lambda done: done("" if mirror.is_in_step else BEHIND),
                lambda: self._put_beside(None),
                lambda: None,
            )
            copy, self._copy, self._mirror = self._copy, None, None
            assert copy is not None
            self._held.close_clean(copy)
            self._name()
            self._is_over = True

    def leave(self) -> None:
        try:
            with self._device.keeping():
                self._drop()
                if self._new is not None and not self._is_over:
                    self._new.discard()
        except OSError as error:
            log.error("%s: a copy that is not whole is left: %s", self._path, error.strerror)

    def _drop(self) -> None:
        """Let the copy go, which is not whole; the device is kept. Raises: OSError."""
        if self._is_under_way():
            assert self._copy is not None
            self._exchange(lambda done: done(""), lambda: self._put_beside(None), lambda: None)
            self._held.close_beside(self._copy)
        self._copy = self._mirror = None  # or the image was let go, and the copy closed

    def _put_beside(self, copy: Disk | None) -> None:
        """The worker has nothing of the image."""
        self._held.beside = copy

    def _name(self) -> None:
        if self._new is not None:
            self._new.name()

    def _exchange(
        self, begin: Callable[[Callable[[str], None]], None], swap: Callable[[], None], attached: Callable[[], None]
    ) -> None:
        """Raises: RoomWanted, OSError."""
        refusal = self._device.exchange(begin, swap, attached)
        if refusal == BEHIND:
            raise RoomWanted
        if refusal:
            raise OSError(errno.EIO, refusal)

    def _close(self, past: Disk) -> None:
        try:
            self._held.close_clean(past)
        except OSError as error:  # its content is whole all the same
            log.error("%s: what was served is not closed cleanly: %s", past.files[0].path, error.strerror)


BEHIND = "the copy is behind"
