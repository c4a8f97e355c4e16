"""``python -m tests.vm``: record a guest's work on daemons under `--trace-io`, and survey its crash states."""

import argparse
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from guest import Backend, Guest, debian_kernel, initramfs, installed_program  # noqa: E402

from tests.crash.explorer import Violation  # noqa: E402
from tests.crash.recorded import Recorded  # noqa: E402
from tests.crash.survey import Survey  # noqa: E402
from tests.vm.recording import CLUSTER_SECTORS, record  # noqa: E402


def main() -> int:
    """Print a line a kind of disk; the exit status: 1 if a law was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm", description=__doc__)
    parser.add_argument("--mib", type=int, default=64, help="size of each disk (default: 64)")
    parser.add_argument("--writes", type=int, default=250, help="of each of the four fio jobs (default: 250)")
    parser.add_argument("--points", type=int, default=200, help="crash points of each disk (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="draws the points and the states (default: 0)")
    given = parser.parse_args()
    with TemporaryDirectory(prefix="survey-") as directory:
        recordings = record_guest(Path(directory), given.mib, given.writes)
    outcomes = [survey(name, recorded, given.points, given.seed) for name, recorded in recordings.items()]
    return 0 if all(outcomes) else 1


def record_guest(directory: Path, mib: int, writes: int) -> dict[str, Recorded]:
    """Boot the guest and let it work."""
    kernel = debian_kernel(ROOT / ".cache" / "guest", print)
    initrd = initramfs(kernel, directory / "initrd")

    def boot(job: str, disks: list[str], *, cpus: int) -> Guest:
        return Guest(kernel, initrd, job, disks, cpus=cpus)

    def serve(image: Path, *options: str) -> Backend:
        socket_path = image.with_suffix(".sock")
        program = installed_program("vhost-user-qcow2")
        return Backend([program, f"--socket-path={socket_path}", f"--blk-file={image}", *options], socket_path)

    return record(boot, serve, directory, mib=mib, writes=writes)


def survey(name: str, recorded: Recorded, points: int, seed: int) -> bool:
    """Visit the states of one disk's trace; whether all of them are as the laws allow."""
    began = time.monotonic()
    one = Survey(recorded, CLUSTER_SECTORS, seed)
    try:
        one.visit(points)
    except Violation as violation:
        print(f"{name}: {violation}", flush=True)
        return False
    finally:
        counts = (
            f"{recorded.requests} requests, {len(recorded.journal)} events, {one.points} points, {one.states} states"
        )
        print(f"{name}: {counts}; seed {seed}, {time.monotonic() - began:.0f} s", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
