"""What is forked for the other tests is what a user starts: it says the same, ends the same, and is our child."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.forge import Forged, popen
from tests.program import DAEMON, TOOL, qcow2_tool_ok, run


@pytest.mark.parametrize(
    "words",
    [
        (TOOL, "info", "disk"),
        (TOOL, "info", "absent"),
        (TOOL, "check", "--help"),
        (TOOL, "shout"),
        (DAEMON, "--version"),
        (DAEMON, "--blk-file=absent", "--socket-path=socket"),
        (DAEMON, "ctl", "--control=absent", "status"),
    ],
    ids=lambda words: " ".join(map(str, words[1:])),
)
def test_it_says_what_a_started_one_says(tmp_path: Path, words: tuple[str | Path, ...]) -> None:
    qcow2_tool_ok("create", "-q", tmp_path / "disk", "1M")
    ours = run(*words, cwd=tmp_path)
    started = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert (ours.returncode, ours.stdout, ours.stderr) == (started.returncode, started.stdout, started.stderr)


def test_it_is_a_child_that_has_what_it_was_given_and_nothing_else(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    command = [str(DAEMON), f"--socket-path={tmp_path / 'socket'}", "--format=raw", f"--blk-file={tmp_path / 'disk'}"]
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    with popen(command, pass_fds=[writer], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert type(process) is Forged
        while not (tmp_path / "socket").exists():
            assert process.poll() is None
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert f"PPid:\t{os.getpid()}\n" in status
        held = {name: os.readlink(f"/proc/{process.pid}/fd/{name}") for name in os.listdir(f"/proc/{process.pid}/fd")}
        assert held[str(writer)] == os.readlink(f"/proc/self/fd/{writer}")
        assert str(reader) not in held or held[str(reader)] != os.readlink(f"/proc/self/fd/{reader}")
        process.kill()
        _, said = process.communicate()
    os.close(reader)
    os.close(writer)
    assert (process.returncode, said) == (-signal.SIGKILL, "")
