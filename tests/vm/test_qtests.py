"""QEMU's own tests of vhost-user-blk, with our daemon where they start qemu-storage-daemon.

They drive the device without a guest's kernel, on the QEMU of QEMU_BIN, else this host's. QOS_TEST names the program,
tests/qtest/qos-test of a build of QEMU; docs/architecture.md says how to get one.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
from guest import find_program, installed_program

from tests.patience import TIMEOUT

PROGRAM = os.environ.get("QOS_TEST", "")
TESTS = ("basic", "indirect", "idx", "nxvirtq", "hotplug", "multiqueue")
MODES = ("", "--cache=none", "--sandbox")

pytestmark = pytest.mark.skipif(not PROGRAM, reason="QOS_TEST names no qos-test of QEMU's")


@pytest.fixture
def environment() -> dict[str, str]:
    directory = os.environ.get("QEMU_BIN")
    qemu = f"{directory}/qemu-system-x86_64" if directory else find_program("qemu-system-x86_64", "qemu-system-x86")
    return os.environ | {
        "QTEST_QEMU_BINARY": str(qemu),
        "QTEST_QEMU_STORAGE_DAEMON_BINARY": str(Path(__file__).with_name("storage-daemon")),
    }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TESTS)
def test_qtest_of_qemu_passes(environment: dict[str, str], tmp_path: Path, name: str, mode: str) -> None:
    environment["VHOST_USER_QCOW2"] = f"{installed_program('vhost-user-qcow2')} {mode}"
    listed = _run([PROGRAM, "-l"], environment, tmp_path)
    paths = [path for path in listed.splitlines() if re.search(rf"/vhost-user-blk(-pci)?-tests/{name}$", path)]
    assert paths, f"{PROGRAM} has no test {name} of vhost-user-blk"
    for path in paths:
        said = _run([PROGRAM, "-p", path], environment, tmp_path)
        assert f"ok 1 {path}" in said


def _run(command: list[str], environment: dict[str, str], directory: Path) -> str:
    done = subprocess.run(
        command,
        env=environment,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout
