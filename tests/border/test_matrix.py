"""Each door in each world: it serves, or it refuses in one line; what was acknowledged is never lost without a word.

The worlds are in `tests.border.world`. The image is an overlay, so each first write copies and its link may wait.
"""

import os
import re
import select
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.border.library import ACKNOWLEDGED, FLUSHED
from tests.border.world import STRANGER, WORLDS, command
from tests.frontend import BackendGone, FrontEnd
from tests.listening import visit, wait_for_listener
from tests.oracle import assert_not_corrupt
from tests.program import DAEMON, TIMEOUT, TOOL, qcow2_tool_ok

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="other users, mounts and namespaces need root")
MIB = 1 << 20
SIZE = 4 * MIB
ACCEPTS_REFUSAL = {
    "no-descriptors",
    "no-threads",
    "little-memory",
    "scarce-memory",
}  # what a program needs is not there
HAS_OTHER_SHM = {"own-shm", "no-shm", "small-shm"}  # logs of the host are not seen: refused by name, or said
TOLD = re.compile(r"\w[^\n]*\n")  # one line


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that any user reaches, which the stranger owns."""
    directory = Path(tempfile.mkdtemp(prefix="border-", dir="/var/tmp"))
    os.chmod(directory, 0o755)
    try:
        (directory / "base").write_bytes(b"b" * SIZE)
        qcow2_tool_ok("create", "-b", directory / "base", "-F", "raw", directory / "disk", str(SIZE))
        for path in (directory, directory / "base", directory / "disk"):
            os.chown(path, STRANGER, STRANGER)
        yield directory
    finally:
        shutil.rmtree(directory)


def run(world: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(world, *words), capture_output=True, text=True, timeout=TIMEOUT)
    assert "Traceback" not in done.stderr, done.stderr
    return done


class Life:
    """A daemon in *world*; `front_end` is None if it refused, for which *said* is why."""

    def __init__(self, world: str, place: Path) -> None:
        self.socket_path = place / "sock"
        self.socket_path.unlink(missing_ok=True)
        words = command(world, DAEMON, f"--socket-path={self.socket_path}", f"--blk-file={place / 'disk'}")
        with (place / "said").open("w") as said:
            self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=said, stderr=said, text=True)
        self.world, self.place = world, place
        self.front_end: FrontEnd | None = None

    def __enter__(self) -> "Life":
        try:
            if self.world == "no-descriptors" and self._lets_nobody_in():
                self.process.kill()
                self.process.wait(TIMEOUT)
                return self
            self.front_end = visit(self.process, self.socket_path)
        except (AssertionError, BackendGone):
            if "the front-end is refused" in self.said:  # it waits for one whose memory it can map
                self.process.terminate()
                assert self.process.wait(TIMEOUT) >= 0
                return self
            self.process.wait(TIMEOUT)
            assert self.process.returncode > 0, f"exit {self.process.returncode}: {self.said}"
        return self

    def _lets_nobody_in(self) -> bool:
        """Whether it says that it lacks a descriptor for who knocks, who waits then; false once it has ended."""
        wait_for_listener(self.process, self.socket_path)
        ended = os.pidfd_open(self.process.pid)
        try:
            with socket.socket(socket.AF_UNIX) as visitor:
                visitor.connect(str(self.socket_path))
                while "Too many open files" not in self.said:
                    if select.select([ended, visitor], [], [], 0.01)[0]:
                        return False
            return True
        finally:
            os.close(ended)

    def __exit__(self, *_: object) -> None:
        if self.front_end is not None:
            self.front_end.close()
        self.process.kill()
        self.process.wait(TIMEOUT)
        assert "Traceback" not in self.said, self.said

    @property
    def said(self) -> str:
        return (self.place / "said").read_text()

    def stop(self) -> None:
        """It ends cleanly, or says why it does not where it lacks what that takes."""
        self.process.terminate()
        if self.process.wait(TIMEOUT):
            assert_refused(self.world, self.process.returncode, self.said)


def assert_refused(world: str, status: int, said: str) -> None:
    """It failed, in a line, where that is no fault."""
    assert world in ACCEPTS_REFUSAL | HAS_OTHER_SHM, f"{world}: exit {status}: {said}"
    assert TOLD.search(said), f"{world}: no word of why"


@pytest.mark.sample(4)
@pytest.mark.parametrize("world", WORLDS)
def test_daemon(world: str, place: Path) -> None:
    """Flushed and acknowledged writes outlive its death, and the next life in the same world ends cleanly."""
    with Life(world, place) as life:
        if life.front_end is None:
            assert_refused(world, life.process.returncode, life.said)
            return
        life.front_end.write(FLUSHED, b"F" * 4096)
        life.front_end.flush()
        life.front_end.write(ACKNOWLEDGED, b"A" * 4096)
    with Life(world, place) as life:
        if life.front_end is None:
            assert_refused(world, life.process.returncode, life.said)
            assert "log" in life.said
            return
        assert life.front_end.read(FLUSHED, 4096) == b"F" * 4096
        assert life.front_end.read(ACKNOWLEDGED, 4096) == b"A" * 4096 or (world in HAS_OTHER_SHM and "log" in life.said)
        life.stop()
    assert_not_corrupt(place / "disk")


@pytest.mark.sample(4)
@pytest.mark.parametrize("world", WORLDS)
def test_library(world: str, place: Path) -> None:
    """The same through `import qcow2`: a process that dies, and the next one."""
    script = (sys.executable, "-m", "tests.border.library", place / "disk")
    died = run(world, *script, "die")
    if died.returncode:
        assert_refused(world, died.returncode, died.stderr)
        return
    read = run(world, *script, "read")
    if read.returncode:
        assert_refused(world, read.returncode, read.stderr)
        assert "log" in read.stderr
    elif world != "closed-stdio":
        assert read.stdout == "F A\n" or (world in HAS_OTHER_SHM and "log" in read.stderr)
    assert_not_corrupt(place / "disk")


@pytest.mark.sample(2)
@pytest.mark.parametrize("world", WORLDS)
def test_tool(world: str, place: Path) -> None:
    """Each command that changes an image, after a death that left a link log; then nothing acknowledged is missing."""
    script = (sys.executable, "-m", "tests.border.library", place / "disk")
    assert run("stranger", *script, "die").returncode == 0
    for words in (
        ("info", place / "disk"),
        ("check", "-r", "all", place / "disk"),
        ("resize", place / "disk", "+1M"),
        ("rebase", "-u", "-b", place / "base", "-F", "raw", place / "disk"),
        ("map", "--output=json", place / "disk"),
        ("create", "-b", place / "base", "-F", "raw", place / "new", str(SIZE)),
    ):
        done = run(world, TOOL, *words)
        if done.returncode:
            assert_refused(world, done.returncode, done.stderr)
    assert run("root", *script, "read").stdout == "F A\n"
    assert_not_corrupt(place / "disk")
