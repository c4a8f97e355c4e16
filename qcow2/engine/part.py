"""What each part that changes an image knows of it."""

from qcow2.engine.opened import Opened
from qcow2.engine.root import Root
from qcow2.engine.space import Space


class Part:
    """A part that changes an image: all of them know the same things, by the same names."""

    def __init__(self, opened: Opened, root: Root, space: Space) -> None:
        self._file = opened.file
        self._data = opened.data
        self._geometry = opened.geometry
        self._mapping = opened.mapping
        self._reader = opened.reader
        self._stability = opened.stability
        self._statistics = opened.statistics
        self._root = root
        self._refcounts = space.refcounts
        self._allocator = space.allocator
        self._reaper = space.reaper
