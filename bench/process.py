"""What /proc says of a process and of the whole machine."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

CPUCLOCK_SCHED = 2  # of a process: clock_getcpuclockid(3), which Python does not offer
TICK = 1 / os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads of *pid* so far, those that have ended included."""
    return time.clock_gettime((~pid << 3) | CPUCLOCK_SCHED)  # finer than the clock ticks of its stat


def resident_kib(pid: int) -> int:
    """Resident memory of *pid* of its own: neither the guest's nor mapped files', whose pages the page cache has."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    sizes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if "kB" in rest}
    return sizes["RssAnon"]


@dataclass(frozen=True, slots=True)
class MachineTime:
    """Processor time of the whole machine so far, in seconds."""

    busy: float
    stolen: float  # by the hypervisor, for other machines

    @classmethod
    def now(cls) -> "MachineTime":
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(
            int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        )
        return cls((user + nice + system + irq + softirq) * TICK, steal * TICK)
