"""What a connected server that nobody asks anything costs."""

import time
from contextlib import ExitStack
from pathlib import Path

from bench.frontend import FrontEnd
from bench.load import Job, Load, memory_nbytes
from bench.measurement import Command
from bench.server import Server, connect, listen

BUSY_SECONDS = 0.2  # of load before: what a server does only for a while after work is part of the figure
SETTLE_SECONDS = 1.0


def idle_share(command: Command, job: Job, seconds: float) -> float:
    """Connect, load with *job* for a moment, then watch for *seconds* -> processor time, as a share of one core.

    Raises: ServerFailure, LoadFailure, OSError.
    """
    listening, address = listen()
    with ExitStack() as stack:
        server = stack.enter_context(Server(command(listening.fileno()), listening))
        front_end = FrontEnd(connect(address), queues=job.queues, nbytes=memory_nbytes(job))
        with front_end, Load(job, front_end) as load:
            load.run(BUSY_SECONDS)
            load.drain()
            time.sleep(SETTLE_SECONDS)
            before, clock = _run_nanoseconds(server.pid), time.monotonic()
            time.sleep(seconds)
            return (_run_nanoseconds(server.pid) - before) / 1e9 / (time.monotonic() - clock)


def _run_nanoseconds(pid: int) -> int:
    """Time that the threads of *pid* have run, finer than the clock ticks of its stat."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat"))
