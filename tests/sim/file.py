"""Files and shared memory of the simulated kernel, as C finds them."""

from typing import Any

from qcow2.native import ffi
from tests.crash.driver import SimulatedFile, SimulatedMemory


class KernelMemory(SimulatedMemory):
    """Shared memory that C stores to, too."""

    __slots__ = ("_known", "_pin", "address")

    def __init__(self, nbytes: int) -> None:
        super().__init__(bytes(nbytes))
        self._pin = ffi.from_buffer(self.content)
        self._known: bytearray | None = None  # what the journal says, once C changes it without a word
        self.address = int(ffi.cast("uintptr_t", self._pin))

    def window(self, offset: int) -> Any:
        """Where C sets bits at any time; `changed` tells."""
        self._known = bytearray(self.content)
        return ffi.cast("uint8_t *", self.address) + offset

    def know(self, offset: int, nbytes: int) -> None:
        """The journal says what is there."""
        if self._known is not None:
            self._known[offset : offset + nbytes] = self.content[offset : offset + nbytes]

    def changed(self) -> tuple[int, bytes] | None:
        """What the journal does not say yet, from its first byte to its last."""
        if self._known is None or self._known == self.content:
            return None
        places = [at for at, (old, new) in enumerate(zip(self._known, self.content, strict=True)) if old != new]
        first, end = places[0], places[-1] + 1
        self.know(first, end - first)
        return first, bytes(self.content[first:end])


class KernelFile(SimulatedFile):
    """A file with a descriptor."""

    __slots__ = ("direct_fd", "fd")
    is_open = True
