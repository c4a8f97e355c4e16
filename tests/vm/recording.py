"""A Linux guest at work on daemons under `--trace-io`: what they did, ready to be explored."""

import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from guest import Backend, Guest, vhost_user_disk

import qcow2
from ring.trace import read_trace
from tests.crash.driver import SimulatedFile
from tests.crash.recorded import Recorded, adapt
from tests.patience import TIMEOUT
from tests.vm.tool import make_image, run

Boot = Callable[..., Guest]
Serve = Callable[..., Backend]

QUEUES = 4
CLUSTER_SECTORS = 128
FIO = "fio --name=job --ioengine=libaio --direct=1 --rw=randwrite --bs=4k --output=/tmp/log"


@dataclass(frozen=True)
class Kind:
    """A sort of image and the cache mode it is served in."""

    options: str  # of `qcow2 create`
    cache: str
    overlay: bool = False  # over a raw disk that holds a file system


KINDS = {
    "lazy-writeback": Kind("compat=1.1,lazy_refcounts=on", "writeback"),
    "accurate-writethrough": Kind("compat=1.1", "writethrough"),
    "overlay-writeback": Kind("compat=1.1,lazy_refcounts=on", "writeback", overlay=True),
}


def record(boot: Boot, serve: Serve, directory: Path, *, mib: int, writes: int) -> dict[str, Recorded]:
    """Boot a guest that makes (or finds) a file system on a disk of each kind, then works on it, one after the other.

    A disk has *mib* MiB; four fio jobs issue *writes* writes of 4 KiB each, with fsyncs.
    """
    base = make_base(directory / "base.raw", mib)
    with ExitStack() as stack:
        daemons, disks, jobs = [], [], []
        for letter, (name, kind) in zip("abc", KINDS.items(), strict=True):
            backing = f",backing_file={base},backing_fmt=raw" if kind.overlay else ""
            image = make_image(directory / f"{name}.qcow2", f"{mib}M", kind.options + backing)
            options = f"--cache={kind.cache}", f"--trace-io={directory / name}.trace"
            daemons.append(stack.enter_context(serve(image, *options)))
            disks += vhost_user_disk(daemons[-1].socket_path, queues=QUEUES)
            jobs.append(job_on(f"vd{letter}", writes, make="true" if kind.overlay else "mkfs.ext4 -q"))
        with boot("".join(jobs), disks, cpus=QUEUES) as guest:
            guest.finish(TIMEOUT)
        for daemon in daemons:
            daemon.stop()
    return {name: load(directory, name, base) for name in KINDS}


def job_on(disk: str, writes: int, *, make: str) -> str:
    return f"""
        test $(ls /sys/block/{disk}/mq | wc -l) = {QUEUES}
        {make} /dev/{disk}
        mount -o discard /dev/{disk} /mnt
        dd if=/dev/urandom of=/mnt/filler bs=64k count=16 conv=fsync
        {FIO} --directory=/mnt --numjobs={QUEUES} --size={4 * writes}k --fsync=8 --iodepth=8
        rm /mnt/filler
        sync
        umount /mnt
    """


def load(directory: Path, name: str, base: Path) -> Recorded:
    """What was recorded of one disk, which was blank or showed *base*."""
    image = directory / f"{name}.qcow2"
    run("qemu-img", "check", image)
    under = base.read_bytes() if KINDS[name].overlay else b""
    with qcow2.open(str(image)) as disk:
        contents = under.ljust(disk.size, b"\0")
    return adapt(
        read_trace(directory / f"{name}.trace"), contents, SimulatedFile.parse("base", under) if under else None
    )


def make_base(path: Path, mib: int) -> Path:
    """A raw disk with an ext4 file system and some files in it."""
    content = path.with_suffix(".content")
    content.mkdir()
    for index in range(8):
        (content / f"old{index}").write_bytes(random.Random(index).randbytes(200_000))
    run("mke2fs", "-q", "-t", "ext4", "-d", content, path, f"{mib}M")
    return path
