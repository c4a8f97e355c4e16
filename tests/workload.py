"""Random work on a disk, applied to a model in a bytearray beside the real thing; a seed replays it."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from tests.oracle import assert_same_bytes

SECTOR = 512


class Disk(Protocol):
    """What a workload needs of the library's synchronous face."""

    def read(self, guest_offset: int, nbytes: int, /) -> bytes: ...
    def write(self, guest_offset: int, data: bytes, /) -> None: ...
    def write_zeroes(self, guest_offset: int, nbytes: int, /, *, unmap: bool) -> None: ...
    def discard(self, guest_offset: int, nbytes: int, /) -> None: ...
    def flush(self) -> None: ...


@dataclass(frozen=True)
class Step:
    """One operation; data is drawn from *seed* so that a step prints short."""

    kind: Literal["write", "zero", "unmap", "discard", "flush", "read"]
    guest_offset: int = 0
    nbytes: int = 0
    seed: int = 0

    def data(self) -> bytes:
        return random.Random(self.seed).randbytes(self.nbytes)


def random_steps(rng: random.Random, *, size: int, cluster_size: int, count: int) -> Iterator[Step]:
    """Steps that like cluster borders, whole clusters, single sectors and the ends of the disk."""
    kinds = ("write", "write", "write", "write", "zero", "unmap", "discard", "flush", "read")
    for _ in range(count):
        start, nbytes = _range(rng, size, cluster_size)
        yield Step(rng.choice(kinds), start, nbytes, rng.getrandbits(32))  # type: ignore[arg-type]


def _range(rng: random.Random, size: int, cluster_size: int) -> tuple[int, int]:
    longest = min(size, 3 * cluster_size + 64 * SECTOR, 256 * SECTOR if cluster_size <= 65536 else 3 * cluster_size)
    nbytes = rng.choice([SECTOR, 8 * SECTOR, cluster_size, 2 * cluster_size, rng.randrange(SECTOR, longest)])
    nbytes = max(min(nbytes, size) // SECTOR * SECTOR, SECTOR)
    start = rng.choice(
        [
            rng.randrange(size),
            rng.randrange(size) // cluster_size * cluster_size,
            rng.randrange(size) // cluster_size * cluster_size + cluster_size - SECTOR,
            rng.randrange(min(size, 8 * cluster_size)),
            size - nbytes,
            0,
        ]
    )
    return min(start // SECTOR * SECTOR, size - nbytes), nbytes


class Model:
    """What the disk must read as; a discarded sector may keep its bytes or read as zeros, so the disk is asked."""

    def __init__(self, contents: bytes) -> None:
        self.contents = bytearray(contents)

    def apply(self, step: Step, disk: Disk) -> None:
        """Do *step* on both; reads are compared on the way."""
        start, end = step.guest_offset, step.guest_offset + step.nbytes
        match step.kind:
            case "write":
                disk.write(start, step.data())
                self.contents[start:end] = step.data()
            case "zero" | "unmap":
                disk.write_zeroes(start, step.nbytes, unmap=step.kind == "unmap")
                self.contents[start:end] = bytes(step.nbytes)
            case "discard":
                disk.discard(start, step.nbytes)
                self._adopt_discarded(start, bytes(disk.read(start, step.nbytes)))
            case "flush":
                disk.flush()
            case "read":
                assert_same_bytes(bytes(disk.read(start, step.nbytes)), self.contents[start:end])

    def _adopt_discarded(self, start: int, now: bytes) -> None:
        for offset in range(0, len(now), SECTOR):
            sector = now[offset : offset + SECTOR]
            old = self.contents[start + offset : start + offset + SECTOR]
            if sector != old:
                assert sector == bytes(SECTOR), f"discard at {start + offset:#x} shows neither the old bytes nor zeros"
                self.contents[start + offset : start + offset + SECTOR] = sector
