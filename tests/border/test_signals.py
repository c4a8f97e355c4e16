"""Each signal at each door: what was acknowledged is there afterwards, and nobody prints a traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import qcow2
from tests.frontend import BackendGone, FrontEnd
from tests.oracle import assert_not_corrupt
from tests.program import TIMEOUT, TOOL, Daemon, qcow2_tool_ok

MIB = 1 << 20
ENDS_CLEANLY = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPWR, signal.SIGXCPU}
KILLS = {
    signal.SIGKILL,
    signal.SIGILL,
    signal.SIGTRAP,
    signal.SIGABRT,
    signal.SIGFPE,
    signal.SIGSEGV,
    signal.SIGSYS,
}
STOPS = {signal.SIGSTOP, signal.SIGTSTP}  # a supervisor's business: SIGCONT goes on
OTHERS = sorted(set(signal.Signals) - ENDS_CLEANLY - KILLS - STOPS)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "base").write_bytes(b"b" * (4 * MIB))
    path = tmp_path / "disk"
    qcow2_tool_ok("create", "-b", tmp_path / "base", "-F", "raw", path, "4M")
    return path


@pytest.mark.parametrize("number", sorted(ENDS_CLEANLY | KILLS), ids=lambda number: number.name)
def test_daemon_ends_and_nothing_acknowledged_is_lost(number: signal.Signals, image: Path) -> None:
    with Daemon(image) as daemon:
        with FrontEnd(daemon.socket_path) as front_end:
            front_end.write(MIB, b"A" * 4096)
            daemon.process.send_signal(number)
            daemon.process.wait(TIMEOUT)
            assert daemon.process.stderr is not None
            said = daemon.process.stderr.read()
        assert "Traceback" not in said
        if number in ENDS_CLEANLY:
            assert daemon.process.returncode == 0, said
        else:
            assert daemon.process.returncode in (-number, 128 + number), said
    with qcow2.open(str(image), writable=True) as disk:
        assert disk.read(MIB, 4096) == b"A" * 4096
    assert_not_corrupt(image)


def test_daemon_serves_on_after_every_other_signal(image: Path) -> None:
    with Daemon(image) as daemon:
        with FrontEnd(daemon.socket_path) as front_end:
            for turn, number in enumerate(OTHERS):
                daemon.process.send_signal(number)
                try:
                    front_end.write(turn * 65536 % (4 * MIB), b"A" * 4096)
                except BackendGone:
                    pytest.fail(f"{number.name} ended the daemon: {daemon.process.wait(TIMEOUT)}")
        daemon.stop()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_tool_dies_of_it_without_a_word_more_than_a_line(number: signal.Signals, image: Path) -> None:
    """The terminal of its standard output is a pipe nobody reads: it is stuck in the middle."""
    reader, writer = os.pipe()
    try:
        with qcow2.open(str(image), writable=True) as disk:
            for offset in range(0, 4 * MIB, 131072):
                disk.write(offset, b"x")
        words = [TOOL, "map", "--output=json", image]
        with subprocess.Popen(words, stdout=writer, stderr=subprocess.PIPE, text=True) as process:
            process.send_signal(number)
            _, said = process.communicate(timeout=TIMEOUT)
        assert process.returncode in (0, -number, 128 + number)
        assert "Traceback" not in said
        assert said.count("\n") <= 1
    finally:
        os.close(reader)
        os.close(writer)


HANDLER = """
import os, signal, sys, qcow2
hits = []
number = int(sys.argv[2])
signal.signal(number, lambda *_: hits.append(1))
with qcow2.open(sys.argv[1], writable=True) as disk:
    for turn in range(64):
        os.kill(os.getpid(), number)
        disk.write(turn * 65536, bytes([turn]) * 4096)
    disk.flush()
    assert all(disk.read(turn * 65536, 1)[0] == turn for turn in range(64))
assert hits
"""


@pytest.mark.parametrize("number", [signal.SIGALRM, signal.SIGUSR1, signal.SIGCHLD, signal.SIGINT])
def test_library_goes_on_under_a_program_that_handles_it(number: signal.Signals, image: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANDLER, str(image), str(int(number))], capture_output=True, text=True, timeout=TIMEOUT
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert_not_corrupt(image)
