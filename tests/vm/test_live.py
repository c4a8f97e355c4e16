"""A guest that writes and verifies, while its disk is frozen, copied and committed, it moves, and its daemons die.

`make live` does that for LIVE_MINUTES, ten without it; after each thing that was done every file of the chain is
checked, by this system's QEMU and by that of JUDGE_BIN, a directory.
"""

import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from qcow2.node.chain import chain_paths
from tests.kill.round import wait_for_the_kernel
from tests.patience import TIMEOUT
from tests.vm.conftest import Boot, Serve
from tests.vm.judges import assert_reported, assert_sound
from tests.vm.sides import Sides
from tests.vm.test_reconnect import job, wait_until_at_work, wait_until_connected
from tests.vm.tool import make_image
from vhost import Control, ControlError
from vhost.client import Job

MINUTES = float(os.environ.get("LIVE_MINUTES", "0"))
LEFT = ("frozen*", "copy*", "backup*", ".copy*", ".backup*", "*.old*", "*.committing*")  # what nobody may need
DEEP = 12  # files of a chain, after which it is made shorter


class Life:
    """One disk, and what is done to it."""

    def __init__(self, image: Path, serve: Serve, boot: Boot, stack: ExitStack, seed: int) -> None:
        self.image = image
        self.draw = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self._made = 0  # names that were given
        self._bitmap = ""
        self._backup = image  # the last one of that bitmap
        self.sides = Sides(image, serve, boot, stack, self._options)
        self.control = self.sides.control
        self.sides.boot(job(2), queues=2, packed=seed % 2 == 1)

    def _options(self) -> list[str]:
        return [f"--cache={self.draw.choice(('writeback', 'writethrough', 'none'))}"]

    def snapshot(self) -> None:
        with self.control() as control:
            options = {"extended_l2": self.draw.choice(("on", "off"))}
            control.snapshot(self._name("frozen"), carry_bitmaps=self.draw.random() < 0.7, options=options)

    def stream(self) -> None:
        self._job(lambda control: control.stream(rate=self.draw.choice((0, 4 << 20))).job)

    def commit(self) -> None:
        self._job(lambda control: control.commit(self._base(), rate=self.draw.choice((0, 4 << 20))).job)

    def commit_all(self) -> None:
        self._job(lambda control: control.commit(active=True).job)

    def mirror(self) -> None:
        """To be served from then on, or left."""
        with self.control() as control:
            number = control.mirror(self._name("copy")).job
            assert control.wait(number).state == "ready"
            if self.draw.random() < 0.7:
                control.complete(number)
                assert control.wait(number).state == "completed"
                self._bitmap = ""
            else:
                control.cancel(number)
                assert control.wait(number).state == "cancelled"

    def backup(self) -> None:
        """By a bitmap over the backup before; or, where there is none, a new bitmap and the first one."""
        with self.control() as control:
            there = [each.name for each in control.bitmaps]
            if self._bitmap not in there or len(self._chain(self._backup)) > DEEP:
                self._bitmap = self._name("bitmap")
                control.bitmaps.change(
                    {"action": "add", "name": self._bitmap}, *({"action": "remove", "name": name} for name in there)
                )
                self._backup = self._back_up(control)
                return
            before, whole = self._backup_by_bitmap(control), self._back_up(control)
            self._backup_by_bitmap(control)
        assert_reported(before, whole, self._backup)

    def _backup_by_bitmap(self, control: Control) -> Path:
        self._backup = self._back_up(control, bitmap=self._bitmap, backing=self._backup.name)
        return self._backup

    def _back_up(self, control: Control, **options: str) -> Path:
        path = self.image.with_name(self._name("backup"))
        ended = control.wait(control.backup(path.name, **options).job)
        assert ended.state == "completed", ended
        assert_sound(path)
        return path

    def bitmaps(self) -> None:
        """What the bitmap reports goes to another one, which takes its place."""
        with self.control() as control:
            if self._bitmap in [each.name for each in control.bitmaps]:
                other, self._bitmap = self._bitmap, self._name("bitmap")
                control.bitmaps.change(
                    {"action": "add", "name": self._bitmap},
                    {"action": "merge", "name": self._bitmap, "source": other},
                    {"action": "remove", "name": other},
                )

    def _name(self, kind: str) -> str:
        self._made += 1
        return f"{kind}{self._made}"

    def _job(self, start: Callable[[Control], int]) -> None:
        with self.control() as control:
            number = start(control)
            if self.draw.random() < 0.2:
                control.cancel(number)
            ended = control.wait(number)
            assert ended.state in ("completed", "cancelled"), ended

    def resize(self) -> None:
        with self.control() as control:
            control.resize(int(control.status()["size"]) + (1 << 20))

    def kill(self) -> None:
        self.sides.daemon.process.kill()
        self.sides.daemon.process.wait()
        self.check(is_dead=True)
        self.sides.begin()

    def kill_at_work(self) -> None:
        """In the midst of a snapshot or a job."""
        with self.control() as control:
            with suppress(ControlError):
                self._begin_slowly(control)
            killer = threading.Timer(self.draw.random() / 10, self.sides.daemon.process.kill)
            killer.start()
            with suppress(ControlError):
                while True:
                    control.snapshot(self._name("frozen"), carry_bitmaps=True)
                    self.done["snapshot"] += 1
        killer.join()
        self.sides.daemon.process.wait()
        self.check(is_dead=True)
        self.sides.begin()

    def _begin_slowly(self, control: Control) -> int:
        match self.draw.choice(("stream", "commit", "mirror", "backup")):
            case "stream":
                return control.stream(rate=1 << 20).job
            case "commit":
                return control.commit(self._base(), rate=1 << 20).job
            case "mirror":
                return control.set_rate(control.mirror(self._name("copy"), rate=1 << 20).job, 0).job
            case _:
                return control.backup(self._name("backup"), rate=1 << 20).job

    def restart(self) -> None:
        self.sides.daemon.stop()
        self.check(is_dead=True)
        self.sides.begin()

    def migrate(self) -> None:
        """To another QEMU, on the daemon that it came from or a new one, or nearly; half the time beside a job."""
        begun = 0
        if self.draw.random() < 0.5:
            self.snapshot()  # or there may be nothing to stream or commit
            with self.control() as control:
                begun = self._begin_slowly(control)
        if self.draw.random() < 0.2:
            self.sides.cancel(self.draw.choice(("active", "pre-switchover")))
            self.done["thought better of it"] += 1
        else:
            self.sides.move()
            self._look_at_what_waits(begun)
            if self.draw.random() < 0.5:
                self.sides.end_idle(kill=self.draw.random() < 0.5)
        self._end_jobs()

    def _look_at_what_waits(self, begun: int) -> None:
        """The job *begun* waits for the guest in the daemon that it has left; it fails if it is a backup."""
        with self.sides.idle_control() as control:
            control.subscribe("job")
            while begun and not ((left := control.job(begun)).has_ended or left.state == rest_of(left)):
                assert control.next_event(TIMEOUT) is not None, left
            if begun:
                self.done[f"left {left.kind} {left.state}"] += 1

    def _end_jobs(self) -> None:
        """Those that go on where the guest is now; it may be back."""
        with self.control() as control:
            for known in control.jobs():
                if not known.has_ended:
                    with suppress(ControlError):  # it has by now
                        control.set_rate(known.job, 0)
                    ended = control.wait(known.job)
                    if ended.state == "ready":
                        control.cancel(known.job)
                        ended = control.wait(known.job)
                    self.done[f"went on: {ended.kind} {ended.state} {ended.error}".strip()] += 1

    def act(self) -> None:
        """Do one thing, wait until the guest has gone on, and look at the files."""
        actions = [self.snapshot, self.stream, self.commit, self.commit_all, self.resize]
        actions += [self.mirror, self.backup, self.backup, self.bitmaps, self.kill, self.kill_at_work, self.restart]
        actions += [self.migrate, self.migrate, self.migrate]
        if len(self._chain()) > DEEP:
            actions = [self.stream]
        action = self.draw.choice(actions)
        try:
            action()
            self.done[action.__name__] += 1
        except ControlError as error:
            self.refused[f"{action.__name__}: {error}"] += 1
        wait_until_connected(self.sides.guest, self.sides.daemon)
        wait_until_at_work(self.sides.guest, self.sides.daemon)
        self.check(is_dead=False)

    def _chain(self, top: Path | None = None) -> list[Path]:
        return [Path(path) for path in chain_paths(str(top or self.image), "qcow2")]

    def _base(self) -> str | None:
        """Below what is frozen right under the image, if anything is."""
        return next((str(path) for path in self._chain()[2:]), None)

    def check(self, *, is_dead: bool) -> None:
        """Each file that nobody writes; those that nobody needs go."""
        chain = self._chain()
        with self.control() if not is_dead else ExitStack() as control:
            if isinstance(control, Control) and any(not known.has_ended for known in control.jobs()):
                return  # which writes to one of them
        self._clean({*chain, *self._chain(self._backup)})
        for path in chain if is_dead else ():
            wait_for_the_kernel(path)
        for path in chain if is_dead else chain[1:]:
            assert_sound(path, *([] if is_dead else ["-U"]))

    def _clean(self, needed: set[Path]) -> None:
        """The files that no disk needs; a job that waits for the guest may need them."""
        if self.sides.idle is not None:
            with self.sides.idle_control() as control:
                if any(not known.has_ended for known in control.jobs()):
                    return
        for pattern in LEFT:
            for path in {*self.image.parent.glob(pattern)} - needed:
                path.unlink()

    def finish(self) -> int:
        """Let the guest end, and both daemons -> how many rounds it has verified."""
        self.sides.guest.unplug("flag")
        result = self.sides.guest.finish(TIMEOUT)
        self.sides.daemon.stop()
        if self.sides.idle is not None:
            self.sides.end_idle(kill=False)
        self.check(is_dead=True)
        return max(int(line.split()[1]) for line in result.console if re.fullmatch(r"verified \d+", line))


def rest_of(job: Job) -> str:
    """How it stands with a job whose daemon the guest has left."""
    return "failed" if job.kind == "backup" else "waiting"


@pytest.mark.skipif(not MINUTES, reason="LIVE_MINUTES is not set: make live")
def test_guest_verifies_what_it_wrote_through_a_life_of_operations(boot: Boot, serve: Serve, tmp_path: Path) -> None:
    image = make_image(tmp_path / "disk.qcow2", "256M", "compat=1.1")
    seed = int(os.environ.get("LIVE_SEED", "0"))
    with ExitStack() as stack:
        life = Life(image, serve, boot, stack, seed)
        wait_until_at_work(life.sides.guest, life.sides.daemon)
        ends_at = time.monotonic() + 60 * MINUTES
        while time.monotonic() < ends_at:
            life.act()
        rounds = life.finish()
    print(f"{MINUTES:g} minutes, seed {seed}: {dict(life.done)}; {rounds} rounds of fio verified, 0 errors")
    print(f"refused: {dict(life.refused)}")
