"""Faults of live operations, put in on purpose: each must be found among the deaths of a few histories."""

from collections.abc import Callable
from typing import Any

import pytest


def links_below_are_not_named() -> None:
    """Law 1: who opens the overlay after a kill does not know that links below it wait."""
    from qcow2.engine.links import Links

    async def name_below(self: Links, tag: int) -> bool:
        return True

    patch(Links, "name_below", name_below)


def links_below_are_forgotten_early() -> None:
    """Law 1: the overlay says that no link below waits before that is so."""
    from vhost.disk import ImageBackend

    defer = ImageBackend.defer_flushes

    def early(self: ImageBackend, overlay: Any, done: Callable[[str, bool], None]) -> None:
        self.run(overlay.image.forget_below(), lambda task: None)
        defer(self, overlay, done)

    patch(ImageBackend, "defer_flushes", early)


def flush_does_not_wait_for_what_is_frozen() -> None:
    """Law 2: a FLUSH after a snapshot makes the overlay stable, and not what is below it."""
    from vhost.disk import ImageBackend

    async def flush(self: ImageBackend) -> None:
        await self._image.flush()

    patch(ImageBackend, "_flush", flush)


def flush_waits_for_no_name() -> None:
    """Law 2: the path may lead to what is frozen again, without what was flushed since."""
    from vhost.disk import ImageBackend

    def defer(self: ImageBackend, overlay: Any, done: Callable[[str, bool], None]) -> None:
        self.run(overlay.below.flush(), lambda task: done("", False))

    patch(ImageBackend, "defer_flushes", defer)


def header_is_pointed_elsewhere_early() -> None:
    """Law 6: the header names another file before what a stream has copied is stable."""
    from qcow2.engine.image import Image
    from qcow2.format.header import header_over
    from qcow2.job.rebase import copy_difference
    from vhost import streaming

    async def stream(overlay: Image, base: Any, pace: Any, windows: Any) -> None:
        await copy_difference(overlay, base, pace, windows)

    async def put_over(self: Image, backing: Any, name: str | None, backing_format: str | None) -> None:
        changes = await self._changing()
        await changes.root.rewrite(lambda header: header_over(self.file, header, name, backing_format))
        self.show_below(backing)

    patch(streaming, "stream", stream)
    patch(Image, "put_over", put_over)


def base_is_not_flushed_before_the_pivot() -> None:
    """Law 6: the header names the base before the last write of a commit to it is stable."""
    from qcow2.engine.image import Image

    flush = Image.flush

    async def of_overlays(self: Image) -> None:
        if self.header.backing_name is not None:
            await flush(self)

    patch(Image, "flush", of_overlays)


def copy_before_write_is_skipped() -> None:
    """A backup is of one moment: what has changed before it came by is not saved."""
    from vhost.frozen import Frozen

    async def save(self: Frozen, guest_offset: int, nbytes: int) -> None:
        """Let it change."""

    patch(Frozen, "save", save)


def path_is_turned_before_the_last_write() -> None:
    """Law 6: the path leads to a mirror's copy while requests still go to the disk."""
    from vhost.mirroring import Mirroring

    def turn(self: Any) -> None:
        self._held.directory.rename(self._copy.files[0].path)

    patch(Mirroring, "require_finishable", turn)


def copy_is_served_before_it_is_stable() -> None:
    """Law 2: what was flushed to the disk is not made stable in the copy that takes its place."""
    from vhost import mirrorcopy, mirroring

    def bring(self: mirroring.Mirroring, done: Callable[[str], None]) -> None:
        done("")

    patch(mirroring.Mirroring, "_bring", bring)
    patch(mirroring, "beside", lambda device, backend, flush: flush.close())
    patch(mirrorcopy.CopyFile, "settle", lambda self: None)


def copy_misses_zeros() -> None:
    """A mirror is in step: what a discard or WRITE ZEROES changes is not changed in the copy."""
    from qcow2.job.mirror import Mirror

    async def write_zeroes(self: Mirror, guest_offset: int, nbytes: int, *, unmap: bool) -> None:
        await self._source.write_zeroes(guest_offset, nbytes, unmap=unmap)

    patch(Mirror, "write_zeroes", write_zeroes)


def bitmap_bit_is_late() -> None:
    """Law 11: a zone is hot before its bits are stable in the image."""
    from qcow2.driver.operation import Spawn
    from qcow2.engine.bitmaps import Bitmaps

    heat_zones = Bitmaps._heat_zones

    async def heat(self: Bitmaps, zones: set[int]) -> None:
        self._hot |= zones
        self._dirty.heat(zones)
        await Spawn(heat_zones(self, zones))

    patch(Bitmaps, "_heat_zones", heat)


def bits_are_forgotten_early() -> None:
    """Law 11: a bitmap forgets what is in a backup that is not whole yet."""
    from vhost.backup import Backup

    finish = Backup.finish

    def early(self: Backup) -> None:
        bitmap, self._bitmap = self._bitmap, None
        if bitmap is not None:
            self._forget(bitmap)
        finish(self)

    patch(Backup, "finish", early)


def patch(owner: Any, name: str, value: Any) -> None:
    """Break this process for good."""
    pytest.MonkeyPatch().setattr(owner, name, value)


MUTANTS: list[Callable[[], None]] = [
    links_below_are_not_named,
    links_below_are_forgotten_early,
    flush_does_not_wait_for_what_is_frozen,
    flush_waits_for_no_name,
    header_is_pointed_elsewhere_early,
    base_is_not_flushed_before_the_pivot,
    copy_before_write_is_skipped,
    path_is_turned_before_the_last_write,
    copy_is_served_before_it_is_stable,
    copy_misses_zeros,
    bitmap_bit_is_late,
    bits_are_forgotten_early,
]
BY_NAME = {mutant.__name__: mutant for mutant in MUTANTS}
