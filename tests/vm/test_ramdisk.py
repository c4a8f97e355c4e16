"""A disk written in Python, examples/ramdisk.py, under a real guest."""

import sys
from pathlib import Path

import pytest
from guest import Backend, vhost_user_disk

from tests.patience import TIMEOUT
from tests.vm.conftest import ROOT, Boot


@pytest.mark.sample(8, of="guests")
def test_guest_makes_a_file_system_on_the_ram_disk_example(boot: Boot, tmp_path: Path) -> None:
    job = """
        mkfs.ext4 -q /dev/vda
        mount /dev/vda /mnt
        fio --name=job --directory=/mnt --rw=randwrite --bs=4k --size=8M --direct=1 --ioengine=libaio --iodepth=16 \\
            --verify=crc32c --verify_fatal=1 --output=/tmp/log
        umount /mnt
        e2fsck -fn /dev/vda
    """
    socket_path = tmp_path / "ram.sock"
    with Backend([sys.executable, ROOT / "examples" / "ramdisk.py", socket_path], socket_path) as disk:
        with boot(job, vhost_user_disk(disk.socket_path)) as guest:
            guest.finish(TIMEOUT)
        disk.stop()
