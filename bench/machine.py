"""Where a run was made: the machine, the versions, the commit."""

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.server import QEMU

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Machine:
    """What must be known to judge a figure."""

    processor: str
    cores: int
    memory_gib: float
    kernel: str
    file_system: str  # of the disk's directory
    versions: dict[str, str]
    commit: str  # "-dirty" at its end if files differed from it
    load_average: float  # at the start: who else was there


def describe(directory: Path, opponent: str = QEMU) -> Machine:
    """Describe this machine, for images in *directory*."""
    return Machine(
        processor=_processor(),
        cores=os.cpu_count() or 1,
        memory_gib=round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30), 1),
        kernel=platform.release(),
        file_system=_say("findmnt", "-n", "-o", "FSTYPE", "-T", str(directory)),
        versions={
            "python": platform.python_version(),
            "qemu": _say(opponent, "--version"),
            "fio": _say("fio", "--version"),
        },
        commit=_say("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        load_average=round(os.getloadavg()[0], 2),
    )


def command_line(module: str = "bench") -> str:
    return " ".join(["python", "-m", module, *sys.argv[1:]])


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _say(*command: str) -> str:
    """The first line a program prints, or "unknown" if it is not here."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.partition("\n")[0].strip() or "unknown"
