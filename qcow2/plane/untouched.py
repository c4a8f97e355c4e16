"""Clusters of an external data file that hold stable zeros: the owner of what the extent map looks at, too."""

from typing import Any

from qcow2.native import ffi, lib

MAX_CLUSTERS = 1 << 27  # 16 MiB of bits; of a disk with more none is known


class Untouched:
    """Owner of a `struct untouched`; at first there are none."""

    def __init__(self, nclusters: int) -> None:
        nclusters = nclusters if nclusters <= MAX_CLUSTERS else 0
        self._bits: Any = ffi.new("uint8_t[]", nclusters // 8 + 1)
        self.native: Any = ffi.new("struct untouched *", {"nclusters": nclusters, "bits": self._bits})

    def longer(self, nclusters: int) -> "Untouched":
        """The same ones of a file of *nclusters*, no fewer than it had; what is new is none yet."""
        longer = Untouched(nclusters)
        ffi.memmove(longer._bits, self._bits, min(len(longer._bits), len(self._bits)))
        return longer

    def add(self, clusters: range) -> None:
        """These hold zeros, stable, and no entry names them."""
        if clusters:
            lib.untouched_add(self.native, clusters.start, clusters.stop - 1)

    def has(self, clusters: range) -> bool:
        """Whether all of them do, still."""
        return bool(lib.untouched_has(self.native, clusters.start, clusters.stop - 1))

    def clear(self) -> None:
        """From now on anything may be in any cluster."""
        ffi.memmove(self._bits, bytes(len(self._bits)), len(self._bits))

    def forget(self, clusters: range) -> None:
        """From now on anything may be in them."""
        lib.untouched_forget(self.native, clusters.start, clusters.stop - 1)
