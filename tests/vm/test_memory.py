"""Memory that comes and goes while the guest's disk is busy, with buffers in it."""

from pathlib import Path

import pytest
from guest import Backend, Guest, vhost_user_disk

from tests.patience import TIMEOUT
from tests.vm.conftest import Boot, Serve
from tests.vm.tool import run

DIMMS = 12  # and no message of vhost-user holds more than 8 regions at a time
MIB = 1 << 20
FLAG = "/sys/bus/pci/devices/0000:00:1e.0"  # a device whose removal tells the job to end
BEFORE_MIB, DIMM_MIB = 512, 128
JOB = f"""
    echo online_movable > /sys/devices/system/memory/auto_online_blocks
    mkfs.ext4 -q /dev/vda
    mount /dev/vda /mnt
    round=0
    while test -e {FLAG}; do
        fio --name=job --directory=/mnt --ioengine=libaio --direct=1 --rw=randrw --bsrange=4k-256k --size=4M \\
            --iodepth=16 --verify=crc32c --verify_fatal=1 --output=/tmp/log
        round=$((round + 1))
        echo "round $round with $(sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo) in all"
    done
    umount /mnt
    e2fsck -fn /dev/vda
"""


def plug(guest: Guest, number: int) -> None:
    backend = {"qom-type": "memory-backend-memfd", "id": f"memory{number}", "size": DIMM_MIB * MIB, "share": True}
    guest.command("object-add", **backend)
    guest.command("device_add", driver="pc-dimm", id=f"dimm{number}", memdev=f"memory{number}")


def unplug(guest: Guest, number: int) -> None:
    """Ask until the guest gives the memory back: a page that is just being written to cannot be moved."""
    while True:
        guest.command("device_del", id=f"dimm{number}")
        event = guest.wait_for_event("DEVICE_DELETED", "MEM_UNPLUG_ERROR")
        if "msg" not in event:
            break
    guest.command("object-del", id=f"memory{number}")


def wait_for_memory(guest: Guest, at_least_mib: int, at_most_mib: int) -> None:
    """Return once a round of load has been verified with so much memory in the guest."""
    kib = -1
    while not at_least_mib << 10 <= kib <= at_most_mib << 10:
        kib = int(guest.wait_for(" in all", TIMEOUT).split()[-3])


def count_regions(daemon: Backend) -> int:
    """How many regions of the guest's memory the daemon has mapped."""
    return Path("/proc", str(daemon.process.pid), "maps").read_text().count("memfd:memory-backend-memfd")


@pytest.mark.sample(8, of="guests")
def test_memory_comes_and_goes_under_load(boot: Boot, serve: Serve, lazy_image: Path) -> None:
    with serve(lazy_image) as daemon:
        disk = vhost_user_disk(daemon.socket_path)
        memory = ["-m", f"{BEFORE_MIB}M,slots={DIMMS},maxmem=8G"]
        flag = ["-device", "virtio-rng-pci,id=flag,addr=0x1e"]
        with boot(JOB, [*disk, *flag, *memory]) as guest:
            guest.wait_for("round 1", TIMEOUT)
            regions = count_regions(daemon)
            for number in range(DIMMS):
                plug(guest, number)
            wait_for_memory(guest, DIMMS * DIMM_MIB, BEFORE_MIB + DIMMS * DIMM_MIB)
            assert count_regions(daemon) == regions + DIMMS
            for number in range(DIMMS):
                unplug(guest, number)
            wait_for_memory(guest, 0, BEFORE_MIB)
            assert count_regions(daemon) == regions
            guest.unplug("flag")
            guest.finish(TIMEOUT)
        daemon.stop()
    run("qemu-img", "check", lazy_image)
