"""Other QEMUs than this host's: each has habits of its own. `tests/vm/peers` fetches them; who did not, skips these.

`make peers` runs all the guests of this directory on each of them.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from guest import vhost_user_disk

from tests.patience import TIMEOUT
from tests.vm.conftest import ROOT, Boot, Serve
from tests.vm.test_reconnect import wait_until_connected
from tests.vm.tool import make_image, run

PEERS = Path(os.environ.get("QEMU_PEERS", ROOT / ".cache" / "qemu"))
VERSIONS = ("10.0", "11.1")
Use = Callable[[str], None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Return what lets guests boot in the QEMU of a version."""

    def set_qemu(version: str) -> None:
        programs = PEERS / version / "programs"
        if not (programs / "qemu-system-x86_64").exists():
            pytest.skip(f"no QEMU {version} in {PEERS}: tests/vm/peers {version} fetches it")
        monkeypatch.setenv("QEMU_BIN", str(programs))

    return set_qemu


@pytest.mark.parametrize("version", VERSIONS)
def test_guest_of_another_qemu_outlives_its_daemon(
    use: Use, boot: Boot, serve: Serve, tmp_path: Path, version: str
) -> None:
    """Rings of either format, several queues, an in-flight region smaller than the rings (10.0), reconnection."""
    use(version)
    job = """
        dd if=/dev/urandom of=/tmp/data bs=64k count=32
        for disk in vda vdb; do
            test $(ls /sys/block/$disk/mq | wc -l) = 2
            dd if=/tmp/data of=/dev/$disk bs=64k oflag=direct conv=fsync
        done
        echo filled
        for disk in vda vdb; do
            for round in $(seq 1 20); do
                dd if=/tmp/data of=/dev/$disk bs=64k seek=$((32 * round)) oflag=direct conv=fsync
            done
            echo written
            cmp -n 2097152 /tmp/data /dev/$disk
            dd if=/dev/$disk bs=64k skip=640 count=32 iflag=direct | cmp - /tmp/data
        done
        ! dmesg | grep -iE "vd[ab].*error|error.*vd[ab]"
    """
    images = [make_image(tmp_path / name, "256M", "compat=1.1,lazy_refcounts=on") for name in ("split", "packed")]
    with serve(images[0]) as split, serve(images[1]) as packed:
        disks = [
            *vhost_user_disk(split.socket_path, queues=2, reconnect=1),
            *vhost_user_disk(packed.socket_path, queues=2, packed=True, reconnect=1),
        ]
        with boot(job, disks, cpus=2) as guest:
            guest.wait_for("filled", TIMEOUT)
            for daemon in (split, packed):
                daemon.process.kill()
                daemon.process.wait()
            with serve(images[0]) as next_split, serve(images[1]) as next_packed:
                wait_until_connected(guest, next_split, next_packed)
                guest.finish(TIMEOUT)
                next_split.stop()
                next_packed.stop()
    for image in images:
        run("qemu-img", "check", image)
