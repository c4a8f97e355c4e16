"""One run of a load against one server."""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from bench.counting import Counted, Ending
from bench.frontend import FrontEnd
from bench.load import Job, Kind, Load, Outcome, memory_nbytes
from bench.process import TICK, MachineTime, cpu_seconds, resident_kib
from bench.server import Server, ServerFailure, connect, listen

Command = Callable[[int], Sequence[str]]  # of a server, given the number of its listening socket
WARM_ROUNDS = 2  # of the buffers of all requests in flight
IDLE_SECONDS = 0.05  # without a tick of processor time, after which a server has nothing left to do


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one run showed. Times in microseconds; None where a server does not say."""

    command: str
    seconds: float
    requests: int
    iops: float
    p50: float
    p99: float
    p999: float
    flushes: int
    flush_p50: float
    cpu_per_100k: float  # seconds of the server, all threads
    syncs_per_1000: float | None  # fdatasyncs for 1,000 acknowledged writes
    metadata_per_1000: float | None
    batch: float | None  # requests of the slow path taken at a time
    resident_at_rest_kib: int  # connected, before the first request
    resident_kib: int  # after the load
    kicks_per_1000: float
    others_busy: float  # share of the machine used by anything but the server and us, kernel threads included


def measure(command: Command, job: Job, *, warm_up: float, seconds: float, end: Ending) -> Measurement:
    """Start a server, load it for *warm_up* uncounted and *seconds* counted seconds, *end* it.

    Raises: ServerFailure, LoadFailure.
    """
    listening, address = listen()
    with ExitStack() as stack:
        server = stack.enter_context(Server(command(listening.fileno()), listening))
        try:
            front_end = FrontEnd(connect(address), queues=job.queues, nbytes=memory_nbytes(job), depth=job.depth)
            with front_end, Load(job, front_end) as load:
                run = _run(server, load, job, warm_up=warm_up, seconds=seconds)
        except OSError as error:
            raise ServerFailure(f"{server.command[0]}: {error}; it says: {server.complaints() or 'nothing'}") from error
        written = run.acknowledged if job.kind is Kind.WRITE else 0
        return _measurement(server.command, run, end(server, run.acknowledged, written))


@dataclass(frozen=True, slots=True)
class _Run:
    outcome: Outcome
    acknowledged: int  # writes until nothing was in flight any more, without those of the warm-up
    cpu: float  # seconds of the server
    resident_at_rest_kib: int
    resident_kib: int
    others_busy: float


def _run(server: Server, load: Load, job: Job, *, warm_up: float, seconds: float) -> _Run:
    """Of discards the work that a server puts off counts as well: clusters that it gives back later."""
    at_rest = resident_kib(server.pid)
    if warm_up:
        load.run(warm_up)
        while load.outcome().requests < WARM_ROUNDS * job.depth * job.queues:  # or it meets pages for the first time
            load.run(warm_up)
    load.reset()
    cpu, own, machine, clock = cpu_seconds(server.pid), time.process_time(), MachineTime.now(), time.monotonic()
    load.run(seconds)
    while not (outcome := load.outcome()).requests:
        load.run(seconds)  # a slow disk and a short run
    if job.kind is Kind.DISCARD:
        outcome = replace(outcome, seconds=outcome.seconds + _until_idle(server))
    cpu, own = cpu_seconds(server.pid) - cpu, time.process_time() - own
    after = MachineTime.now()
    available = (time.monotonic() - clock) * (os.cpu_count() or 1)
    others = after.busy + after.stolen - machine.busy - machine.stolen - cpu - own
    loaded = resident_kib(server.pid)
    load.drain()
    acknowledged = load.outcome().writes
    return _Run(outcome, acknowledged, cpu, at_rest, loaded, max(0.0, others / available))


def _until_idle(server: Server) -> float:
    """Wait until the server does nothing any more -> the seconds it took."""
    start = time.monotonic()
    cpu = cpu_seconds(server.pid)
    while True:
        time.sleep(IDLE_SECONDS)
        if -cpu + (cpu := cpu_seconds(server.pid)) < TICK:
            return time.monotonic() - start - IDLE_SECONDS


def _measurement(command: Sequence[str], run: _Run, counted: Counted | None) -> Measurement:
    outcome = run.outcome
    return Measurement(
        command=" ".join(command),
        seconds=outcome.seconds,
        requests=outcome.requests,
        iops=outcome.iops,
        p50=outcome.latencies.percentile(50) / 1e3,
        p99=outcome.latencies.percentile(99) / 1e3,
        p999=outcome.latencies.percentile(99.9) / 1e3,
        flushes=outcome.flushes,
        flush_p50=outcome.flush_latencies.percentile(50) / 1e3,
        cpu_per_100k=run.cpu / outcome.requests * 1e5,
        syncs_per_1000=counted.syncs_per_1000 if counted else None,
        metadata_per_1000=counted.metadata_per_1000 if counted else None,
        batch=counted.batch if counted else None,
        resident_at_rest_kib=run.resident_at_rest_kib,
        resident_kib=run.resident_kib,
        kicks_per_1000=outcome.kicks / outcome.requests * 1e3,
        others_busy=run.others_busy,
    )
