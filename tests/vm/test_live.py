"""A guest that writes and verifies, while its disk is frozen, copied and committed, and its daemons are killed.

`make live` does that for LIVE_MINUTES, ten without it; after each thing that was done every file of the chain is
checked, by this system's QEMU and by that of JUDGE_BIN, a directory.
"""

import os
import random
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from guest import Backend, Guest, vhost_user_disk

import qcow2
from qcow2.node.chain import chain_paths
from qcow2.node.extent import Extent
from tests.kill.round import wait_for_the_kernel
from tests.patience import TIMEOUT
from tests.vm.conftest import Boot, Serve
from tests.vm.test_reconnect import job, wait_until_at_work, wait_until_connected
from tests.vm.tool import make_image
from vhost import Control, ControlError

MINUTES = float(os.environ.get("LIVE_MINUTES", "0"))
LEAKS = 3  # exit code of qemu-img check
CHUNK = 64 << 10  # of a backup
LEFT = ("frozen*", "copy*", "backup*", ".copy*", ".backup*", "*.old*", "*.committing*")  # what nobody may need
DEEP = 12  # files of a chain, after which it is made shorter


class Life:
    """One disk, its guest and its daemon now."""

    def __init__(self, image: Path, serve: Serve, stack: ExitStack, seed: int) -> None:
        self.image = image
        self.draw = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self._serve = serve
        self._stack = stack
        self._made = 0  # names that were given
        self._bitmap = ""
        self._backup = image  # the last one of that bitmap
        self.daemon = self.begin()

    def begin(self) -> Backend:
        cache = self.draw.choice(("writeback", "writethrough", "none"))
        daemon = self._serve(self.image, f"--cache={cache}", f"--control={self.image}.control")
        return self._stack.enter_context(daemon)

    def control(self) -> Control:
        return Control(f"{self.image}.control")

    def snapshot(self) -> None:
        with self.control() as control:
            options = {"extended_l2": self.draw.choice(("on", "off"))}
            control.snapshot(self._name("frozen"), carry_bitmaps=self.draw.random() < 0.7, options=options)

    def stream(self) -> None:
        self._job(lambda control: control.stream(rate=self.draw.choice((0, 4 << 20))).job)

    def commit(self) -> None:
        self._job(lambda control: control.commit(rate=self.draw.choice((0, 4 << 20))).job)

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
        self._judge(path)
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
        self.daemon.process.kill()
        self.daemon.process.wait()
        self.check(is_dead=True)
        self.daemon = self.begin()

    def kill_at_work(self) -> None:
        """In the midst of a snapshot or a job."""
        with self.control() as control:
            with suppress(ControlError):
                self._begin_slowly(control)
            killer = threading.Timer(self.draw.random() / 10, self.daemon.process.kill)
            killer.start()
            with suppress(ControlError):
                while True:
                    control.snapshot(self._name("frozen"), carry_bitmaps=True)
                    self.done["snapshot"] += 1
        killer.join()
        self.daemon.process.wait()
        self.check(is_dead=True)
        self.daemon = self.begin()

    def _begin_slowly(self, control: Control) -> None:
        match self.draw.choice(("stream", "commit", "mirror", "backup")):
            case "stream":
                control.stream(rate=1 << 20)
            case "commit":
                control.commit(rate=1 << 20)
            case "mirror":
                control.set_rate(control.mirror(self._name("copy"), rate=1 << 20).job, 0)
            case _:
                control.backup(self._name("backup"), rate=1 << 20)

    def restart(self) -> None:
        self.daemon.stop()
        self.check(is_dead=True)
        self.daemon = self.begin()

    def act(self, guest: Guest) -> None:
        """Do one thing, wait until the guest has gone on, and look at the files."""
        actions = [self.snapshot, self.stream, self.commit, self.commit_all, self.resize]
        actions += [self.mirror, self.backup, self.backup, self.bitmaps, self.kill, self.kill_at_work, self.restart]
        if len(self._chain()) > DEEP:
            actions = [self.stream]
        action = self.draw.choice(actions)
        try:
            action()
            self.done[action.__name__] += 1
        except ControlError as error:
            self.refused[f"{action.__name__}: {error}"] += 1
        wait_until_connected(guest, self.daemon)
        wait_until_at_work(guest, self.daemon)
        self.check(is_dead=False)

    def _chain(self, top: Path | None = None) -> list[Path]:
        return [Path(path) for path in chain_paths(str(top or self.image), "qcow2")]

    def check(self, *, is_dead: bool) -> None:
        """Each file that nobody writes; those that nobody needs go."""
        chain = self._chain()
        with self.control() if not is_dead else ExitStack() as control:
            if isinstance(control, Control) and any(not known.has_ended for known in control.jobs()):
                return  # which writes to one of them
        needed = {*chain, *self._chain(self._backup)}
        for pattern in LEFT:
            for path in {*self.image.parent.glob(pattern)} - needed:
                path.unlink()
        for path in chain if is_dead else ():
            wait_for_the_kernel(path)
        for path in chain if is_dead else chain[1:]:
            self._judge(path, *([] if is_dead else ["-U"]))

    def _judge(self, path: Path, *options: str) -> None:
        for program in JUDGES:
            command = [program, "check", "-q", "-f", "qcow2", *options, path]
            judged = subprocess.run(command, capture_output=True, text=True, check=False)
            assert judged.returncode in (0, LEAKS), f"{path}: {judged.stdout}{judged.stderr}; {self.done}"


def assert_reported(before: Path, whole: Path, after: Path) -> None:
    """What differs between two backups a bitmap has reported by the next one, which is over the first."""
    with qcow2.open(before) as one, qcow2.open(whole) as other, qcow2.open(after) as top:
        own = [extent for extent in top.extents(0, top.size) if extent.depth == 0 and extent.is_present]
        reported = {chunk for extent in own for chunk in chunks_of(extent)}
        for chunk in range(min(one.size, other.size) // CHUNK):
            if chunk not in reported:
                pair = one.read(chunk * CHUNK, CHUNK), other.read(chunk * CHUNK, CHUNK)
                assert pair[0] == pair[1], f"{whole} differs from {before} at {chunk * CHUNK:#x}, not reported"


def chunks_of(extent: Extent) -> range:
    return range(extent.guest_offset // CHUNK, -(-(extent.guest_offset + extent.nbytes) // CHUNK))


JUDGES = ["/usr/bin/qemu-img", *([f"{directory}/qemu-img"] if (directory := os.environ.get("JUDGE_BIN")) else [])]


@pytest.mark.skipif(not MINUTES, reason="LIVE_MINUTES is not set: make live")
def test_guest_verifies_what_it_wrote_through_a_life_of_operations(boot: Boot, serve: Serve, tmp_path: Path) -> None:
    image = make_image(tmp_path / "disk.qcow2", "256M", "compat=1.1")
    seed = int(os.environ.get("LIVE_SEED", "0"))
    with ExitStack() as stack:
        life = Life(image, serve, stack, seed)
        disk = vhost_user_disk(life.daemon.socket_path, queues=2, packed=seed % 2 == 1, reconnect=1)
        guest = boot(job(2), [*disk, "-device", "virtio-rng-pci,id=flag,addr=1e.0"], cpus=2)
        with guest:
            wait_until_at_work(guest, life.daemon)
            ends_at = time.monotonic() + 60 * MINUTES
            while time.monotonic() < ends_at:
                life.act(guest)
            guest.unplug("flag")
            result = guest.finish(TIMEOUT)
            life.daemon.stop()
        life.check(is_dead=True)
    rounds = sum("verified" in line for line in result.console if not line.startswith("+"))
    assert rounds
    print(f"{MINUTES:g} minutes, seed {seed}: {dict(life.done)}; {rounds} rounds of fio verified, 0 errors")
    print(f"refused: {dict(life.refused)}")
