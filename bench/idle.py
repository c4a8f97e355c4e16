"""What a connected server that nobody asks anything costs."""

import time
from contextlib import ExitStack

from bench.frontend import FrontEnd
from bench.load import Job, Load, memory_nbytes
from bench.measurement import Command
from bench.process import cpu_seconds
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
            before, clock = cpu_seconds(server.pid), time.monotonic()
            time.sleep(seconds)
            return (cpu_seconds(server.pid) - before) / (time.monotonic() - clock)
