"""A round: one image, daemons on it that are killed one after the other, the judgement after each and at the end."""

import fcntl
import os
import random
import select
import signal
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from qcow2.lock import is_of_the_dead
from tests.frontend import FrontEnd
from tests.kill import features, images
from tests.kill.images import NBYTES, Start
from tests.kill.ledger import Ledger
from tests.kill.load import Load
from tests.kill.throttle import Throttle
from tests.oracle import assert_same_bytes
from tests.program import TIMEOUT, Daemon, qcow2_tool

LEAK_MAX = 16 << 20  # bytes of one death: a run in use, one reserved ahead, one for copies, what was about to be freed
READ_NBYTES = 256 << 10
AIO = ("auto", "auto", "threads")


class Corrupt(AssertionError):
    """A check found what no death may leave."""


@dataclass
class Tally:
    """What was done and found."""

    kills: int = 0
    at_start: int = 0  # of them, while the image was opened or repaired
    at_stop: int = 0  # of them, while it was being closed
    acknowledged: int = 0  # requests
    in_flight: int = 0  # requests, at the kills
    outlived: int = 0  # kills after which the slow disk still held transfers when it went on
    leaked: int = 0  # clusters, the most in one image
    lost: int = 0  # rounds that failed
    corrupt: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        sums = {field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        return Tally(**{**sums, "leaked": max(self.leaked, other.leaked)})


class Round:
    """Kills *kills* daemons on one image; everything is drawn from *seed*.

    With *slow* the disk hardly gets on with the last writes before a kill, the next daemon starts at once, and some
    time later the disk goes on.
    """

    requests = (100, 1000)  # before a kill, fewer than one of them

    def __init__(
        self, directory: Path, kind: str, cache: str, *, seed: int, kills: int, slow: Throttle | None = None
    ) -> None:
        self.tally = Tally()
        self._draw = random.Random(f"{seed} {kind} {cache}")
        make = features.make if kind in features.FEATURES else images.make
        self._start: Start = make(kind, directory, self._draw, NBYTES)
        self._ledger = Ledger(self._start.contents)
        self._options = [f"--cache={cache}", "--num-queues=4", f"--aio={self._draw.choice(AIO)}", *self._start.options]
        self._kills = kills
        self._slow = slow
        self._holding: threading.Timer | None = None  # ends the holding

    def run(self) -> None:
        """Raises: Lost, Corrupt, AssertionError."""
        while self.tally.kills < self._kills:
            self._die_at_work()
            while self._draw.random() < 0.25:
                self._die_at_start()
            self._recover()
        self._await_disk()

    def _daemon(self) -> Daemon:
        return Daemon(self._start.path, *self._options, under=self._slow.under if self._slow else ())

    def _die_at_work(self) -> None:
        """Serve a load until the daemon is killed in the middle of it."""
        queues = self._draw.randint(1, 4)
        with self._daemon() as daemon, FrontEnd(daemon.socket_path, queues=queues) as guest, self._beside():
            load = Load(
                guest,
                self._ledger,
                self._draw,
                cluster_sectors=1 << self._start.cluster_bits - 9,
                depth=self._draw.choice((1, 4, 24, 48)),
            )
            load.run(self._draw.choice((1, *map(self._draw.randrange, self.requests))))
            self._hold()
            load.fill()
            for _ in range(self._draw.choice((0, 0, 1, 5, 50))):
                load.reap()
            if self._slow:
                ends_within(daemon, self._draw.uniform(0, 0.1))
            self._kill(daemon)
            load.reap()  # what it put into the used rings it acknowledged
            self.tally.acknowledged += load.acknowledged
            self.tally.in_flight += load.in_flight
        if not self._start.lazy and not self._slow:
            self._judge_image(links_wait=True)

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """What goes on until the daemon is dead."""
        yield

    def _hold(self) -> None:
        """Let the slow disk, if it is one, hold what is written from now on, for a time."""
        if self._slow is not None:
            self._await_disk()
            self._slow.hold()
            self._holding = threading.Timer(self._draw.uniform(0, 4), self._let_go)
            self._holding.start()

    def _let_go(self) -> None:
        assert self._slow is not None
        with self._start.path.open("r+b") as file:
            self.tally.outlived += is_of_the_dead(file.fileno(), str(self._start.path))
        self._slow.let_go()

    def _await_disk(self) -> None:
        """Return once nothing is held."""
        if self._holding is not None:
            self._holding.join()

    def _die_at_start(self) -> None:
        """Kill a daemon that opens, perhaps repairs, the image that another one left."""
        with self._daemon() as daemon:
            assert not ends_within(daemon, self._draw.uniform(0, 0.5)), "the daemon ended before it was killed"
            self._kill(daemon)
            self.tally.at_start += 1

    def _recover(self) -> None:
        """Open what is left as a user would, read all of it, close it, and let QEMU read it."""
        closed = False
        while not closed:
            with self._daemon() as daemon:
                with FrontEnd(daemon.socket_path) as guest:
                    self._ledger.settle(read_all(guest, len(self._ledger.contents)))
                closed = self._close(daemon)
            self._judge_image()
        assert_same_bytes(self._start.read(), self._ledger.contents)
        self._start.judge(self._ledger)

    def _close(self, daemon: Daemon) -> bool:
        """Ask it to end; now and then kill it while it does. Whether it was faster."""
        daemon.process.send_signal(signal.SIGTERM)
        if self._draw.random() < 0.25:
            ends_within(daemon, self._draw.uniform(0, 0.05))
            daemon.process.kill()
        status = daemon.process.wait(TIMEOUT)
        assert status in (0, -signal.SIGKILL), f"exit {status}"
        self.tally.kills += status != 0
        self.tally.at_stop += status != 0
        return status == 0

    def _kill(self, daemon: Daemon) -> None:
        daemon.kill(at_once=self._slow is not None or self._draw.random() < 0.5)
        self.tally.kills += 1

    def _judge_image(self, *, links_wait: bool = False) -> None:
        """No corruption, says QEMU, and so do we; what a death may leak is permitted.

        A cluster whose link waits in the log seems to leak, too. A lazy image leaks what was freed before its dirty
        bit was set: no repair follows.
        """
        for path in self._start.paths:
            wait_for_the_kernel(path)
        code, report = self._start.check()
        leaks = int(report.get("leaks", 0))
        limit = self.tally.kills * LEAK_MAX >> self._start.cluster_bits
        if code not in (0, 3) or (leaks > limit and not links_wait):
            raise Corrupt(f"qemu-img check: exit {code}, {report}")
        ours = qcow2_tool("check", self._start.path)
        if ours.returncode != code:
            raise Corrupt(f"qcow2 check: exit {ours.returncode} where qemu-img says {code}: {ours.stdout}{ours.stderr}")
        if not links_wait:
            self.tally.leaked = max(self.tally.leaked, leaks)


def ends_within(daemon: Daemon, seconds: float) -> bool:
    """Whether the process ends by itself in that time."""
    ended = os.pidfd_open(daemon.process.pid)
    try:
        return bool(select.select([ended], [], [], seconds)[0])
    finally:
        os.close(ended)


def wait_for_the_kernel(path: Path) -> None:
    """A dead process's last transfers end after it, and its locks with them."""
    with path.open("r+b") as file:
        fcntl.fcntl(file, fcntl.F_OFD_SETLKW, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))


def read_all(guest: FrontEnd, nbytes: int) -> bytes:
    """The whole disk, through the rings."""
    return b"".join(guest.read(start, min(READ_NBYTES, nbytes - start)) for start in range(0, nbytes, READ_NBYTES))
