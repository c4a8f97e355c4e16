"""A disk that leaves the guest and comes back, while the guest runs on."""

from pathlib import Path

import pytest

from tests.patience import TIMEOUT
from tests.vm.conftest import Boot, Serve
from tests.vm.tool import run

GONE = "while test -b /dev/vda; do sleep 0.1; done"
BACK = "until test -b /dev/vda; do sleep 0.1; done"


@pytest.mark.sample(8, of="guests")
@pytest.mark.parametrize("reconnects", [False, True])
def test_unplugged_disk_may_be_plugged_again(boot: Boot, serve: Serve, lazy_image: Path, reconnects: bool) -> None:
    job = f"""
        mkfs.ext4 -q /dev/vda; mount /dev/vda /mnt
        dd if=/dev/urandom of=/mnt/data bs=64k count=50
        md5sum /mnt/data > /mnt/sum
        umount /mnt
        echo filled
        {GONE}
        echo let go
        {BACK}
        mount /dev/vda /mnt
        md5sum -c /mnt/sum
        umount /mnt
    """
    with serve(lazy_image) as daemon:
        path = str(daemon.socket_path)
        disk = ["-chardev", f"socket,id=disk,path={path}", "-device", "vhost-user-blk-pci,chardev=disk,id=disk"]
        with boot(job, disk) as guest:
            guest.wait_for("filled", TIMEOUT)
            guest.unplug("disk")
            guest.wait_for("let go", TIMEOUT)  # the guest looks now and then: it has to see that there is none
            if reconnects:
                guest.command("chardev-remove", id="disk")
                address = {"type": "unix", "data": {"path": path}}
                backend = {"type": "socket", "data": {"addr": address, "server": False}}
                guest.command("chardev-add", id="disk", backend=backend)
            guest.command("device_add", driver="vhost-user-blk-pci", chardev="disk", id="disk")
            guest.finish(TIMEOUT)
        daemon.stop()
    run("qemu-img", "check", lazy_image)
