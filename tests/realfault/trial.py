"""One daemon's life on a host that fails: what must hold in it and after it (compare `tests.crash.life`).

A request fails if the host does, and no other way; reads go on; what was acknowledged is there, in this life and in the
next; after a failed sync, or a failed write of metadata, no later one reports success; a lack of space is never final.
The daemon ends by itself in no case, and if it cannot end cleanly it says so.
"""

import errno
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

import qcow2
from tests.frontend import FLUSH, IOERR, OK, BackendGone, FrontEnd
from tests.kill.images import Start
from tests.kill.ledger import Ledger
from tests.kill.load import Load
from tests.kill.round import read_all
from tests.oracle import qemu_check
from tests.program import TIMEOUT, Daemon
from tests.realfault.host import CLOSE, NAMES, READ, SYNC, Fault, Host

REQUESTS = 40
PHASES = ("work", "open", "close")


class Broken(AssertionError):
    """Something that must hold does not."""


@dataclass(frozen=True)
class Setting:
    """What is served, how, and when the host fails: while the daemon works, opens the image, or closes it."""

    kind: str
    start: Start
    options: tuple[str, ...]
    depth: int
    phase: str
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.kind} {' '.join(self.options)} depth {self.depth} {self.phase}"


class Trial:
    """A life of *setting* in *directory*, which is empty, under *fault*."""

    def __init__(self, setting: Setting, fault: Fault, directory: Path) -> None:
        for path in setting.start.path.parent.iterdir():
            shutil.copy(path, directory)
        self.setting = setting
        self.image = directory / setting.start.path.name
        self.logs = directory / "logs"
        self.logs.mkdir()
        self.ledger = Ledger(setting.start.contents)
        self.draw = random.Random(setting.seed)
        self.host = Host(self.image, fault, directory / "told")
        self.failures = 0
        self.is_final = False

    def run(self) -> str:
        """Live; what became of it. Raises: Lost, Broken, AssertionError."""
        self.host.arm(self.setting.phase == "open")
        with self._daemon() as daemon:
            try:
                with FrontEnd(daemon.socket_path) as guest:
                    self.host.arm(False)
                    self._serve(guest)
            except (BackendGone, OSError) as error:
                if self.setting.phase != "open" or daemon.process.wait(TIMEOUT) != 1:
                    raise Broken(f"the connection ended: {error}") from error
            self._end(daemon)
        self._next_life()
        return "no more writes" if self.is_final else "requests failed" if self.failures else "nobody was hurt"

    def _daemon(self) -> Daemon:
        return Daemon(self.image, f"--link-log={self.logs}", *self.setting.options, under=self.host.under)

    def _serve(self, guest: FrontEnd) -> None:
        """Work under the fault, and then see what is left."""
        fault, setting = self.host.fault, self.setting
        load = Load(
            guest,
            self.ledger,
            self.draw,
            cluster_sectors=1 << setting.start.cluster_bits - 9,
            depth=setting.depth,
            may_fail=True,
        )
        self.host.arm(setting.phase == "work")
        load.run(REQUESTS)
        load.drain()
        self.failures = load.failed
        self.host.arm(fault.for_good and self.host.hit not in (0, READ))
        self.ledger.judge(read_all(guest, len(self.ledger.contents)))
        failed = guest.do(FLUSH).status == IOERR
        self.host.arm(False)  # the host is well again
        self.is_final = guest.do(FLUSH).status == IOERR
        self._require_honesty(failed)
        status = guest.do(FLUSH).status
        if (status == IOERR) != self.is_final:
            raise Broken("flushes disagree on whether writes have ended")
        wrote = self._write(guest)
        if wrote == self.is_final:
            raise Broken("a write and a flush disagree on whether writes have ended")
        self.ledger.judge(read_all(guest, len(self.ledger.contents)))
        self.host.arm(setting.phase == "close")  # the image is let go once the guest has left, and closed at the latest

    def _require_honesty(self, failed: bool) -> None:
        fault = self.host.fault
        if fault.code == errno.ENOSPC:
            if self.is_final:
                raise Broken("a lack of space was final")
            if failed and not fault.for_good:
                raise Broken("there is room, and a flush failed")
        elif failed != self.is_final:
            raise Broken("a later sync reports success" if failed else "a flush hides that writes have ended")
        if self.host.hit == SYNC and not self.is_final:
            raise Broken("a failed sync was hidden")
        if self.failures and not self.host.hit:
            raise Broken("requests failed on a host that did not")

    def _write(self, guest: FrontEnd) -> bool:
        content = self.ledger.draft(0, 1)
        self.ledger.begin(0, content)
        done = guest.do(1, 0, content)
        if done.status == OK:
            self.ledger.acknowledge(0, content)
        return done.status == OK

    def _end(self, daemon: Daemon) -> None:
        """It ends when it is told to, cleanly if it could, and says what is wrong if it could not."""
        fault = self.host.fault
        daemon.process.terminate()
        _, said = daemon.process.communicate(timeout=TIMEOUT)
        self.host.arm(False)
        status = daemon.process.returncode
        if status not in (0, 1) or "Traceback" in said:
            raise Broken(f"exit {status}: {said}")
        if status == 1 and not said:
            raise Broken("it failed without a word")
        is_harmless = self.host.hit == CLOSE or (fault.code == errno.ENOSPC and not fault.for_good)
        if self.setting.phase == "close" and is_harmless and status == 1:
            raise Broken(f"exit 1 though everything is stable: {said}")
        if self.setting.phase == "work" and (status == 1) != self.is_final:
            raise Broken(f"exit {status} though {'no more' if self.is_final else 'all'} writes: {said}")

    def _next_life(self) -> None:
        """Whoever opens the image next finds what was acknowledged, and leaves a sound image."""
        with qcow2.open(str(self.image), writable=True, log_directory=str(self.logs)) as disk:
            self.ledger.judge(disk.read(0, disk.size))
        code, report = qemu_check(self.image)
        if code not in (0, 3):
            raise Broken(f"qemu-img check: {report}")


def live(setting: Setting, fault: Fault, directory: Path) -> tuple[str, Host]:
    """A life in a new directory beneath *directory*; its outcome and its host. Raises: Broken."""
    place = Path(mkdtemp(dir=directory))

    trial = Trial(setting, fault, place)
    try:
        outcome = trial.run()
    except (AssertionError, OSError) as error:
        what = f"{setting}: {fault} ({NAMES[trial.host.hit]})"
        raise Broken(f"{what}: {type(error).__name__}: {error}; in {place}") from error
    shutil.rmtree(place)
    return outcome, trial.host
