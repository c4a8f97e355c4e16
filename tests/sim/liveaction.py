"""Somebody who works on a served disk: snapshots, jobs and actions on bitmaps, one after the other, drawn from a seed.

One job is under way at a time, and no snapshot meanwhile; bitmap actions may come in between. What each promises, and
from when on, is noted in a `Ledger`.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from qcow2.driver.task import Task
from qcow2.error import ImageError
from qcow2.job.pace import Cancelled
from qcow2.job.reins import Reins
from ring.native import lib
from tests.sim.kernel import MS, US, Kernel
from tests.sim.livehost import AttachedDevice, LiveChain, LiveHost, OneThread
from tests.sim.liveledger import Copy, Frozen, Kept, Ledger
from tests.sim.trouble import Violation
from vhost.backup import Backup
from vhost.committing import Committing
from vhost.disk import ImageBackend
from vhost.frozen import Saved
from vhost.imagecommands import ImageCommands, ImageRefused
from vhost.job import RoomWanted, Work
from vhost.mirroring import Mirroring
from vhost.overlaybitmaps import OverlayBitmaps
from vhost.overlaywish import OverlayWish
from vhost.policy import BitmapMode
from vhost.snapshot import Pace as NoPace
from vhost.snapshot import Snapshots
from vhost.streaming import Streaming

THEMES = {
    "chain": ("snapshot", "snapshot", "stream", "commit"),
    "backup": ("backup", "backup", "bitmap", "snapshot"),
    "nightly": ("bitmap", "backup", "backup", "backup"),  # of what has changed, once there is a whole one
    "mirror": ("mirror", "mirror", "snapshot", "bitmap"),
    "all": ("snapshot", "stream", "commit", "backup", "mirror", "bitmap"),
}
BESIDE = ("bitmap",)  # a job
GRANULARITIES = (512, 4096, 16384)


class Operator:
    """Works on *host*, which is under *device* as *backend*, on *worker*."""

    def __init__(
        self,
        kernel: Kernel,
        ledger: Ledger,
        worker: OneThread,
        backend: ImageBackend,
        device: AttachedDevice,
        host: LiveHost,
    ) -> None:
        self._kernel = kernel
        self._draw = kernel.random
        self._ledger = ledger
        self._worker = worker
        self._backend = backend
        self._host = host
        self._snapshots = Snapshots(device, backend, host)
        self._served = LiveChain(device, backend, host)
        self._commands = ImageCommands(device, backend, host, lambda: None)
        self._due: deque[str] = deque()
        self._left = 0  # that are not due yet
        self._is_at_job = False
        self._reins: Reins | None = None  # of the job, while it is under way
        self._is_behind = False
        self._whole_at = 0  # the target of the last backup
        self._only_top = False  # is mirrored
        self._carries = False  # the next overlay has the bitmaps of what is frozen
        device.on_alone = self._make_room
        host.on_frozen = self._note_frozen
        self._freeze, backend.freeze = backend.freeze, self._note_moment  # type: ignore[method-assign]

        self._actions: dict[str, Callable[[], str]] = {
            "snapshot": self._snapshot,
            "bitmap": self._change_bitmaps,
            "stream": self._stream,
            "commit": self._commit,
            "mirror": self._mirror,
            "backup": self._back_up,
        }

    def plan(self) -> None:
        """Draw what is done, and when."""
        theme = THEMES[self._draw.choice([*THEMES])]
        delay = 0
        for _ in range(self._draw.randrange(2, 6)):
            delay += self._draw.randrange(50 * US, 1500 * US)
            self._left += 1
            self._kernel.at(delay, partial(self._call, self._draw.choice(theme)))

    def _call(self, name: str) -> None:
        self._left -= 1
        self._due.append(name)
        self._wake()

    def _wake(self) -> None:
        lib.sim_raise(self._worker.control_fd)

    @property
    def is_done(self) -> bool:
        return not self._left and not self._due

    def step(self) -> None:
        """Do what is due, or let the worker go on."""
        name = next((name for name in self._due if not self._is_at_job or name in BESIDE), None)
        if name is None:
            self._worker.turn()
            return
        self._due.remove(name)
        done, index = self._ledger.done, len(self._ledger.done)
        done.append(name)
        done[index] += self._actions[name]()

    @property
    def _top(self) -> str:
        return str(self._host.disk.files[0].path)

    def _now(self) -> int:
        return len(self._kernel.journal)

    # at once

    def _snapshot(self) -> str:
        self._carries = self._draw.random() < 0.5
        given = {"extended_l2": "off"} if self._draw.random() < 0.5 else {}
        wish = OverlayWish(OverlayBitmaps(are_carried=self._carries), given)
        failure = self._snapshots.take(self._top, NoPace(), wish)
        if failure:
            raise Violation(f"snapshot: {failure}")
        return ""

    def _note_frozen(self, past: str) -> None:
        """An overlay over *past* is served from now on."""
        self._ledger.frozen.append(Frozen(past, self._now()))
        if self._carries:
            self._ledger.carry(past, self._top)

    def _change_bitmaps(self) -> str:
        began, known = self._now(), self._ledger.bitmaps_of(self._top)
        name, grain = f"bitmap{began}", self._draw.choice(GRANULARITIES)
        actions: list[dict[str, Any]] = [{"action": "add", "name": name, "granularity": grain}]
        old = self._draw.choice(known) if known else None
        kind = self._draw.choice(("add", "remove", "clear", "rotate")) if old else "add"
        if old and kind == "rotate":
            actions += [{"action": "merge", "name": name, "source": old.name}, {"action": "clear", "name": old.name}]
        elif old and kind != "add":
            actions = [{"action": kind, "name": old.name}]
        try:
            self._commands.bitmap_change(actions)
        except ImageRefused:
            return " refused"
        self._note_bitmaps(kind, name, old, began, grain)
        return f" {kind}"

    def _note_bitmaps(self, kind: str, name: str, old: Kept | None, began: int, grain: int) -> None:
        now = self._now()
        if old and kind != "add":
            old.last = began
        if old and kind in ("clear", "rotate"):
            self._ledger.bitmaps.append(Kept(self._top, old.name, now, began, old.grain, first=now))
        if kind == "add":
            self._ledger.bitmaps.append(Kept(self._top, name, now, began, grain, first=now))
        if old and kind == "rotate":
            coarser = max(grain, old.grain)
            self._ledger.bitmaps.append(Kept(self._top, name, old.covers, old.exact, coarser, first=now))

    # jobs

    def _stream(self) -> str:
        return self._work(lambda: Streaming(self._served, self._some_base()))

    def _commit(self) -> str:
        self._ledger.has_committed = True
        is_active = self._draw.random() < 0.3
        self._carries = True
        base = self._some_base() or (None if is_active else self._second_below())
        return self._work(lambda: Committing(self._served, base, is_active=is_active))

    def _second_below(self) -> str | None:
        """Under the file that is frozen right under the image, if one is."""
        disk = self._served.held.disk
        return None if disk is None else next((file.path for file in disk.chain.files[2:]), None)

    def _some_base(self) -> str | None:
        return self._draw.choice([None, None, *(file.path for file in self._host.every_file)])

    def _mirror(self) -> str:
        self._only_top = self._draw.random() < 0.3
        name = f"copy{self._now()}"
        return self._work(lambda: Mirroring(self._served, name, None, only_top=self._only_top, is_existing=False))

    def _back_up(self) -> str:
        bitmaps = self._ledger.bitmaps_of(self._top)
        bitmap = self._draw.choice(bitmaps) if bitmaps and self._draw.random() < 0.7 else None
        base = bitmap and self._ledger.backup_before(bitmap)
        name = f"backup{self._now()}"
        if bitmap is None or base is None:
            bitmap = base = None

        def begin() -> Backup:
            work = Backup(
                self._served,
                name,
                "qcow2",
                exists=False,
                bitmap=bitmap and bitmap.name,
                bitmap_mode=BitmapMode.ON_SUCCESS,
                backing=base and base.path,
            )
            target: Any = work._target
            target.on_whole = self._note_whole
            self._ledger.begin_copy(name, self._ledger.moment)
            return work

        told = self._work(begin)
        if told:
            return told
        copy = self._ledger.end_copy(name, self._now())
        if bitmap is None:
            return ""
        self._ledger.forget(bitmap, copy.position, self._whole_at, self._now())
        return " of a bitmap"

    def _note_whole(self) -> None:
        self._whole_at = self._now()

    def _note_moment(self, frozen: Any) -> None:
        self._freeze(frozen)
        self._ledger.moment = self._now()
        frozen._give(Saved(0, 0, None))  # the target may be at work before the command goes on

    def _work(self, begin: Callable[[], Work]) -> str:
        """As a job's thread does; what is refused has changed nothing."""
        try:
            work = begin()
        except (ValueError, ImageError):
            return " refused"
        self._is_at_job = True
        try:
            return self._look_after(work)
        finally:
            self._is_at_job = False

    def _look_after(self, work: Work) -> str:
        work.on_behind = self._fall_behind
        while True:
            self._is_behind = False
            try:
                work.prepare()
                self._attempt(work)
                told = self._finish(work)
            except (Cancelled, RoomWanted):
                self._pass(self._draw.randrange(10 * US, 2 * MS))
            else:
                work.leave()
                return told

    def _attempt(self, work: Work) -> None:
        """Raises: what the job raises."""
        outcome: Future[BaseException | None] = Future()
        self._reins = reins = Reins()
        if self._draw.random() < 0.3:
            self._kernel.at(self._draw.randrange(20 * US, 2 * MS), lambda: self._cancel(reins))
        self._backend.run(work.begin(reins), lambda task: outcome.set_result(task.take_error()))
        while not outcome.done():
            self.step()
            if reins.is_cancelled:
                self._give_up(reins, work)
        self._reins = None
        error = outcome.result()
        if error is not None:
            raise error

    def _cancel(self, reins: Reins) -> None:
        reins.cancel()
        self._wake()

    def _make_room(self) -> None:
        """All that is under way will be awaited."""
        if self._reins is not None:
            self._reins.cancel()
            self._backend.run(self._reins.wake(), _raise)

    def _give_up(self, reins: Reins, work: Work) -> None:
        work.look()
        self._backend.run(reins.wake(), _raise)
        self._backend.go_on()

    def _fall_behind(self) -> None:
        self._is_behind = True

    def _finish(self, work: Work) -> str:
        """Raises: RoomWanted."""
        if not work.awaits_word:
            work.finish()
            return ""
        self._pass(self._draw.randrange(10 * US, 3 * MS))
        if self._is_behind:
            raise RoomWanted
        if self._draw.random() < 0.7:
            work.finish()
            return ""
        path = self._host.beside.files[0].path
        work.part()
        self._ledger.copies.append(Copy(path, self._now(), self._now(), True, self._only_top))
        return " left"

    def _pass(self, nanoseconds: int) -> None:
        """Let the guest go on for so long."""
        over: list[bool] = []

        def end() -> None:
            over.append(True)
            self._wake()

        self._kernel.at(nanoseconds, end)
        while not over:
            self.step()


def _raise(task: Task) -> None:
    error = task.take_error()
    if error is not None:
        raise error
