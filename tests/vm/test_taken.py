"""An image that another process took while the guest was paused."""

from pathlib import Path

import pytest
from guest import Guest, reconnect_option

import qcow2
from tests.patience import TIMEOUT
from tests.vm.conftest import Boot, Serve
from tests.vm.tool import run

FIO = "fio --name=job --directory=/mnt --ioengine=libaio --direct=1 --verify=crc32c --verify_fatal=1 --output=/tmp/log"


def is_connected(guest: Guest) -> bool:
    (disk,) = [each for each in guest.command("query-chardev") if each["label"] == "disk"]
    return not str(disk["filename"]).startswith("disconnected:")


@pytest.mark.sample(8, of="guests")
def test_guest_waits_until_the_image_is_free_again(boot: Boot, serve: Serve, lazy_image: Path) -> None:
    job = f"""
        mkfs.ext4 -q /dev/vda
        mount /dev/vda /mnt
        {FIO} --rw=randwrite --bs=4k --size=8M --rate_iops=800 --iodepth=16 --eta=always --eta-newline=1
        umount /mnt
        e2fsck -fn /dev/vda
    """
    with serve(lazy_image) as daemon:
        socket = f"socket,id=disk,path={daemon.socket_path},{reconnect_option(1)}"
        with boot(job, ["-chardev", socket, "-device", "vhost-user-blk-pci,chardev=disk"]) as guest:
            guest.wait_for("IOPS", TIMEOUT)
            guest.command("stop")
            with qcow2.open(str(lazy_image), writable=True) as taken:
                assert not taken.image.read_only
                guest.command("cont")
                while is_connected(guest):
                    pass
            guest.finish(TIMEOUT)
        daemon.stop()
    run("qemu-img", "check", lazy_image)
