"""One chain, one piece of work, and the deaths within it."""

import random
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.chains.chain import Chain, Files, is_qcow2, make_chain, view
from tests.chains.work import WORK
from tests.crash.driver import CrashDriver
from tests.crash.explorer import Violation
from tests.crash.moments import states_together
from tests.crash.opening import DirectDriver
from tests.oracle import assert_not_corrupt, qemu_read

STATES_SEEN = 3  # of a moment, besides the kill


@dataclass(frozen=True)
class Trial:
    """What is drawn from *seed*."""

    work: str
    seed: int
    states: int  # that are looked at, at most
    with_qemu: bool = False  # its view is asked for, too

    def run(self) -> int:
        """How many states were looked at. Raises: Violation."""
        try:
            return self._run()
        except Exception as error:
            raise Violation(f"{self.work} {self.seed}: {type(error).__name__}: {error}") from error

    def _run(self) -> int:
        draw = random.Random(f"{self.work} {self.seed}")
        chain = make_chain(draw)
        initial, top = chain.copy(), chain.names[0]
        if not is_qcow2(chain.files[top]):
            return 0
        before = DirectDriver().run(view(chain.copy(), top))
        driver = CrashDriver(draw.randrange(1 << 30))
        after = driver.run(WORK[self.work](draw, chain, before))
        self._require(chain.copy(), top, {after}, "at the end")
        if self.with_qemu:
            require_of_qemu(chain.files, top, after)
        seen = 0
        for files in self._states(driver, chain, initial, draw):
            self._require(files, top, {before, after}, f"state {seen}")
            seen += 1
        return seen

    def _states(self, driver: CrashDriver, chain: Chain, initial: Files, draw: random.Random) -> Iterator[Files]:
        """Some of all the states that a death may leave."""
        pairs = [(initial[name], file) for name, file in chain.files.items()]
        found = states_together(driver, pairs, draw.randrange(1 << 30), samples=STATES_SEEN)
        share = self.states / max(1, len(driver.journal))  # of a state for each entry, about
        for state in found:
            if draw.random() < share:
                yield dict(zip(chain.files, state, strict=True))

    def _require(self, files: Files, top: str, allowed: set[bytes], when: str) -> None:
        seen = DirectDriver().run(view(files, top))
        if seen not in allowed:
            raise Violation(f"{when} the guest sees {difference(seen, min(allowed))}")


def difference(seen: bytes, wanted: bytes) -> str:
    """Where *seen* is another disk first."""
    if len(seen) != len(wanted):
        return f"{len(seen)} bytes, not {len(wanted)}"
    where = next(
        index for index in range(0, len(seen), 512) if seen[index : index + 512] != wanted[index : index + 512]
    )
    return f"other bytes at {where}"


def require_of_qemu(files: Files, top: str, wanted: bytes) -> None:
    """QEMU sees the same, and finds each image sound."""
    with TemporaryDirectory() as directory:
        for name, file in files.items():
            (Path(directory) / name).write_bytes(file.content())
        try:
            seen = qemu_read(Path(directory) / top)
            for name, file in files.items():
                if is_qcow2(file):
                    assert_not_corrupt(Path(directory) / name)
        except (AssertionError, subprocess.SubprocessError) as error:
            raise Violation(f"QEMU: {error}") from error
        if seen != wanted:
            raise Violation(f"QEMU sees {difference(seen, wanted)}")
