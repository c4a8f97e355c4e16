"""What the disk itself allows, measured by fio in the same run: no image format, no guest, no socket."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Ceiling:
    """One fio job. The files: "filled" is 1 GiB of data, "fresh" a hole as large as a fresh image."""

    name: str
    file: str
    arguments: tuple[str, ...]


def _uring(depth: int) -> tuple[str, ...]:
    return ("--ioengine=io_uring", f"--iodepth={depth}")


RANDOM_READ, RANDOM_WRITE = ("--rw=randread", "--bs=4k"), ("--rw=randwrite", "--bs=4k")
LONE = ("--ioengine=psync", "--fdatasync=1")
GROUP = (*_uring(32), "--iodepth_batch=32", "--iodepth_batch_complete_min=32", "--fdatasync=32")

CEILINGS = (
    Ceiling("warm read, depth 32", "filled", (*RANDOM_READ, *_uring(32))),
    Ceiling("warm read, depth 1", "filled", (*RANDOM_READ, *_uring(1))),
    Ceiling("warm overwrite, depth 32", "filled", (*RANDOM_WRITE, *_uring(32))),
    Ceiling("warm overwrite, depth 1", "filled", (*RANDOM_WRITE, *_uring(1))),
    Ceiling("direct read, depth 32", "filled", (*RANDOM_READ, *_uring(32), "--direct=1")),
    Ceiling("direct overwrite, depth 32", "filled", (*RANDOM_WRITE, *_uring(32), "--direct=1")),
    Ceiling("direct sequential read", "filled", ("--rw=read", "--bs=128k", *_uring(16), "--direct=1")),
    Ceiling("direct sequential write", "fresh", ("--rw=write", "--bs=128k", *_uring(16), "--direct=1")),
    Ceiling("64 KiB write, fresh", "fresh", ("--rw=write", "--bs=64k", "--ioengine=psync")),
    Ceiling("single commit, fresh", "fresh", (*RANDOM_WRITE, *LONE)),
    Ceiling("single commit, written", "filled", (*RANDOM_WRITE, *LONE)),
    Ceiling("group commit, fresh", "fresh", (*RANDOM_WRITE, *GROUP)),
    Ceiling("group commit, written", "filled", (*RANDOM_WRITE, *GROUP)),
)
FILLED_NBYTES, FRESH_NBYTES = 1 << 30, 64 << 30


def measure_ceilings(
    wanted: set[str], directory: Path, *, seconds: float, say: Callable[[str], None]
) -> dict[str, float]:
    """Run the jobs called *wanted* in *directory* -> IOPS by name. Raises: CalledProcessError."""
    files = {"filled": directory / "ceiling.filled", "fresh": directory / "ceiling.fresh"}
    found = {}
    try:
        with files["filled"].open("wb"):
            _fio("fill", files["filled"], FILLED_NBYTES, ("--rw=write", "--bs=1m", "--end_fsync=1"))
        for ceiling in CEILINGS:
            if ceiling.name not in wanted:
                continue
            files["fresh"].unlink(missing_ok=True)
            nbytes = FILLED_NBYTES if ceiling.file == "filled" else FRESH_NBYTES
            timing = ("--time_based", f"--runtime={max(1, round(seconds))}")
            found[ceiling.name] = _fio("ceiling", files[ceiling.file], nbytes, (*ceiling.arguments, *timing))
            say(f"  {found[ceiling.name]:12,.0f}  {ceiling.name}: fio {' '.join(ceiling.arguments)}")
    finally:
        for file in files.values():
            file.unlink(missing_ok=True)
    return found


def _fio(name: str, file: Path, nbytes: int, arguments: tuple[str, ...]) -> float:
    """Run one job -> its IOPS."""
    where = (f"--filename={file}", f"--size={nbytes}", "--fallocate=none", "--invalidate=0")
    command = ("fio", "--output-format=json", f"--name={name}", *where, "--norandommap", "--randrepeat=0", *arguments)
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True)
    (job,) = json.loads(done.stdout)["jobs"]
    return float(job["read"]["iops"] or job["write"]["iops"])
