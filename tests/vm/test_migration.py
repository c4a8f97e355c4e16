"""A guest that writes and verifies moves between two QEMUs, each with a daemon of its own, on one image.

`make migrate` moves it ten times, in each of the ways below; a shorter journey is a part of `make test`.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from guest import Backend, Guest, installed_program, vhost_user_disk

from tests.patience import TIMEOUT
from tests.vm.conftest import Boot
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
    """Two daemons on one image, and the QEMU that has the guest now; a context manager."""

    def __init__(self, boot: Boot, image: Path, options: list[str], properties: str, cpus: int) -> None:
        """*options* are the daemons', *properties* the disk's."""
        self._boot = boot
        self._image = image
        self._options = options
        self._properties = properties
        self._cpus = cpus
        self._stack = ExitStack()
        self._moves = 0

    def __enter__(self) -> "Hosts":
        with ExitStack() as stack:
            self.daemons = [stack.enter_context(self._daemon(name)) for name in ("here", "there")]
            self._running = stack.enter_context(ExitStack())
            self.guest = self._start(self._running, self.daemons[0])
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def _daemon(self, name: str) -> Backend:
        path = self._image.with_name(f"{name}.sock")
        options = [*self._options, *(["--incoming"] if name == "there" else [])]
        command = [installed_program("vhost-user-qcow2"), f"--socket-path={path}", f"--blk-file={self._image}"]
        return Backend([*command, *options], path)

    def _start(self, stack: ExitStack, daemon: Backend, *arguments: str) -> Guest:
        *chardev, device = vhost_user_disk(daemon.socket_path)
        disk = [*chardev, f"{device},{self._properties}"]
        flag = ["-device", "virtio-rng-pci,id=flag,addr=0x1e"]
        guest = stack.enter_context(self._boot(JOB, [*disk, *flag, *arguments], cpus=self._cpus))
        capabilities = [
            {"capability": "events", "state": True},
            {"capability": "pause-before-switchover", "state": True},
        ]
        guest.command("migrate-set-capabilities", capabilities=capabilities)
        guest.command("migrate-set-parameters", **{"max-bandwidth": 1 << 30, "downtime-limit": 5000})
        return guest

    def begin_to_move(self, stack: ExitStack) -> Guest:
        """Start another QEMU and the migration to it, which will stop before the guest is handed over."""
        target = self._start(stack, self.daemons[(self._moves + 1) % 2], "-incoming", "defer")
        address = f"unix:{self._image.with_name('migration')}"
        target.command("migrate-incoming", uri=address)
        self.guest.command("migrate", uri=address)
        return target

    def move(self) -> None:
        """Migrate the guest, which goes on in another QEMU on the other daemon."""
        with ExitStack() as stack:
            target = self.begin_to_move(stack)
            wait_for_migration(self.guest, "pre-switchover")
            self.guest.command("migrate-continue", state="pre-switchover")
            wait_for_migration(self.guest, "completed")
            target.wait_for_event("RESUME")
            self._running.close()
            self._running.push(stack.pop_all())
        self.guest = target
        self._moves += 1

    def cancel(self, status: str) -> None:
        """Begin to migrate the guest, and think better of it when the migration is at *status*; the guest stays."""
        with ExitStack() as stack:
            self.begin_to_move(stack)
            wait_for_migration(self.guest, status)
            self.guest.command("migrate_cancel")
            wait_for_migration(self.guest, "cancelled")

    def finish(self) -> None:
        """Let the guest end its job, in which it verifies what it has written last, and both daemons after it."""
        self.guest.unplug("flag")
        self.guest.finish(TIMEOUT)
        for daemon in self.daemons:
            daemon.stop()
        run("qemu-img", "check", self._image)


def wait_for_migration(guest: Guest, status: str) -> None:
    while (now := guest.wait_for_event("MIGRATION")["status"]) != status:
        assert now != "failed", "the migration failed"


WAYS = {
    "writeback": ([], "num-queues=1", 1),
    "writethrough, four queues": (["--cache=writethrough", "--lazy-refcounts=off"], "num-queues=4", 4),
    "packed rings": (["--cache=none"], "num-queues=2,packed=on", 2),
}


@pytest.fixture(params=WAYS if MIGRATIONS > 2 else ["writeback", "packed rings"])
def hosts(request: pytest.FixtureRequest, boot: Boot, lazy_image: Path) -> Iterator[Hosts]:
    with Hosts(boot, lazy_image, *WAYS[request.param]) as running:
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
