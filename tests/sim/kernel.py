"""The simulated kernel: files, eventfds and time; one seed decides what ends when, and how.

What files hold changes through the journal of `tests.crash.driver`, so that the crash explorer can visit every death of
a run. What is under way takes effect when it is begun or when it ends, as the seed says; some transfers are slow, some
are cut short, refused for now, or cancelled. A `Trouble` adds failures.
"""

import errno
import hashlib
import heapq
import random
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from typing import Any

from ring.host import Host
from ring.native import ffi, lib
from tests.crash.driver import (
    SECTOR,
    Completed,
    Effect,
    Entry,
    Issued,
    Mark,
    SimulatedFile,
    Stored,
    Synced,
)
from tests.sim import calls
from tests.sim.file import KernelFile, KernelMemory
from tests.sim.trouble import Lost, Trouble, Violation

READV, WRITEV, FSYNC, FALLOCATE, READ, WRITE = 1, 2, 3, 17, 22, 23  # enum io_uring_op
READS, WRITES = (READ, READV), (WRITE, WRITEV)
PUNCH, ZERO_RANGE = 2, 16  # FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE
NEVER = (1 << 64) - 1
FIRST_FD = 100
BLOCK = 4096  # of the host's file system
US, MS = 1_000, 1_000_000
FOREVER = 10_000 * MS  # nothing takes so long
SPIN = 100_000  # calls of the host that no life needs
PASSING = (errno.EAGAIN, errno.EINTR, errno.ECANCELED)  # nothing happened; whoever asked asks again


class Now(Executor):
    """A pool that has computed when it is asked; its answer takes until the worker hears of it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@dataclass
class Job:
    """What was submitted and has not ended."""

    number: int  # of C
    opcode: int
    file: KernelFile
    offset: int
    result: int
    operation: int = 0  # of the journal
    effect: Effect | None = None
    is_late: bool = False
    covered: frozenset[int] = frozenset()
    data: bytes | None = None  # of a read that has looked already


class Kernel(Host):
    """One host over several lives of the process that asks it."""

    def __init__(self, seed: int, trouble: Trouble) -> None:
        self._seed = seed
        self.random = random.Random(seed)
        self.trouble = self._troubles = trouble  # now; and in each life at first
        self.journal: list[Entry | Lost] = []
        self.operations = 0
        self.pending: dict[int, SimulatedFile] = {}  # complete and not synced
        self.doomed: set[int] = set()  # lost to a failed sync: no later one makes them stable
        self.failures = 0  # that somebody was told of, in this life
        self.ever_failed = False
        self.sync_failed_at: int | None = None  # in the journal, in this life
        self.failed_at = 0  # the last time that anything else did
        self.life_began = 0
        self.files: dict[int, KernelFile] = {}
        self._far: dict[str, bool] = {}  # by path
        self.memories: list[KernelMemory] = []
        self.error: BaseException | None = None
        self.death: Callable[[], None] | None = None  # what is done once the process dies
        self.listeners: dict[int, Callable[[], None]] = {}  # of eventfds that somebody else waits for
        self.digest = hashlib.blake2b(digest_size=16)
        self.state: Any = lib.sim_state()
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._ticket = 0
        self._next_fd = FIRST_FD
        self.state.clock = 1_000_000
        self.reset()

    # lives

    def reset(self) -> None:
        """A new process asks: nothing is under way, nobody polls, nothing is due."""
        calls.answer_with(self)
        lib.sim_reset(self.random.getrandbits(63) | 1)
        for file in self.files.values():
            self._tell_of(file)
        self.state.turn = SPIN
        self.trouble = self._troubles
        self._events.clear()
        self.listeners.clear()
        self.death = None
        self.doomed.clear()  # a process that did not see it fail cannot know; nor does this model
        self.failures = 0
        self.sync_failed_at = None
        self.life_began = len(self.journal)
        self.is_full = False
        self._plan()
        if self.trouble.full or self.trouble.filled:
            self.at(self.random.randrange(1, 3 * MS), self._fill)

    def die_at(self, call: int, photograph: Callable[[], None]) -> None:
        """Kill the process at its *call*-th call; *photograph()* is called then."""
        self.death = photograph
        self.state.turn = call

    def _require_progress(self) -> None:
        if self.state.calls >= SPIN:
            raise Violation(f"{SPIN} calls in one life: it spins")

    @property
    def is_dead(self) -> bool:
        return bool(self.state.dead)

    @property
    def now(self) -> int:
        return int(self.state.clock)

    def note(self, *what: object) -> None:
        """Add to what tells histories apart."""
        self.digest.update(repr(what).encode())

    def mark(self, what: Any) -> int:
        """Note *what* in the journal -> its position."""
        self._look_at_memory()
        self.note("mark", what)
        self.journal.append(Mark(what))
        return len(self.journal) - 1

    # time

    def at(self, delay: int, action: Callable[[], None]) -> None:
        """Do *action* in *delay* ns."""
        self._ticket += 1
        heapq.heappush(self._events, (self.now + delay, self._ticket, action))
        self._plan()

    def _plan(self) -> None:
        self.state.due = self._events[0][0] if self._events else NEVER

    def turn(self) -> None:
        """Something is due."""
        if self.death is not None and self.state.calls >= self.state.turn:
            self._die()
            return
        self._require_progress()
        while self._events and self._events[0][0] <= self.now:
            heapq.heappop(self._events)[2]()
        self._plan()

    def _die(self) -> None:
        photograph, self.death = self.death, None
        self.note("death", self.state.calls, self.now)
        self.state.dead = 1
        assert photograph is not None
        photograph()

    def sleep(self, milliseconds: int) -> int:
        """The worker sleeps until it is woken -> 0 or -errno."""
        until = self.now + milliseconds * MS if milliseconds else NEVER
        began = self.now
        while not lib.sim_ready():
            if until == NEVER and (not self._events or self.now - began > FOREVER):
                raise Violation("the worker sleeps, and nothing will ever wake it")
            self.state.clock = max(self.now, min(until, self._events[0][0] if self._events else until))
            self.turn()
            if self.is_dead:
                return -errno.ESHUTDOWN
            if self.now >= until:
                break
        return 0

    def calm(self) -> None:
        """From now on nothing fails, and nothing takes long but what is under way."""
        ended, lasting = Trouble(short=0, passing=0, slow=0, stall=0, cold=0), self.trouble
        self.trouble = replace(ended, punches=lasting.punches, far=lasting.far, filled=lasting.filled)
        self.is_full = lasting.filled
        self.note("calm")

    def _fill(self) -> None:
        """The host is full, or has space again."""
        if self.trouble.filled:
            self.is_full = True
        if not self.trouble.full:
            return
        self.is_full = not self.is_full
        self.note("full", self.is_full)
        self.at(self.random.randrange(20 * US, 2 * MS), self._fill)

    # eventfds

    def eventfd(self) -> int:
        self._next_fd += 1
        return self._next_fd

    def signal(self, fd: int) -> None:
        if self.is_dead:
            return
        listener = self.listeners.get(fd)
        if listener is not None:
            self.at(self._little(), listener)
        else:
            self.at(self._little(), lambda: lib.sim_raise(fd))

    def close(self, fd: int) -> None:
        """Nothing is left of it."""

    def pool(self, nthreads: int, name: str) -> Executor:
        return Now()

    # files

    def add_file(self, file: KernelFile) -> None:
        """Give *file* a descriptor."""
        file.fd, file.direct_fd = self.eventfd(), self.eventfd()
        self.files[file.fd] = self.files[file.direct_fd] = file
        self._tell_of(file)

    def _tell_of(self, file: KernelFile) -> None:
        lib.sim_add_file(file.fd, file.direct_fd, self._is_far(file))

    def _is_far(self, file: KernelFile) -> bool:
        """All files are, or each is or is not for itself, whatever becomes of it."""
        if self.trouble.far and file.path not in self._far:
            self._far[file.path] = self._seed % 3 == 0 or self.random.random() < 0.5
        return self.trouble.far and self._far[file.path]

    def begin(self, number: int, opcode: int, fd: int, offset: int, nbytes: int, mode: int) -> None:
        """An entry was submitted."""
        self._look_at_memory()
        job = self._job(number, opcode, self.files[fd], offset, nbytes, mode, may_pass=True)
        self._take_effect(job)
        self.at(self._duration(), lambda: self._end(job))

    def perform(self, number: int, opcode: int, fd: int, offset: int, nbytes: int, mode: int) -> int:
        """Do it now, on the worker's thread -> its result."""
        self._look_at_memory()
        if opcode == READ and mode and self._happens(self.trouble.cold):
            return -errno.EAGAIN
        if self._happens(self.trouble.stall):
            self.state.clock += self.random.randrange(3, 30) * MS
        job = self._job(number, opcode, self.files[fd], offset, nbytes, mode, may_pass=False)
        job.is_late = False
        self._take_effect(job)
        self._complete(job)
        return job.result

    def length(self, fd: int) -> int:
        return self.files[fd].size

    def write_ahead(self, fd: int) -> int:
        return 0

    def resize(self, file: KernelFile, nbytes: int) -> None:
        """Cut or extend."""
        self._at_once(Effect("resize", file, 0, b"", nbytes))

    def store(self, address: int, data: bytes) -> None:
        """C has stored *data* there."""
        for memory in self.memories:
            if 0 <= address - memory.address < len(memory.content):
                memory.know(address - memory.address, len(data))
                self._look_at_memory()
                self.note("store", address - memory.address, data)
                self.journal.append(Stored(memory, address - memory.address, data))
                return
        raise Violation("a store to no memory of ours")

    def put(self, memory: KernelMemory, offset: int, data: bytes) -> None:
        """Python stores *data*."""
        self._look_at_memory()
        memory.store(offset, data)
        self.store(memory.address + offset, data)

    def _look_at_memory(self) -> None:
        """Note in the journal what C has changed since something was noted."""
        for memory in self.memories:
            change = memory.changed()
            if change is not None:
                self.journal.append(Stored(memory, *change))

    # what is under way

    def _job(
        self, number: int, opcode: int, file: KernelFile, offset: int, nbytes: int, mode: int, *, may_pass: bool
    ) -> Job:
        job = Job(number, opcode, file, offset, 0, is_late=self.random.random() < 0.5)
        if may_pass and self._happens(self.trouble.passing):
            job.result = -self.random.choice(PASSING[1:] if opcode == FSYNC else PASSING)
            return job
        fails = self._happens(self.trouble.failing_sync if opcode == FSYNC else self.trouble.failing)
        if opcode in READS:
            self._plan_read(job, nbytes, fails=fails)
        elif opcode in WRITES:
            self._plan_write(job, nbytes, fails=fails)
        elif opcode == FSYNC:
            self._plan_sync(job, fails=fails)
        elif opcode == FALLOCATE:
            self._plan_zero(job, nbytes, mode, fails=fails)
        else:
            raise Violation(f"opcode {opcode}")
        return job

    def _cut(self, offset: int, nbytes: int) -> int:
        """A transfer is cut short between sectors, as hosts do: a guest relies on whole ones."""
        first = SECTOR - offset % SECTOR
        borders = range(first, nbytes, SECTOR)
        return self.random.choice(borders) if borders and self._happens(self.trouble.short) else nbytes

    def _plan_read(self, job: Job, nbytes: int, *, fails: bool) -> None:
        job.result = -errno.EIO if fails else max(0, min(self._cut(job.offset, nbytes), job.file.size - job.offset))

    def _plan_write(self, job: Job, nbytes: int, *, fails: bool) -> None:
        if not job.file.writable:
            raise Violation(f"write to read-only {job.file.path}")
        buffer = bytearray(nbytes)
        lib.sim_job_load(job.number, ffi.from_buffer(buffer))
        if self.is_full and self._finds_no_space(job, nbytes):
            job.result = -errno.ENOSPC
            return
        job.result = self._cut(job.offset, nbytes)
        written = bytes(buffer[: job.result])
        if fails:
            written = bytes(buffer[: self.random.choice([0, *range(SECTOR - job.offset % SECTOR, nbytes, SECTOR)])])
            job.result = -(errno.ENOSPC if job.offset + nbytes > job.file.size else errno.EIO)
        if written:
            job.effect = Effect("write", job.file, job.offset, written, len(written))

    def _finds_no_space(self, job: Job, nbytes: int) -> bool:
        if not self.trouble.filled:
            return self._happens(0.8)
        blocks = range(job.offset // BLOCK, (job.offset + nbytes - 1) // BLOCK + 1)
        return any(random.Random(f"{self._seed} {job.file.path} {block}").random() < 0.7 for block in blocks)

    def _plan_zero(self, job: Job, nbytes: int, mode: int, *, fails: bool) -> None:
        if not self.trouble.punches and mode & PUNCH:
            job.result = -errno.EOPNOTSUPP
        elif fails:
            job.result = -errno.EIO
        else:
            job.effect = Effect("zero", job.file, job.offset, b"", nbytes)

    def _plan_sync(self, job: Job, *, fails: bool) -> None:
        covered = {number for number, file in self.pending.items() if file is job.file} - self.doomed
        if fails:
            job.result = -errno.EIO
            self.doomed |= covered
        job.covered = frozenset(covered)

    def _take_effect(self, job: Job) -> None:
        """What happens when it is begun."""
        self.note("begin", job.opcode, job.offset, job.result, job.is_late, job.effect and job.effect.data, self.now)
        if job.effect is not None:
            self.operations += 1
            job.operation = self.operations
            self.journal.append(Issued(job.operation, job.effect))
            if not job.is_late:
                job.effect.apply(job.file)
        elif job.opcode in READS and job.result > 0 and not job.is_late:
            job.data = job.file.read(job.offset, job.result)

    def _complete(self, job: Job) -> None:
        """What happens when it ends."""
        if job.effect is not None:
            if job.is_late:
                job.effect.apply(job.file)
            self.pending[job.operation] = job.file
            self.journal.append(Completed(job.operation, job.is_late))
        elif job.opcode in READS and job.result > 0:
            data = job.file.read(job.offset, job.result) if job.data is None else job.data
            lib.sim_job_store(job.number, data, len(data))
        elif job.opcode == FSYNC and job.result == 0:
            for number in job.covered:
                self.pending.pop(number, None)
            self.journal.append(Synced(job.file, job.covered))
        if job.result < 0 and -job.result not in (*PASSING, errno.EOPNOTSUPP):
            self.failures += 1
            self.ever_failed = True
            if job.opcode != FSYNC:
                self.failed_at = len(self.journal)
            elif self.sync_failed_at is None:
                self.sync_failed_at = len(self.journal)

    def _end(self, job: Job) -> None:
        self._look_at_memory()
        self.note("end", job.opcode, job.offset, job.result, self.now)
        self._complete(job)
        if job.result == -errno.ECANCELED and self._is_far(job.file):
            self.failures += 1  # nobody does it here: who waits is told
            self.ever_failed = True
        lib.sim_complete(job.number, job.result)

    def _at_once(self, effect: Effect) -> None:
        self.operations += 1
        self.journal.append(Issued(self.operations, effect))
        effect.apply(effect.file)
        self.pending[self.operations] = effect.file
        self.journal.append(Completed(self.operations))

    # chance

    def _happens(self, share: float) -> bool:
        return share > 0 and self.random.random() < share

    def _little(self) -> int:
        return self.random.randrange(200, 40 * US)

    def _duration(self) -> int:
        if self._happens(self.trouble.slow):
            return self.random.randrange(1 * MS, 50 * MS)
        return self.random.randrange(5 * US, 400 * US)
