"""An operation that fails: which one, how, and for how long."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from qcow2.driver import operation as op
from qcow2.error import NotTried
from tests.crash.driver import piece_bytes, simulated
from tests.crash.history import SECTOR

HARMLESS = (op.Size, op.Grace, op.Compute)  # cannot fail on a host
NEEDS_SPACE = (op.Write, op.Resize)
NEVER = 1 << 60


def kind_of(operation: op.Operation) -> type[op.Operation] | None:
    """As what *operation* can fail; None if it cannot. What marks a link log writes to the image's header."""
    if isinstance(operation, op.Store):
        return op.Write if operation.mark is not None else None
    return None if isinstance(operation, HARMLESS) else type(operation)


@dataclass
class Fault:
    """Fails operation number *at* of those that begin while it is armed, and if *for_good* those of its kind after.

    Of a write of data half gets through: a short transfer that could not be carried on. A host that *spares_data* is
    full, and data has its place: no write of it fails after the first operation that did.
    """

    code: int
    at: int
    for_good: bool = False
    spares_data: bool = False
    is_untried: bool = False  # the host lacked something before it began
    armed: bool = False
    seen: list[type[op.Operation]] = field(default_factory=list)  # what could have failed
    hit: op.Operation | None = None

    def __call__(self, operation: op.Operation) -> OSError | None:
        kind = kind_of(operation)
        if not self.armed or kind is None:
            return None
        self.seen.append(kind)
        if self.code == errno.ENOSPC and kind not in NEEDS_SPACE:
            return None
        again = self.for_good and self.hit is not None and kind_of(self.hit) is kind
        if self.spares_data and isinstance(operation, op.Write) and operation.data:
            again = False
        if len(self.seen) != self.at and not again:
            return None
        self.hit = operation
        if self.is_untried:
            return NotTried(self.code, "as told")
        if isinstance(operation, op.Write) and operation.data:
            content = b"".join(map(piece_bytes, operation.pieces))
            simulated(operation.file).write(operation.host_offset, content[: len(content) // 1024 * SECTOR])
        return OSError(self.code, "as told")

    def __str__(self) -> str:
        hit = type(self.hit).__name__ if self.hit else "nothing"
        return f"{errno.errorcode[self.code]}{' for good' if self.for_good else ''} at operation {self.at} ({hit})"

    @contextmanager
    def during(self) -> Iterator[None]:
        """Armed inside `with`."""
        self.armed = True
        try:
            yield
        finally:
            self.armed = False
