"""Reads that the mapping in memory answers, in one call on the caller's thread: a disk's own takes 30 us to wake up."""

from collections.abc import Sequence

from qcow2.driver.far import FarFile
from qcow2.driver.file import HostFile
from qcow2.library.own_thread import OwnThread
from qcow2.native import ffi, lib
from qcow2.node.node import Node

MOST = 16 << 20  # bytes: signal handlers wait for the end of the call


class Glance:
    """Reads of a disk that nobody writes to; of another one there are none."""

    def __init__(self, image: Node, files: Sequence[HostFile], thread: OwnThread) -> None:
        """*files* are those of the image and its chain, the image's first; *thread* is who else uses them."""
        self._first = files[0]
        self._thread = thread
        self._map = image.extent_map if image.read_only else None
        if self._map is not None:
            for file in files:
                if not isinstance(file, FarFile):
                    image.set_slot(file, file.fd)

    def fills(self, guest_offset: int, target: memoryview) -> bool:
        """Fill *target* from *guest_offset* on; false: it is not done, the engine can do it, or tell why it fails."""
        if self._map is None or len(target) > MOST or not self._thread.is_ours:
            return False
        return self._thread.call_here(lambda: self._fills(guest_offset, target))

    def _fills(self, guest_offset: int, target: memoryview) -> bool:
        if self._map is None or not self._first.is_open:  # it may have been closed while this waited for its turn
            return False
        translate, context, _ = self._map
        with ffi.from_buffer("uint8_t[]", target, require_writable=True) as view:
            return lib.read_at_once(translate, context, guest_offset, len(view), view) > 0
