"""A guest that writes and verifies outlives its daemons: SIGKILL, a new one on the path, and QEMU connects to it.

`make reconnect` kills 50 daemons for each way to serve a disk; two for one of two of them are a part of `make test`.
"""

import itertools
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from guest import Backend, Failure, Guest, vhost_user_disk

from tests.patience import TIMEOUT
from tests.vm.conftest import Boot, Serve
from tests.vm.tool import run

KILLS = int(os.environ.get("KILLS", "2"))
CACHES, FORMATS, QUEUES = ("writeback", "writethrough"), ("split", "packed"), (1, 4)
ALL = list(itertools.product(CACHES, FORMATS, QUEUES))
SOME = [("writeback", "packed", 4), ("writethrough", "split", 1)]
AT_WORK = re.compile(r"[=,][1-9][0-9.k]* IOPS|^verified ")
BACKLOG = 0.1  # seconds in which lines are read that the guest printed before
FLAG = "/sys/bus/pci/devices/0000:00:1e.0"  # a device whose removal tells the job to end


def job(queues: int) -> str:
    """Write and verify until the flag is gone, a process a queue."""
    return f"""
        test -e {FLAG}
        test $(ls /sys/block/vda/mq | wc -l) = {queues}
        mkfs.ext4 -q /dev/vda
        mount /dev/vda /mnt
        round=0
        while test -e {FLAG}; do
            fio --name=job --directory=/mnt --ioengine=libaio --direct=1 --rw=randrw --rwmixread=30 --bsrange=512-64k \\
                --blockalign=512 --size=16M --numjobs={queues} --iodepth=16 --fsync=64 \\
                --verify=crc32c --verify_fatal=1 --eta=always --eta-newline=1 --randseed=$round --output=/tmp/log
            round=$((round + 1))
            echo "verified $round"
        done
        umount /mnt
        e2fsck -fn /dev/vda
        ! dmesg | grep -iE "vda.*error|error.*vda|blocked for more than"
    """


def wait_until_connected(guest: Guest, *daemons: Backend) -> None:
    """Return once QEMU has found the *daemons* and greeted them: it tries once a second, and answers us afterwards.

    A daemon that dies in the midst of the greeting is never replaced: QEMU 7.2 does not try again.
    Raises: Failure if one of them has ended, or QEMU does not find it.
    """
    ends_at = time.monotonic() + TIMEOUT
    while any(
        device["filename"].startswith("disconnected:")
        for device in guest.command("query-chardev")
        if "disk" in device["label"]
    ):
        follow(guest, ends_at, *daemons)


def wait_until_at_work(guest: Guest, daemon: Backend) -> None:
    """Return once fio says that it moves something, or ends a round, in a line that was not there yet.

    It says so once a second; on a fast machine its rounds are shorter than that.
    Raises: Failure if *daemon* has ended, or fio stands still.
    """
    began, line = time.monotonic(), ""
    while time.monotonic() - began < BACKLOG or not AT_WORK.search(line):
        line = follow(guest, began + TIMEOUT, daemon)


def follow(guest: Guest, ends_at: float, *daemons: Backend) -> str:
    """The next line of the guest, which prints one a second whether *daemons* serve it or not. Raises: Failure."""
    for daemon in daemons:
        daemon.require_running()
    line = guest.wait_for("", TIMEOUT)
    if time.monotonic() > ends_at:
        raise Failure(f"the guest has waited {TIMEOUT} s for a daemon that runs; it says: {line}")
    return line


@pytest.mark.sample(8, of="guests")
@pytest.mark.parametrize(("cache", "ring", "queues"), ALL if "KILLS" in os.environ else SOME)
def test_guest_outlives_its_daemons(
    boot: Boot, serve: Serve, lazy_image: Path, cache: str, ring: str, queues: int
) -> None:
    def daemon() -> Backend:
        return serve(lazy_image, f"--cache={cache}")

    with daemon() as first:
        disk = vhost_user_disk(first.socket_path, queues=queues, packed=ring == "packed", reconnect=1)
        guest = boot(job(queues), [*disk, "-device", "virtio-rng-pci,id=flag,addr=1e.0"], cpus=queues)
        with guest:
            wait_until_at_work(guest, first)
            first.process.kill()
            for _ in range(KILLS - 1):
                with daemon() as next_one:
                    wait_until_connected(guest, next_one)
                    wait_until_at_work(guest, next_one)
            with daemon() as last:
                guest.unplug("flag")
                result = guest.finish(TIMEOUT)
                last.stop()
    rounds = sum("verified" in line for line in result.console if not line.startswith("+"))
    assert rounds
    run("qemu-img", "check", lazy_image)
    print(f"{cache}, {ring}, {queues} queues: {KILLS} daemons killed, {rounds} rounds of fio verified, 0 errors")


class Idle:
    """A guest whose disk is gone: fio prints a line a second all the same, and QEMU tries again."""

    def wait_for(self, text: str, timeout: float) -> str:
        return "Jobs: 2 (f=2): [m(2)][0.4%][eta 04m:10s]"

    def command(self, name: str) -> list[dict[str, str]]:
        return [{"label": "disk", "filename": "disconnected:unix:disk.sock"}]


@pytest.mark.parametrize("wait", [wait_until_connected, wait_until_at_work])
def test_who_waits_for_a_daemon_that_has_died_is_told(
    serve: Serve, lazy_image: Path, wait: Callable[..., None]
) -> None:
    with serve(lazy_image) as daemon:
        daemon.process.kill()
        daemon.process.wait()
        with pytest.raises(Failure, match="ended with status -9"):
            wait(Idle(), daemon)
