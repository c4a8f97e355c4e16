"""A snapshot while the guest agent has frozen the guest's file system, which then needs no recovery."""

from pathlib import Path

import pytest
from guest import Failure, Kernel, find_program, initramfs, vhost_user_disk

from tests.file.test_recipes import play
from tests.vm.conftest import Boot, Serve
from tests.vm.tool import make_image, qcow2, run
from vhost import Control

JOB = """
    mkfs.ext4 -q /dev/vda
    mount /dev/vda /mnt
    mkdir -p /var/run
    qemu-ga -m isa-serial -p /dev/ttyS1 -t /tmp &
    set +x
    i=0
    while true; do
        i=$((i + 1))
        echo $i > /mnt/count
        sync
        if test $i = 10; then echo "writing on"; fi
    done
"""


@pytest.fixture
def initrd(kernel: Kernel, tmp_path: Path) -> Path:
    try:
        agent = find_program("qemu-ga", "qemu-guest-agent")
    except Failure as missing:
        pytest.skip(str(missing))
    return initramfs(kernel, tmp_path / "initrd", [agent])


@pytest.mark.sample(0)
def test_snapshot_of_a_frozen_file_system(boot: Boot, serve: Serve, tmp_path: Path) -> None:
    image = make_image(tmp_path / "disk.qcow2", "64M", "compat=1.1,lazy_refcounts=on")
    channel = ["-chardev", f"socket,id=agent,path={tmp_path}/agent.sock,server=on,wait=off"]
    device = ["-device", "isa-serial,chardev=agent"]
    with serve(image, f"--control={tmp_path}/disk.control") as daemon:
        with boot(JOB, [*vhost_user_disk(daemon.socket_path), *channel, *device]) as guest:
            guest.wait_for("writing on", 120)
            with Control(tmp_path / "disk.control") as control:
                control.snapshot("torn.qcow2")
            said = play("A snapshot of a consistent file system", tmp_path)
        daemon.stop()
    assert said == "frozen: 1\nthawed: 1\n"
    for name, wants_recovery in (("torn", True), ("consistent", False)):
        qcow2("convert", "-O", "raw", tmp_path / f"{name}.qcow2", raw := tmp_path / f"{name}.raw")
        assert ("needs_recovery" in run("dumpe2fs", "-h", raw)) == wants_recovery
    run("e2fsck", "-fn", tmp_path / "consistent.raw")
