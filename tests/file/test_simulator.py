"""The data plane that ships, and the engine, on a simulated kernel: nothing is lost, nobody waits for ever."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def simulate(*options: str) -> subprocess.CompletedProcess[str]:
    """A simulation is a process of its own: its data plane is another than ours."""
    command = [sys.executable, "-m", "tests.sim", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


def test_histories_of_many_lives_keep_every_promise_and_are_the_same_each_time() -> None:
    done = simulate("--histories", "60", "--twice")
    assert done.returncode == 0, done.stdout + done.stderr
