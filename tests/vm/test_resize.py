"""A disk that grows under a running guest, which sees it."""

from pathlib import Path

import pytest
from guest import vhost_user_disk

from tests.patience import TIMEOUT
from tests.served import serve
from tests.vm.conftest import Boot
from tests.vm.tool import run

GIB = 1 << 30


@pytest.mark.sample(8, of="guests")
def test_guest_sees_its_disk_grow_under_load(boot: Boot, lazy_image: Path) -> None:
    job = f"""
        mkfs.ext4 -q /dev/vda
        mount /dev/vda /mnt
        fio --name=job --directory=/mnt --ioengine=libaio --direct=1 --rw=randwrite --bs=4k --size=8M --iodepth=16 \\
            --time_based --runtime=4 --verify=crc32c --verify_fatal=1 --output=/tmp/log --eta=always --eta-newline=1 &
        until test $(cat /sys/block/vda/size) = {3 * GIB // 512}; do sleep 0.1; done
        wait $!
        umount /mnt
        e2fsck -fn /dev/vda
        test $(blockdev --getsize64 /dev/vda) = {3 * GIB}
        dmesg | grep 'vda: detected capacity change from {GIB // 512} to {3 * GIB // 512}'
        dd if=/dev/urandom of=/tmp/end bs=1M count=2
        dd if=/tmp/end of=/dev/vda bs=1M seek=3070 oflag=direct
        dd if=/dev/vda bs=1M skip=3070 iflag=direct | cmp /tmp/end -
        dd if=/dev/vda bs=1M skip=2000 count=4 iflag=direct | cmp -n 4194304 /dev/zero -
    """
    with serve(lazy_image) as served:
        with boot(job, vhost_user_disk(served.socket_path)) as guest:
            guest.wait_for("IOPS", TIMEOUT)
            served.device.resize(3 * GIB)
            guest.finish(TIMEOUT)
    run("qemu-img", "check", lazy_image)


@pytest.mark.sample(8, of="guests")
def test_guest_whose_disk_grew_while_it_was_paused_sees_it_when_it_goes_on(boot: Boot, lazy_image: Path) -> None:
    job = f"echo waiting; until test $(cat /sys/block/vda/size) = {3 * GIB // 512}; do sleep 0.1; done"
    with serve(lazy_image) as served:
        with boot(job, vhost_user_disk(served.socket_path)) as guest:
            guest.wait_for("waiting", TIMEOUT)
            guest.command("stop")
            served.device.resize(3 * GIB)
            guest.command("cont")
            guest.finish(TIMEOUT)
