"""`vhost-user-qcow2 ctl` in this process: starting Python takes longer than what it does."""

import io
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from vhost.controlclient import main


def ctl(image: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Ask the daemon whose control socket is named after *image*."""
    command, out, err = [f"--control={image}.control", *arguments], io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(command)
    return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())


def told(image: Path, *arguments: str) -> str:
    """What it answers, without a complaint."""
    done = ctl(image, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout
