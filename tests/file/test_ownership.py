"""A daemon whose user is not the image's owner: what replaces the image is as that was, as far as the daemon may."""

import os
import shutil
import stat
from pathlib import Path

import pytest

import qcow2
from tests.frontend import FrontEnd
from tests.oracle import assert_clean
from tests.program import Daemon
from vhost.client import Control, ControlError

MIB = 1 << 20
OWNER = 65534
UNPRIVILEGED = ("setpriv", "--bounding-set=-all")  # root's files are its own, and it may give none away

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root, and setpriv to be no more than a user"
)


def make_image(directory: Path, group: int, mode: int) -> Path:
    path = directory / "disk"
    qcow2.create(path, size=MIB)
    os.chown(path, OWNER, group)
    path.chmod(mode)
    return path


def start(image: Path) -> Daemon:
    return Daemon(image, f"--control={image}.control", under=UNPRIVILEGED)


def rights(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)


@pytest.mark.parametrize(("group", "mode", "given"), [(0, 0o660, 0o660), (OWNER, 0o676, 0o666)])
def test_what_is_served_stays_usable(tmp_path: Path, group: int, mode: int, given: int) -> None:
    image = make_image(tmp_path, group, mode)
    with start(image) as daemon, FrontEnd(daemon.socket_path), Control(f"{image}.control") as control:
        control.snapshot("frozen")
        assert rights(image) == (0, 0, given)
        assert rights(tmp_path / "frozen") == (OWNER, group, mode)
        daemon.stop()
    assert_clean(image)


def test_copy_and_committed_disk_are_made(tmp_path: Path) -> None:
    image = make_image(tmp_path, 0, 0o660)
    with start(image) as daemon, FrontEnd(daemon.socket_path), Control(f"{image}.control") as control:
        control.snapshot("frozen")
        assert control.wait(control.commit(active=True).job).state == "completed"
        job = control.mirror("copy").job
        assert control.wait(job).state == "ready"
        control.complete(job)
        assert control.wait(job).state == "completed"
        assert rights(tmp_path / "copy") == (0, 0, 0o660)
        daemon.stop()
    assert_clean(image)


def test_image_that_its_owner_cannot_use_is_named(tmp_path: Path) -> None:
    image = make_image(tmp_path, 0, 0o460)
    with start(image) as daemon, FrontEnd(daemon.socket_path), Control(f"{image}.control") as control:
        with pytest.raises(ControlError, match=rf"^{image}: .*{OWNER}"):
            control.snapshot("frozen")
        daemon.stop()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith((".", "f"))) == []
