"""Boot a guest on a lazy-refcounts qcow2 disk that we serve, then on QEMU's own qcow2, and compare what it cost.

Run it through `make demo`, which installs what it needs.
"""

import argparse
import bisect
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from comparison import Cost, FioRun, Outcome, print_comparison
from guest import (
    Backend,
    Failure,
    Guest,
    Result,
    builtin_disk,
    debian_kernel,
    find_program,
    initramfs,
    installed_program,
    vhost_user_disk,
)

IMAGE_SIZE = "10G"
IMAGE_OPTIONS = "compat=1.1,lazy_refcounts=on"
GUEST_TIMEOUT = 80  # its jobs end by the clock; booting takes 30 s on a busy machine
GUEST_CPUS = 2

# The files are much larger than what is written, so nearly every cluster touched is a new one.
JOB = """
fio() {
    name=$1; shift
    command fio --name=$name --directory=/mnt --rw=randwrite --bs=4k --verify=crc32c --verify_fatal=1 \
        --verify_backlog=256 --eta=never --output=/tmp/$name --output-format=json "$@"
    report $name /tmp/$name
}
echo "mkfs.ext4 /dev/vda"
mkfs.ext4 -q /dev/vda
mount -o noinit_itable /dev/vda /mnt
echo "4 KiB random writes, 32 at a time, read back as it goes, 8 s"
fio deep --filesize=2G --io_size=32M --runtime=8 --ioengine=libaio --direct=1 --iodepth=32
echo "4 KiB random writes, one at a time, each followed by fsync, read back as it goes, 5 s"
fio single --filesize=1G --io_size=4M --runtime=5 --ioengine=psync --fsync=1
umount /mnt
report requests /sys/block/vda/stat
"""

QEMU_AIO_WRITE, QEMU_AIO_FLUSH = 2, 8
SUBMISSION = re.compile(r"offset (\d+) nbytes \d+ type (\d+)")


def main() -> int:
    """Run the demo; 0 if every check passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where kernel and images go (%(default)s)")
    try:
        return 0 if compare(parser.parse_args().cache.resolve()) else 1
    except Failure as failure:
        print(f"demo: {failure}", file=sys.stderr)
        return 1


def compare(cache: Path) -> bool:
    """Run the job on our disk and on QEMU's, below *cache*, which should be on a real disk; True if all was clean."""
    say = stopwatch()
    kernel = debian_kernel(cache / "guest", say)
    # Kept afterwards for a look at the images, and because removing them at once is slow: where the file system is
    # mounted with discard, a busy disk took 80 s for it.
    directory = cache / "demo"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    initrd = initramfs(kernel, directory / "initrd")
    say(f"guest: Linux {kernel.release}, initramfs of {initrd.stat().st_size >> 20} MiB, QEMU without KVM")

    def boot(disk: Sequence[str]) -> Result:
        with Guest(kernel, initrd, JOB, disk, cpus=GUEST_CPUS, on_line=lambda line: say(f"  guest | {line}")) as guest:
            return guest.finish(GUEST_TIMEOUT)

    ours, theirs = run_ours(directory, boot, say), run_theirs(directory, boot, say)
    print_comparison(ours, theirs)
    print(f"\nThe images are in {directory}.")
    return ours.is_clean and theirs.is_clean


def run_ours(directory: Path, boot: Callable[[Sequence[str]], Result], say: Callable[[str], None]) -> Outcome:
    """Serve a fresh image with our daemon in writethrough."""
    image, socket_path = directory / "ours.qcow2", directory / "disk.sock"
    create_image(image, say)
    command = [str(installed_program("vhost-user-qcow2")), f"--socket-path={socket_path}", f"--blk-file={image}"]
    options = ["--cache=writethrough", "--stats"]
    say(f"vhost-user-qcow2 --socket-path={socket_path.name} --blk-file={image.name} {' '.join(options)}")
    with Backend([*command, *options], socket_path) as daemon:
        result = boot(vhost_user_disk(socket_path))
        say("SIGTERM to vhost-user-qcow2")
        counters = daemon.stop()
    cost = Cost(metadata_writes=counters["metadata_writes"], syncs=counters["syncs"])
    return judged(image, result, cost, say)


def run_theirs(directory: Path, boot: Callable[[Sequence[str]], Result], say: Callable[[str], None]) -> Outcome:
    """Let QEMU serve an identical image in writethrough."""
    image, trace = directory / "qemu.qcow2", directory / "qemu.trace"
    create_image(image, say)
    say(f"the same guest and job on -drive if=virtio,cache=writethrough,format=qcow2,file={image.name}")
    result = boot(builtin_disk(image, cache="writethrough", trace=trace))
    return judged(image, result, traced_cost(trace, image), say)


def create_image(image: Path, say: Callable[[str], None]) -> None:
    say(f"qcow2 create -o {IMAGE_OPTIONS} {image.name} {IMAGE_SIZE}")
    run([installed_program("qcow2"), "create", "-o", IMAGE_OPTIONS, image, IMAGE_SIZE])


def judged(image: Path, result: Result, cost: Cost, say: Callable[[str], None]) -> Outcome:
    """Let our checker and QEMU's look at the image and put everything known about the run together."""
    verdicts = {}
    for judge, command in (("qcow2 check", installed_program("qcow2")), ("qemu-img check", qemu_img())):
        checked = run([command, "check", image], accept_failure=True)
        verdicts[judge] = "clean" if checked.returncode == 0 else f"FAILED ({checked.returncode})"
        say(f"{judge} {image.name}: {verdicts[judge]}")
        if checked.returncode:
            print(checked.stdout + checked.stderr, file=sys.stderr)
    report = json.loads(run([qemu_img(), "check", "--output=json", image], accept_failure=True).stdout)
    fields = [int(field) for field in result.files["requests"].split()]
    return Outcome(
        deep=FioRun.parse(result.files["deep"]),
        single=FioRun.parse(result.files["single"]),
        reads=fields[0],
        writes=fields[4],
        cost=cost,
        allocated_clusters=report["allocated-clusters"],
        verdicts=verdicts,
    )


def traced_cost(trace: Path, image: Path) -> Cost:
    """Sort QEMU's writes by where they went: guest data lies where `qemu-img map` says, all else is metadata."""
    mapped = json.loads(run([qemu_img(), "map", "--output=json", image]).stdout)
    extents = sorted((extent["offset"], extent["length"]) for extent in mapped if "offset" in extent)
    starts = [start for start, _length in extents]

    def is_metadata(host_offset: int) -> bool:
        index = bisect.bisect_right(starts, host_offset) - 1
        return index < 0 or host_offset >= sum(extents[index])

    submitted = [(int(offset), int(kind)) for offset, kind in SUBMISSION.findall(trace.read_text())]
    return Cost(
        metadata_writes=sum(kind == QEMU_AIO_WRITE and is_metadata(offset) for offset, kind in submitted),
        syncs=sum(kind == QEMU_AIO_FLUSH for _offset, kind in submitted),
    )


def stopwatch() -> Callable[[str], None]:
    """Return a function that prints a line with the time since now in front."""
    started = time.monotonic()
    return lambda line: print(f"[{time.monotonic() - started:6.1f} s] {line}", flush=True)


def qemu_img() -> Path:
    return find_program("qemu-img", "qemu-utils")


def run(command: Sequence[str | Path], *, accept_failure: bool = False) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode and not accept_failure:
        raise Failure(f"{' '.join(map(str, command))} failed: {done.stderr.strip()}")
    return done


if __name__ == "__main__":
    sys.exit(main())
