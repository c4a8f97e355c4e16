"""A node: what can be read and written like a disk, whatever its format."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

from qcow2.driver.operation import Buffer
from qcow2.engine.backing import Backing, Capabilities
from qcow2.engine.data import SectorCipher
from qcow2.engine.statistics import Statistics

if TYPE_CHECKING:
    from qcow2.engine.linkpolicy import LinkPolicy


GROWTH = 64 << 20  # bytes that are written in a moment


class Node(Backing, Protocol):
    """An open disk. Its coroutines may run side by side on one scheduler; nothing else may touch it.

    `Image` and `RawImage` are nodes, and whatever a registered format opens (`qcow2.node.formats`).
    """

    read_only: bool
    bitmap_problems: list[str]  # why some bitmaps cannot be kept
    on_failure: Callable[[], None]  # told once, when the node takes no more writes
    on_bitmaps_void: Callable[[], None]  # told once, at the first change of a disk with bitmaps

    @property
    def cipher(self) -> SectorCipher | None:
        """By which what it stores of the disk is encrypted."""

    @property
    def capabilities(self) -> Capabilities:
        """What it can do besides."""

    @property
    def statistics(self) -> Statistics:
        """What has been counted."""

    def set_link_policy(self, policy: "LinkPolicy") -> None:
        """Say when links may wait, if there are any."""

    @property
    def failure(self) -> OSError | None:
        """Why it takes no more writes, if it takes none."""

    def fail(self, error: OSError) -> None:
        """Take no more writes because of *error*."""

    async def lose(self, error: OSError) -> None:
        """`fail` because of *error*, with which a sync of its file failed; as far as it can the next process knows."""

    async def write(self, guest_offset: int, source: Buffer) -> None:
        """Put *source*, inside the disk, at *guest_offset*; process-safe on return, stable after `flush`."""

    async def write_zeroes(self, guest_offset: int, nbytes: int, *, unmap: bool) -> None:
        """Make the range read as zeros; *unmap* gives its space back."""

    async def discard(self, guest_offset: int, nbytes: int) -> None:
        """Give the range's space back as far as that can be; what goes reads as zeros."""

    async def flush(self) -> None:
        """Make every write that has completed stable."""

    async def grow(self, nbytes: int) -> None:
        """Let the disk be *nbytes* long; stable on return."""

    async def grown_size(self, nbytes: int) -> int:
        """*nbytes* rounded up to a sector, if `grow` would not refuse it."""

    async def shrink(self, nbytes: int) -> None:
        """Let the disk be *nbytes* long; stable on return."""

    async def preallocate(self, guest_offset: int, nbytes: int, *, writes: bool) -> None:
        """Give the range space now; *writes* writes zeros there."""

    async def settle(self) -> None:
        """Let the files alone hold all that has completed."""

    async def close(self) -> None:
        """Leave the disk clean; raises what a failed sync raised."""


def growth(image: Node, nbytes: int) -> Iterator[int]:
    """The sizes by which the disk of *image* gets *nbytes* long, each of which is soon reached."""
    step = GROWTH if image.capabilities.writes_to_grow else max(1, nbytes)
    yield from range(image.size + step, nbytes, step)
    yield nbytes


def encrypted_among(nodes: Iterable[Node]) -> Node | None:
    """The first of *nodes* that is encrypted: a new file that takes what they hold has to be, too (law 12)."""
    return next((node for node in nodes if node.is_encrypted), None)
