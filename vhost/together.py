"""Several disks at one instant: the snapshot of each goes on step by step, as the client of all their daemons says.

It stops when the overlay is made, when requests wait, and when the overlay has its name; up to then it can be called
off, and the disk goes on as it was. Who waits in vain for the client calls it off by himself: the guest waits, too. So
does who has to end meanwhile.
"""

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from time import monotonic

from ring.thread import start_deaf
from vhost.device import die
from vhost.endpoint import is_stopping
from vhost.snapshot import Pace, SnapshotRefused, SnapshotUnstable

PATIENCE_SECONDS = 10.0
LOOK_SECONDS = 0.1  # between two looks at whether we are to end

Take = Callable[[str, Pace], str]


class Steps(Pace):
    """A snapshot on a thread of its own; `begin`, then `go_on` until that says how it ended. For one other thread."""

    stops = True

    def __init__(self, take: Take, name: str, stop_fd: int) -> None:
        """It is called off once *stop_fd* is readable."""
        self.name = name
        self._stop_fd = stop_fd
        self._said: SimpleQueue[bool] = SimpleQueue()
        self._heard: SimpleQueue[str | Exception | None] = SimpleQueue()  # None: at a step
        self._thread = threading.Thread(target=self._main, args=(take,), name="snapshot", daemon=True)

    def stop(self) -> None:
        self._heard.put(None)
        deadline = monotonic() + PATIENCE_SECONDS
        while (may_go_on := self._hear_client()) is None:
            if is_stopping(self._stop_fd):
                raise SnapshotRefused("the daemon is ending")
            if monotonic() > deadline:
                raise SnapshotRefused(f"nobody said within {PATIENCE_SECONDS:g} s that it may go on")
        if not may_go_on:
            raise SnapshotRefused("it was called off")

    def _hear_client(self) -> bool | None:
        """Whether it may go on; None if nothing was said for a while."""
        try:
            return self._said.get(timeout=LOOK_SECONDS)
        except Empty:
            return None

    def _main(self, take: Take) -> None:
        try:
            self._heard.put(take(self.name, self))
        except (SnapshotRefused, SnapshotUnstable, RuntimeError, MemoryError) as error:
            self._heard.put(error)
        except BaseException as error:  # a bug of ours: nobody would be heard any more
            die(error)

    @property
    def is_over(self) -> bool:
        """Whether it has ended, however."""
        return not self._thread.is_alive()

    def begin(self) -> None:
        """Return at the first step. Raises: OSError without a thread; SnapshotRefused."""
        start_deaf(self._thread)
        self._hear()

    def go_on(self) -> str | None:
        """Return at the next step; at the end what `Snapshots.take` returns.

        Raises: SnapshotRefused, SnapshotUnstable.
        """
        self._said.put(True)
        return self._hear()

    def _hear(self) -> str | None:
        heard = self._heard.get()
        if heard is not None:
            self._thread.join()
        if isinstance(heard, Exception):
            raise heard
        return heard

    def call_off(self) -> None:
        """Return once the disk goes on as it was, or as it is if it is too late."""
        self._said.put(False)
        self._thread.join()
