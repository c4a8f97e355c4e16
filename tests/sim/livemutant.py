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

    def early(self: ImageBackend, overlay: Any, done: Callable[[str], None]) -> None:
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

    def defer(self: ImageBackend, overlay: Any, done: Callable[[str], None]) -> None:
        self.run(overlay.below.flush(), lambda task: done(""))

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
        await changes.root.rewrite(header_over(self.file, changes.root.header, name, backing_format))
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
]
BY_NAME = {mutant.__name__: mutant for mutant in MUTANTS}
