"""The queues of a worker, as Python knows them: what the front-end says of each, and what C tells of it."""

from collections.abc import Callable
from typing import Any

from ring.inflight import InflightRegion
from ring.memory import Mapping, MemoryRegion
from ring.native import NULL, Pointer, check, ffi, lib
from ring.virtqueue import QueueLayout


class Queues:
    """The half of a `Worker` that its front-end asks for. All methods are for the worker thread."""

    _native: Pointer

    def __init__(self, on_broken: Callable[[int, str], None] | None) -> None:
        self._on_queue_broken = on_broken
        self._queues: set[int] = set()  # that have a ring
        self._draining: dict[int, Callable[[int], None]] = {}
        self._disabling: dict[int, list[Callable[[], None]]] = {}
        self._log: Mapping | None = None
        self._inflight: Mapping | None = None

    def set_inflight(self, region: InflightRegion | None) -> None:
        """Track what queues that start from now on have in flight in *region*, or not at all.

        What a region says was left in flight is served first. One that contradicts itself breaks its queue; a queue
        for which it has no room is served without.
        Raises: OSError if it cannot be mapped or has no queues, EBUSY while a queue is started.
        """
        mapping = None if region is None else Mapping(region.memory())
        try:
            address: Any = NULL if mapping is None else mapping.address
            nbytes, num_queues = (0, 0) if region is None else (region.nbytes, region.num_queues)
            check(lib.worker_set_inflight(self._native, address, nbytes, num_queues), "in-flight region")
        except OSError:
            if mapping is not None:
                mapping.close()
            raise
        if self._inflight is not None:
            self._inflight.close()
        self._inflight = mapping

    def start_queue(self, index: int, layout: QueueLayout) -> bool:
        """Give a stopped queue its ring. It is served once it is also enabled and its kick is set.

        It is then looked at once, kicked or not. False: the in-flight region has no room for it; it is served without.
        Raises: OSError EINVAL for a size, an alignment or a base, EFAULT for an address outside guest memory, both
        after its err fd was signalled; EBUSY if it is started.
        """
        untracked = check(
            lib.worker_start_queue(
                self._native,
                index,
                layout.size,
                layout.descriptor_address,
                layout.driver_address,
                layout.device_address,
                layout.base,
                lib.RING_EVENT_IDX * layout.event_idx | lib.RING_PACKED * layout.packed,
            ),
            f"queue {index}: {layout}",
        )
        self._queues.add(index)
        return not untracked

    def set_kick(self, index: int, fd: int | None) -> None:
        """Take over *fd* as the queue's kick; None means the driver does not kick and the ring is polled.

        Raises: OSError EINVAL if *fd*, closed then, is a file or disk, which never makes anybody wait.
        """
        check(lib.worker_set_kick(self._native, index, -1 if fd is None else fd), f"kick of queue {index}")

    def set_call(self, index: int, fd: int | None) -> None:
        """Take over *fd* as the queue's call.

        Signalled once, now or when the queue starts: a completion may have raced with the change, or with the death of
        an earlier daemon. Not while the queue is stopped: a driver may not be there.
        Raises: OSError EINVAL, as `set_kick`.
        """
        check(lib.worker_set_call(self._native, index, -1 if fd is None else fd), f"call of queue {index}")

    def set_err(self, index: int, fd: int | None) -> None:
        """Take over *fd*, signalled if the queue breaks. Raises: OSError EINVAL, as `set_kick`."""
        check(lib.worker_set_err(self._native, index, -1 if fd is None else fd), f"err of queue {index}")

    def enable_queue(self, index: int) -> None:
        """Let the queue be served."""
        check(lib.worker_set_enabled(self._native, index, True), f"queue {index}")

    def disable_queue(self, index: int, done: Callable[[], None]) -> None:
        """Fetch nothing more; *done()* once nothing of the queue is in flight, or it is enabled again.

        From then on its ring is left untouched until it is enabled. *done* always comes later, never from within this
        call; other queues are served meanwhile.
        """
        check(lib.worker_set_enabled(self._native, index, False), f"queue {index}")
        self._disabling.setdefault(index, []).append(done)

    def set_log(self, log: MemoryRegion | None) -> None:
        """Set bits in *log*, one for 4096 bytes of guest memory, from now on; no more in the log before it.

        Raises: OSError if it cannot be mapped or its file is too short; the log before it then stays.
        """
        mapping = None if log is None else Mapping(log)
        lib.worker_set_log(self._native, NULL if mapping is None else mapping.native)
        if self._log is not None:
            self._log.close()
        self._log = mapping

    def set_log_call(self, fd: int | None) -> None:
        """Take over *fd*, signalled after bits were set in the log. Raises: OSError EINVAL, as `set_kick`."""
        check(lib.worker_set_log_call(self._native, -1 if fd is None else fd), "call of the log")

    def log_buffers(self, enabled: bool) -> None:
        """Whether what requests write to their buffers is logged, those in flight included."""
        lib.worker_log_buffers(self._native, enabled)

    def log_queue(self, index: int, guest_address: int | None) -> None:
        """Whether what is written to the queue's device area is logged, and as what; running or not."""
        enabled = guest_address is not None
        check(lib.worker_log_queue(self._native, index, enabled, guest_address or 0), f"log of queue {index}")

    def drain_queue(self, index: int, done: Callable[[int], None]) -> None:
        """Stop fetching, finish what is in flight, drop kick and call, then *done(base)*: the next available index.

        From then on the ring is not touched and nobody is signalled. *done* always comes later, never from within
        this call. A queue that was never started answers base 0.
        """
        check(lib.worker_drain_queue(self._native, index), f"queue {index}")
        self._draining[index] = done

    def _drained(self, index: int, base: int) -> None:
        self._queues.discard(index)
        self._draining.pop(index)(base)

    def _disabled(self, index: int) -> None:
        for done in self._disabling.pop(index, ()):
            done()

    def _broke(self, index: int) -> None:
        fault: Any = lib.worker_queue_fault(self._native, index)
        if self._on_queue_broken is not None:
            self._on_queue_broken(index, ffi.string(fault).decode())

    def _shared_memory(self) -> list[Mapping]:
        """What is mapped besides guest memory, ours to close."""
        return [mapping for mapping in (self._log, self._inflight) if mapping is not None]
