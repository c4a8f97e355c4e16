"""What was promised of a disk that is worked on: what was frozen, copied, and noted in bitmaps, and from when on."""

from dataclasses import dataclass, field

Position = int  # in the journal


@dataclass(frozen=True)
class Frozen:
    """What a snapshot has frozen."""

    path: str
    position: Position


@dataclass
class Copy:
    """A file that holds what the disk held at *position*, from *made* on; before that it is no image, or *was_open*."""

    path: str
    position: Position
    made: Position | None = None
    was_open: bool = False
    is_over_base: bool = False  # which a commit may change


@dataclass
class Kept:
    """A bitmap of the image *path*.

    While that is served, and from *first* to *last*, it reports what has changed since *covers*, and, after a kill,
    nothing that has not since *exact*, to the bytes of *grain*: what was merged into it may have been coarser.
    """

    path: str
    name: str
    covers: Position
    exact: Position
    grain: int
    first: Position
    last: Position | None = None

    def holds(self, path: str, position: Position) -> bool:
        """Whether that is so at *position*."""
        return self.path == path and self.first <= position and (self.last is None or position <= self.last)


@dataclass
class Ledger:
    """All of it."""

    done: list[str] = field(default_factory=list)
    frozen: list[Frozen] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    bitmaps: list[Kept] = field(default_factory=list)
    has_committed: bool = False  # something may be written below the top
    moment: Position = 0  # of the last backup

    def bitmaps_of(self, path: str) -> list[Kept]:
        """Those that the image *path*, which is served, has now."""
        return [each for each in self.bitmaps if each.path == path and each.last is None]

    def carry(self, past: str, path: str) -> None:
        """The image *path* has the bitmaps of *past*, wherever it is served."""
        for each in self.bitmaps_of(past):
            self.bitmaps.append(Kept(path, each.name, each.covers, each.exact, each.grain, first=0))

    def forget(self, bitmap: Kept, moment: Position, began: Position, ended: Position) -> None:
        """Between *began* and *ended* it came to report what has changed since *moment* only."""
        bitmap.last = began
        self.bitmaps += [
            Kept(bitmap.path, bitmap.name, moment, bitmap.exact, bitmap.grain, first=began, last=ended),
            Kept(bitmap.path, bitmap.name, moment, moment, bitmap.grain, first=ended),
        ]

    def backup_before(self, bitmap: Kept) -> Copy | None:
        """The last whole backup that *bitmap* says all changes since of."""
        whole = [copy for copy in self.copies if copy.made is not None and copy.position >= bitmap.covers]
        return whole[-1] if whole else None

    def begin_copy(self, path: str, position: Position) -> None:
        """It is under way."""
        self.copies.append(Copy(path, position))

    def end_copy(self, path: str, position: Position) -> Copy:
        """It is whole, and stable."""
        copy = next(copy for copy in self.copies if copy.path == path)
        copy.made = position
        return copy
