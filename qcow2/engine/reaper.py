"""The reaper: host clusters that lost a reference, on their way to being free (law 5).

A cluster comes here when nothing on the page cache's version of the disk leads to it any more. It is free once that
is stable and every transfer which may still touch it has ended; then it is punched, and only then counted down, so
that no late punch can hit whoever gets it next.
"""

import errno
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from qcow2.driver.operation import Grace, Signal, Spawn, Zero
from qcow2.engine.background import Background
from qcow2.engine.opened import Opened
from qcow2.engine.refcount import Refcounts
from qcow2.engine.uncounted import Uncounted
from qcow2.error import CorruptImage, no_memory
from qcow2.native import ffi

PUNCHES = 8  # at a time
STEP = 2048  # references taken at a time: requests go on in between
MAX_WAITING = 1 << 18  # clusters: with more the extent map frees no others, so that they do not fill our memory

Errors = list[BaseException | None]  # one, for which there is room


class Reaper:
    """One background task that releases whatever has gathered, batch by batch."""

    def __init__(self, opened: Opened, refcounts: Refcounts, uncounted: Uncounted) -> None:
        self.on_free: Callable[[int], None] = lambda cluster: None  # told the lowest that is free again
        self._file = opened.file
        self._geometry = opened.geometry
        self._refcounts = refcounts
        self._uncounted = uncounted
        self._stability = opened.stability
        self._statistics = opened.statistics
        self.freed: Any = ffi.new("struct freed *")  # what the extent map lets go of, while we are under way
        self.has_dropped = False  # clusters stay counted for want of space, memory or a sync
        self._waiting: list[int] = []
        self._releasing = Background(self._run, opened.stability)

    async def free(self, clusters: Iterable[int]) -> None:
        """Take one reference from each of *clusters* once that is safe; the link that led to them is gone.

        Returns at once.
        """
        self._waiting.extend(clusters)
        if self._gather():
            await self._releasing.begin()
        if len(self._waiting) > MAX_WAITING:
            self.freed.is_open = False

    def _gather(self) -> bool:
        """Take over what the extent map has freed meanwhile; whether anything waits."""
        freed = self.freed
        if freed.count:
            self._waiting.extend(ffi.unpack(freed.clusters, freed.count))
            freed.count = 0
        return bool(self._waiting)

    async def drain(self) -> None:
        """Wait until nothing waits to be freed."""
        await self._releasing.wait()

    async def _run(self) -> None:
        try:
            while self._gather() and self._stability.error is None:
                batch, self._waiting = self._waiting, []
                self.freed.is_open = True
                await self._try_to_release(batch)
        finally:
            self.freed.is_open = False

    async def _try_to_release(self, batch: list[int]) -> None:
        """Release *batch*; what lacks space or memory to be counted down is a leak, anything worse ends all writes."""
        try:
            await self._release(batch)
        except OSError:
            self.has_dropped = True  # or a sync or write that failed has ended all writes
        except MemoryError:
            self._stability.fail(no_memory())
        except (CorruptImage, OverflowError) as error:
            self._stability.fail(OSError(errno.EIO, str(error)))

    async def _release(self, batch: list[int]) -> None:
        await self._stability.sync()
        await Grace()
        batch.sort()
        for start in range(0, len(batch), STEP):
            await self._count_down(batch[start : start + STEP])

    async def _count_down(self, clusters: list[int]) -> None:
        async with self._refcounts.mutex.hold():
            self._stability.require_trust()  # or what leads here may be in the file still
            if uncounted := await self._uncounted.among(clusters):
                clusters = [cluster for cluster in clusters if cluster not in uncounted]
            unused = await self._refcounts.last_references(clusters)
            await self._punch(unused)
            await self._refcounts.add(clusters, -1)
            if unused:
                self.on_free(unused[0])
            self._statistics.clusters_freed += len(unused)

    async def _punch(self, clusters: list[int]) -> None:
        """Give the space of *clusters* back, `PUNCHES` areas at a time.

        Whether they read as zeros is seen to when they are allocated.
        """
        areas = list(consecutive(clusters))
        queue, errors = iter(areas), Errors([None])
        beside = [Signal() for _ in areas[1:PUNCHES]]
        for ended in beside:
            await Spawn(self._punch_some(queue, errors, ended))
        await self._punch_some(queue, errors, Signal())
        for ended in beside:
            await ended.wait()
        if errors[0] is not None:
            raise errors[0]

    async def _punch_some(self, areas: Iterator[range], errors: Errors, ended: Signal) -> None:
        """What is left of *areas*, which others take from as well."""
        bits = self._geometry.cluster_bits
        try:
            for area in areas:
                await Zero(self._file, area.start << bits, len(area) << bits)
        except OSError:
            pass  # the host keeps the space of all that is left, nothing else is lost
        except GeneratorExit:
            raise
        except BaseException as error:  # raised when no other one is under way
            errors[0] = error
        finally:
            for _ in areas:
                pass  # without a list, for which there may be no memory
            ended.set()


def consecutive(clusters: Iterable[int]) -> Iterator[range]:
    """The runs that *clusters*, in any order, form."""
    first = last = None
    for cluster in sorted(clusters):
        if first is None or last is None:
            first = cluster
        elif cluster != last + 1:
            yield range(first, last + 1)
            first = cluster
        last = cluster
    if first is not None and last is not None:
        yield range(first, last + 1)
