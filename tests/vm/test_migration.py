"""A guest that writes and verifies moves between two QEMUs, each with a daemon of its own, on one image.

`make migrate` moves it ten times, in each of the ways below; a shorter journey is a part of `make test`.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from guest import Backend, Guest, vhost_user_disk

from tests.patience import TIMEOUT
from tests.vm.conftest import Boot, Serve
from tests.vm.journey import Journey
from tests.vm.tool import run

MIGRATIONS = int(os.environ.get("MIGRATIONS", "2"))
FLAG = "/sys/bus/pci/devices/0000:00:1e.0"  # a device whose removal tells the job to end
FIO = "fio --directory=/mnt --ioengine=libaio --direct=1 --verify=crc32c --verify_fatal=1 --output=/tmp/log"
# The reader's buffers are written by nobody but the device: a page that it did not log is an old one after the move.
JOB = f"""
    test -e {FLAG}
    mkfs.ext4 -q /dev/vda
    mount /dev/vda /mnt
    {FIO} --name=read --rw=write --bs=64k --size=16M --do_verify=0
    while test -e {FLAG}; do
        {FIO}.read --name=read --rw=randread --bs=64k --size=16M --iodepth=32 --time_based --runtime=4
    done &
    round=0
    while test -e {FLAG}; do
        {FIO} --name=write --rw=randwrite --bsrange=512-64k --blockalign=512 --size=4M --iodepth=16 --fsync=64
        round=$((round + 1))
        echo "verified $round"
    done
    wait $!
    umount /mnt
    e2fsck -fn /dev/vda
"""


class Hosts:
    """Two daemons on one image, and the guest that moves between them; a context manager."""

    def __init__(self, boot: Boot, serve: Serve, image: Path, options: list[str], properties: str, cpus: int) -> None:
        """*options* are the daemons', *properties* the disk's."""
        self._boot = boot
        self._serve = serve
        self._image = image
        self._options = options
        self._properties = properties
        self._cpus = cpus
        self._stack = ExitStack()
        self._moves = 0

    def __enter__(self) -> "Hosts":
        with ExitStack() as stack:
            here = stack.enter_context(self._serve(self._image, *self._options, name="here"))
            there = stack.enter_context(self._serve(self._image, *self._options, "--incoming", name="there"))
            self.daemons = [here, there]
            self._journey = stack.enter_context(Journey(self._start, here, self._image.with_name("migration")))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def _start(self, daemon: Backend, arguments: list[str]) -> Guest:
        *chardev, device = vhost_user_disk(daemon.socket_path)
        disk = [*chardev, f"{device},{self._properties}"]
        flag = ["-device", "virtio-rng-pci,id=flag,addr=0x1e"]
        return self._boot(JOB, [*disk, *flag, *arguments], cpus=self._cpus)

    @property
    def guest(self) -> Guest:
        return self._journey.guest

    @property
    def _other(self) -> Backend:
        return self.daemons[(self._moves + 1) % 2]

    def move(self) -> None:
        """Migrate the guest, which goes on in another QEMU on the other daemon."""
        self._journey.move(self._other)
        self._moves += 1

    def cancel(self, status: str) -> None:
        """Begin to migrate the guest, and think better of it when the migration is at *status*; the guest stays."""
        self._journey.cancel(self._other, status)

    def finish(self) -> None:
        """Let the guest end its job, in which it verifies what it has written last, and both daemons after it."""
        self.guest.unplug("flag")
        self.guest.finish(TIMEOUT)
        for daemon in self.daemons:
            daemon.stop()
        run("qemu-img", "check", self._image)


WAYS = {
    "writeback": ([], "num-queues=1", 1),
    "writethrough, four queues": (["--cache=writethrough", "--lazy-refcounts=off"], "num-queues=4", 4),
    "packed rings": (["--cache=none"], "num-queues=2,packed=on", 2),
}


@pytest.fixture(params=WAYS if MIGRATIONS > 2 else ["writeback", "packed rings"])
def hosts(request: pytest.FixtureRequest, boot: Boot, serve: Serve, lazy_image: Path) -> Iterator[Hosts]:
    with Hosts(boot, serve, lazy_image, *WAYS[request.param]) as running:
        running.guest.wait_for("verified 1", TIMEOUT)
        yield running


@pytest.mark.sample(8, of="guests")
def test_guest_moves_back_and_forth_and_what_it_wrote_verifies(hosts: Hosts) -> None:
    for _move in range(MIGRATIONS):
        hosts.move()
        hosts.guest.wait_for("verified", TIMEOUT)
    hosts.finish()


@pytest.mark.sample(8, of="guests")
def test_guest_stays_when_its_migration_is_cancelled(hosts: Hosts) -> None:
    hosts.cancel("active")
    hosts.cancel("pre-switchover")  # its rings have stopped, its daemon has let go of the image
    hosts.finish()
