"""`python -m bench.guest`: fio inside the same guest, on our daemon and on QEMU's built-in qcow2, in turns.

Needs `examples` on the path, where the guest lives; `make compare` sees to it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from guest import (
    Backend,
    Failure,
    Guest,
    debian_kernel,
    find_program,
    initramfs,
    installed_program,
    vhost_user_disk,
)

from bench.machine import Machine, describe
from bench.ratio import Ratio
from bench.watch import stopwatch

IMAGE_SIZE, IMAGE_OPTIONS = "10G", "compat=1.1,lazy_refcounts=on"
CACHES = ("writethrough", "writeback")
CPUS = 2


@dataclass(frozen=True, slots=True)
class Task:
    """One fio job on the whole disk of the guest."""

    name: str
    title: str
    arguments: str


# In this order on one disk: what comes first finds it fresh, "over" and "read" use the part that "fill" wrote.
TASKS = (
    Task("fresh-1", "4 KiB random writes, fresh, depth 1", "--rw=randwrite --iodepth=1 --offset=1G --size=9G"),
    Task("fresh-32", "4 KiB random writes, fresh, depth 32", "--rw=randwrite --iodepth=32 --offset=1G --size=9G"),
    Task("over-32", "4 KiB random overwrites, depth 32", "--rw=randwrite --iodepth=32 --size=64M"),
    Task("read-1", "4 KiB random reads, depth 1", "--rw=randread --iodepth=1 --size=64M"),
    Task("read-32", "4 KiB random reads, depth 32", "--rw=randread --iodepth=32 --size=64M"),
)


@dataclass(frozen=True, slots=True)
class Series:
    """One task in one cache mode: IOPS on both disks, pair by pair."""

    cache: str
    task: Task
    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    @property
    def ratio(self) -> Ratio:
        return Ratio.of_pairs(self.ours, self.theirs)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.guest", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--pairs", type=int, default=5, help="boots of each guest, in turns (%(default)s)")
    add("--seconds", type=int, default=5, help="for each fio job (%(default)s)")
    add("--cache", choices=CACHES, action="append", help="cache mode of both disks (both, one after the other)")
    add("--directory", type=Path, default=Path(".cache"), help="kernel and images go here (%(default)s)")
    add("--output", type=Path, default=Path("bench/results"), help="guest.json, guest.md (%(default)s)")
    options = parser.parse_args()
    try:
        machine, series = compare(options.directory.resolve(), options.cache or CACHES, options.pairs, options.seconds)
    except Failure as failure:
        print(f"bench: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    store(machine, series, options.output)
    return 0


def compare(directory: Path, caches: Sequence[str], pairs: int, seconds: int) -> tuple[Machine, list[Series]]:
    """Boot the guest on both disks, *pairs* times in every cache mode."""
    say = stopwatch()
    kernel = debian_kernel(directory / "guest", say)
    with tempfile.TemporaryDirectory(dir=directory, prefix="bench-") as name:
        work = Path(name)
        machine = describe(work)
        initrd = initramfs(kernel, work / "initrd")

        def boot(disk: Sequence[str]) -> dict[str, float]:
            with Guest(kernel, initrd, script(seconds), disk, cpus=CPUS) as guest:
                result = guest.finish(120 + 10 * seconds * len(TASKS))
            return {task.name: iops(result.files[task.name]) for task in TASKS}

        return machine, [one for cache in caches for one in in_turns(work, cache, pairs, boot, say)]


def in_turns(
    work: Path,
    cache: str,
    pairs: int,
    boot: Callable[[Sequence[str]], dict[str, float]],
    say: Callable[[str], None],
) -> list[Series]:
    """A B A B in one cache mode."""
    ours, theirs = [], []
    for number in range(1, pairs + 1):
        ours.append(on_ours(work, cache, boot))
        theirs.append(on_theirs(work, cache, boot))
        found = (f"{task.name} {ours[-1][task.name] / theirs[-1][task.name]:.2f} x" for task in TASKS)
        say(f"{cache}, pair {number} of {pairs}: {', '.join(found)}")
    return [
        Series(cache, task, tuple(run[task.name] for run in ours), tuple(run[task.name] for run in theirs))
        for task in TASKS
    ]


def on_ours(work: Path, cache: str, boot: Callable[[Sequence[str]], dict[str, float]]) -> dict[str, float]:
    image, socket_path = work / "ours.qcow2", work / "disk.sock"
    create(image)
    program = installed_program("vhost-user-qcow2")
    command = [program, f"--socket-path={socket_path}", f"--blk-file={image}", f"--cache={cache}"]
    with Backend([str(word) for word in command], socket_path) as daemon:
        found = boot(vhost_user_disk(socket_path))
        daemon.stop()
    return found


def on_theirs(work: Path, cache: str, boot: Callable[[Sequence[str]], dict[str, float]]) -> dict[str, float]:
    """QEMU's own qcow2, with an I/O thread as a well-made guest has."""
    image = work / "qemu.qcow2"
    create(image)
    drive = f"if=none,id=disk,file={image},format=qcow2,cache={cache},aio=io_uring,discard=unmap"
    return boot(["-object", "iothread,id=io", "-drive", drive, "-device", "virtio-blk-pci,drive=disk,iothread=io"])


def create(image: Path) -> None:
    image.unlink(missing_ok=True)
    command = [find_program("qemu-img", "qemu-utils"), "create", "-q", "-f", "qcow2", "-o", IMAGE_OPTIONS, image]
    subprocess.run([*map(str, command), IMAGE_SIZE], stdin=subprocess.DEVNULL, check=True)


def script(seconds: int) -> str:
    """What the guest does."""
    lines = ["fio --name=fill --filename=/dev/vda --rw=write --bs=1M --size=64M --direct=1 --output=/tmp/fill"]
    for task in TASKS:
        common = "--filename=/dev/vda --bs=4k --ioengine=libaio --direct=1 --norandommap --time_based --eta=never"
        output = f"--runtime={seconds} --output-format=json --output=/tmp/{task.name}"
        lines += [f"fio --name={task.name} {common} {output} {task.arguments}", f"report {task.name} /tmp/{task.name}"]
    return "\n".join(lines)


def iops(report: str) -> float:
    (job,) = json.loads(report)["jobs"]
    return float(job["read"]["iops"] or job["write"]["iops"])


def store(machine: Machine, series: Sequence[Series], directory: Path) -> None:
    """Write guest.json and guest.md, and print the table."""
    directory.mkdir(parents=True, exist_ok=True)
    records = [asdict(one) | {"ratio": asdict(one.ratio), "verdict": one.ratio.verdict(None)} for one in series]
    (directory / "guest.json").write_text(json.dumps({"machine": asdict(machine), "series": records}, indent=1) + "\n")
    rows = [
        "| cache | fio in the guest | ours, IOPS | QEMU's qcow2, IOPS | ratio | verdict |",
        "|---|---|--:|--:|--:|---|",
    ]
    for one in series:
        ours, theirs = (f"{statistics.median(runs):,.0f}" for runs in (one.ours, one.theirs))
        verdict = one.ratio.verdict(None)
        rows.append(f"| {one.cache} | {one.task.title} | {ours} | {theirs} | {one.ratio} | {verdict} |")
    text = "\n".join(rows) + "\n"
    (directory / "guest.md").write_text(text)
    print(text)


if __name__ == "__main__":
    sys.exit(main())
