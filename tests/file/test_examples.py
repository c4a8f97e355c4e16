"""The short programs a user would copy do what they say."""

import subprocess
import sys
from pathlib import Path

from tests.program import TIMEOUT, Daemon

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_front_end_prints_a_sector(tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(512) + bytes(range(256)) * 2 + bytes(512))
    with Daemon(image, "--format=raw") as daemon:
        done = subprocess.run(
            [sys.executable, EXAMPLES / "frontend.py", daemon.socket_path, "1"],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 32
    assert lines[1] == "00000210  10 11 12 13 14 15 16 17 18 19 1a 1b 1c 1d 1e 1f"
