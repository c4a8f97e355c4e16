"""Boot a guest on a qcow2 disk that we serve, then on QEMU's own qcow2; then load both servers without a guest.

Run it through `make demo`, which installs what it needs.
"""

import argparse
import bisect
import fcntl
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from comparison import Cost, FioRun, Outcome, print_comparison
from guest import (
    Backend,
    Failure,
    Guest,
    Kernel,
    Result,
    builtin_disk,
    debian_kernel,
    find_program,
    initramfs,
    installed_program,
    vhost_user_disk,
)
from race import SECONDS, print_race, run_race

from bench.load import LoadFailure
from bench.server import ServerFailure

IMAGE_SIZE = "10G"
IMAGE_OPTIONS = "compat=1.1,lazy_refcounts=on"
# Seconds, once the kernel is here: two minutes in all, also on a busy machine. The jobs of the guests end by the clock;
# booting one takes 7 s, on a busy machine 30.
TIME, GUESTS_TIME = 118, 84
MARGIN = 10  # for starting servers and removing images
KVM_TIMEOUT = 5  # a guest that does nothing takes less than two where KVM works
GUEST_CPUS = 2
WITH = {"kvm": "KVM", "tcg": "emulated, because no guest starts with KVM here"}

# The files are much larger than what is written, so nearly every cluster touched is a new one.
JOB = """
fio() {
    name=$1; shift
    command fio --name=$name --directory=/mnt --rw=randwrite --bs=4k --verify=crc32c --verify_fatal=1 \
        --verify_backlog=16 --eta=never --output=/tmp/$name --output-format=json "$@"
    report $name /tmp/$name
}
echo "mkfs.ext4 /dev/vda"
mkfs.ext4 -q /dev/vda
mount -o noinit_itable /dev/vda /mnt
echo "4 KiB random writes, 32 at a time, read back as it goes, 5 s"
fio deep --filesize=2G --io_size=32M --runtime=5 --ioengine=libaio --direct=1 --iodepth=32
echo "4 KiB random writes, one at a time, each followed by fsync, read back as it goes, 3 s"
fio single --filesize=1G --io_size=4M --runtime=3 --ioengine=psync --fsync=1
umount /mnt
report requests /sys/block/vda/stat
"""

QEMU_AIO_WRITE, QEMU_AIO_FLUSH = 2, 8
SUBMISSION = re.compile(r"offset (\d+) nbytes \d+ type (\d+)")


def main() -> int:
    """Run the demo; 0 if every check passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where kernel and images go (%(default)s)")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # QEMU aborts on some half-working KVMs
    try:
        return 0 if demonstrate(parser.parse_args().cache.resolve()) else 1
    except (Failure, ServerFailure, LoadFailure, OSError, subprocess.CalledProcessError) as failure:
        print(f"demo: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def demonstrate(cache: Path) -> bool:
    """Show everything, with images below *cache*, which should be on a real disk; True if all was clean."""
    say = stopwatch()
    kernel = debian_kernel(cache / "guest", say)
    start = time.monotonic()
    with workplace(cache / "demo") as directory:
        is_clean = compare_guests(kernel, directory, say, deadline=start + GUESTS_TIME)
        _empty(directory)  # which takes its time on a busy disk: 22 s were seen
        left = start + TIME - MARGIN - time.monotonic()
        race = run_race(directory, say, seconds=max(1, min(SECONDS, round(left / 2))))
    print_race(race, cache / "demo.svg")
    return is_clean


@contextmanager
def workplace(directory: Path) -> Iterator[Path]:
    """Make *directory*, empty, for this demo only, and remove it, also when told to end by a signal.

    What a demo left there that was killed goes first.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))
    directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Failure(f"{directory}: another demo is at work") from None
    try:
        _empty(directory)
        yield directory
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # or another one stops the removal half-way
        _empty(directory)
        directory.rmdir()
        os.close(lock)


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()


def compare_guests(kernel: Kernel, directory: Path, say: Callable[[str], None], *, deadline: float) -> bool:
    """Run the job in a guest on our disk and in one on QEMU's; False if anything failed, which is said."""
    initrd = initramfs(kernel, directory / "initrd")
    accelerator = fastest_accelerator(kernel, initrd)
    say(f"guest: Linux {kernel.release}, initramfs of {initrd.stat().st_size >> 20} MiB, {WITH[accelerator]}")

    def boot(disk: Sequence[str]) -> Result:
        show = lambda line: say(f"  guest | {line}")  # noqa: E731
        guest = Guest(kernel, initrd, JOB, disk, accelerator=accelerator, cpus=GUEST_CPUS, on_line=show)
        with guest:
            return guest.finish(deadline - time.monotonic())

    try:
        ours, theirs = run_ours(directory, boot, say), run_theirs(directory, boot, say)
    except Failure as failure:
        print(f"demo: {failure}", file=sys.stderr)  # what follows needs no guest
        return False
    print_comparison(ours, theirs)
    if accelerator == "tcg":
        print("\nAn emulated guest is its own limit; without one it shows what the servers can do.")
    print(flush=True)
    return ours.is_clean and theirs.is_clean


def fastest_accelerator(kernel: Kernel, initrd: Path) -> str:
    """KVM where a guest really starts with it; /dev/kvm alone says too little."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    try:
        with Guest(kernel, initrd, "true", accelerator="kvm") as guest:
            guest.finish(KVM_TIMEOUT)
    except Failure:
        return "tcg"
    return "kvm"


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
