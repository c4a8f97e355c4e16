"""Lives of a disk, drawn at random: snapshots, jobs of all kinds, resizes, restarts and SIGKILLs beside a guest."""

import random
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

import qcow2
from tests.frontend import FrontEnd
from tests.load import Load
from tests.oracle import assert_not_corrupt
from tests.program import Daemon, qcow2_tool_ok
from vhost import Control, ControlError

MIB = 1 << 20
BLOCK = 4096
NBLOCKS = 512
KINDS = ["", "lazy_refcounts=on", "extended_l2=on,cluster_size=128k", "cluster_size=4k"]
MODES = ["--cache=writeback", "--cache=writethrough", "--cache=none", "--aio=threads", "--sandbox"]


class Life:
    """One disk over a base, its guest, and what it must hold."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.top = directory / "top"
        self.history: list[str] = []
        self._serial = 0
        options = ["-o", kind] if (kind := self.rng.choice(KINDS)) else []
        qcow2_tool_ok("create", *options, directory / "base", str(2 * MIB))
        qcow2_tool_ok("create", "-b", "base", "-F", "qcow2", *options, self.top, str(4 * MIB))
        self._stack = ExitStack()
        self._begin()
        self.load = Load(self.guest, NBLOCKS, seed=seed, zeroes=True, base=bytes(4 * MIB))

    def _begin(self) -> None:
        mode = self.rng.choice(MODES)
        self.history.append(f"start {mode}")
        self.daemon = self._stack.enter_context(Daemon(self.top, f"--control={self.top}.control", mode))
        self.guest = self._stack.enter_context(FrontEnd(self.daemon.socket_path))
        self.client = self._stack.enter_context(Control(f"{self.top}.control"))

    def live(self, rounds: int) -> None:
        """Do what comes, and see what is left."""
        with self._stack:
            for _ in range(rounds):
                self.load.run(self.rng.randrange(1, 60))
                action = self.rng.choice(
                    [
                        self.snapshot,
                        self.stream,
                        self.commit,
                        self.mirror,
                        self.complete,
                        self.wait,
                        self.resize,
                        self.pause,
                        self.restart,
                    ]
                )
                self.history.append(action.__name__)
                with suppress(ControlError):  # what is refused has changed nothing
                    action()
                self._require_none_failed()
            self.load.drain()
            self._end()
        self._judge()

    def snapshot(self) -> None:
        self._serial += 1
        self.client.snapshot(f"frozen{self._serial}")

    def stream(self) -> None:
        self.client.stream(self._some_base(), rate=self.rng.choice([0, 0, MIB]))

    def commit(self) -> None:
        active = self.rng.random() < 0.5
        self.client.commit(self._some_base(), active=active, rate=self.rng.choice([0, 0, MIB]))

    def mirror(self) -> None:
        self._serial += 1
        name, rate = f"moved{self._serial}", self.rng.choice([0, 0, MIB])
        kind = self.rng.choice(["new", "top", "existing", "existing"])
        if kind == "existing":
            qcow2.create(self.top.with_name(name), len(self.load.base), preallocation="metadata")
        self.client.mirror(name, top=kind == "top", existing=kind == "existing", rate=rate)

    def _require_none_failed(self) -> None:
        """No mirror does by itself; one that is told to end while it is behind leaves no copy."""
        for job in self.client.jobs():
            is_told = job.error.endswith("no copy is left")
            assert job.kind != "mirror" or job.state != "failed" or is_told, (job, self.history)

    def complete(self) -> None:
        """Or leave the copy."""
        for job in self.client.jobs()[-1:]:
            self.client.set_rate(job.job, 0)
            while (now := self.client.job(job.job)).state != "ready" and not now.has_ended and now.kind == "mirror":
                self.load.run(5)
            (self.client.complete if self.rng.random() < 0.7 else self.client.cancel)(job.job)

    def _some_base(self) -> str | None:
        return self.rng.choice([None, "base", *(f"frozen{i + 1}" for i in range(self._serial))])

    def wait(self) -> None:
        for job in self.client.jobs()[-1:]:
            self.client.set_rate(job.job, 0)
            while not (now := self.client.job(job.job)).has_ended and now.state != "ready":
                self.load.run(5)

    def resize(self) -> None:
        size = self.client.resize(len(self.load.base) + MIB)
        self.load.base += bytes(size - len(self.load.base))

    def pause(self) -> None:
        self.load.drain()
        queue = self.guest.stop_queue()
        if self.rng.random() < 0.3:
            with suppress(ControlError):
                self.resize()
        self.guest.start_queue(queue)

    def restart(self) -> None:
        self.load.drain()
        self._end()
        self._begin()
        self.load.guest = self.guest
        for block in self.rng.sample(sorted(self.load.held), min(20, len(self.load.held))):
            assert self.guest.read(block * BLOCK, BLOCK) == self.load.held[block], self.history

    def _end(self) -> None:
        kill = self.rng.random() < 0.7
        self.history.append("kill" if kill else "stop")
        if kill:
            self.daemon.kill()
        else:
            self.daemon.stop()
        self._stack.close()

    def _judge(self) -> None:
        with qcow2.open(self.top, writable=True) as disk:
            shown = bytearray(disk.read(0, disk.size))
        expected = bytearray(self.load.base)
        for block, data in self.load.held.items():
            expected[block * BLOCK : (block + 1) * BLOCK] = data
        wrong = [at for at in range(0, len(expected), BLOCK) if shown[at : at + BLOCK] != expected[at : at + BLOCK]]
        assert (wrong, len(shown)) == ([], len(expected)), self.history
        assert_not_corrupt(self.top)


@pytest.mark.sample(2)
@pytest.mark.parametrize("seed", range(12))
def test_a_life_of_jobs_loses_nothing(tmp_path: Path, seed: int) -> None:
    Life(tmp_path, seed).live(12)
