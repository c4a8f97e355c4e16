"""What serves a disk on the simulated kernel: the worker that ships, on this thread, and the engine's drivers."""

from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any, TypeVar

from qcow2.driver import operation as op
from qcow2.error import ImageError
from qcow2.plane.linklog import RECORD_BYTES, RECORDS_OFFSET
from ring.aio import Aio, WorkerOptions
from ring.worker import Worker
from tests.crash.driver import CrashDriver, SimulatedFile
from tests.crash.explorer import Violation as CrashViolation
from tests.crash.images import LOG_CAPACITY
from tests.sim.file import KernelFile, KernelMemory
from tests.sim.guest import Guest
from tests.sim.kernel import Kernel
from tests.sim.trouble import Dead, Trouble, Violation
from vhost.disk import ImageBackend
from vhost.option import CacheMode
from vhost.ringdriver import RingDriver
from virtio.native import NativeBlock


class SimulatedWorker(Worker):
    """The worker on this thread, a round at a time."""

    def open(self) -> None:
        self._control = self._host.eventfd()
        self._open = True
        self._open_native()

    @property
    def control_fd(self) -> int:
        return self._control

    @property
    def is_draining(self) -> bool:
        return bool(self._draining)

    def turn(self) -> None:
        """Serve until there is something for Python, and do that."""
        self._turn()
        self._run_calls()

    def finish(self) -> None:
        """Drain every queue and operation."""
        self._drain()

    def abandon(self) -> None:
        """Give back what it holds, whatever state it is in."""
        self._close()


class SimulatedDriver(RingDriver):
    """The engine's operations on the worker; the few that no worker does, on the kernel."""

    kernel: Kernel  # of the history under way

    def _may_hang(self, file: op.File) -> bool:
        return False

    def _size(self, operation: op.Size) -> int:
        file: Any = operation.file
        return int(file.size)

    def _resize(self, operation: op.Resize) -> None:
        file: Any = operation.file
        if not self.kernel.is_dead:
            self.kernel.resize(file, operation.nbytes)

    def _store(self, operation: op.Store) -> None:
        if self.kernel.is_dead:
            return
        memory: Any = operation.memory
        for offset, data in operation.parts:
            self.kernel.put(memory, offset, data)
        if operation.mark is not None:
            try:
                self._write_mark(operation.mark)
            except OSError:
                operation.undo()
                raise


class Block(NativeBlock):
    """Tells what C has noted."""

    @property
    def takes_no_writes(self) -> bool:
        return bool(self._block.failed)


W = TypeVar("W", bound=SimulatedWorker)


class Served:
    """A disk, its kernel and its guest."""

    writethrough: bool

    def __init__(self, seed: int, trouble: Trouble) -> None:
        self.seed = seed
        self.kernel = Kernel(seed, trouble)
        SimulatedDriver.kernel = self.kernel
        self.random: Random = self.kernel.random
        self.guest: Guest | None = None

    # files, with a driver that writes to the same journal

    def _file(self, content: SimulatedFile) -> KernelFile:
        file = KernelFile(content.path, dict(content.sectors), content.size)
        self.kernel.add_file(file)
        return file

    def _add_memory(self, file: KernelFile, more: int = 0) -> None:
        """Let *file* have a link log, with *more* bytes behind its records."""
        memory = KernelMemory(RECORDS_OFFSET + LOG_CAPACITY * RECORD_BYTES + more)
        file.memory = memory
        self.kernel.memories.append(memory)

    def _blocking(self, *, dies_at: int | None) -> CrashDriver:
        count = 0

        def fault(operation: op.Operation) -> OSError | None:
            nonlocal count
            count += 1
            if count == dies_at:
                raise Dead
            return None

        driver = CrashDriver(self.random.getrandbits(32), fault=fault)
        journal: Any = self.kernel.journal
        driver.journal = journal
        driver._pending = self.kernel.pending
        driver.operations = self.kernel.operations
        return driver

    def _through(self, coroutine: Any, *, dies_at: int | None = None) -> Any:
        driver = self._blocking(dies_at=dies_at)
        try:
            return driver.run(coroutine)
        except (ImageError, OSError, CrashViolation) as error:
            raise Violation(f"{type(error).__name__}: {error}") from error
        finally:
            self.kernel.operations = driver.operations
            self.kernel.note("blocking", driver.operations, len(self.kernel.journal))

    # serving

    @contextmanager
    def _serving(self, make: type[W], block: Block, held: Any) -> Iterator[tuple[W, ImageBackend]]:
        """*held* under *block* on a worker that *make* makes, until it ends or the process dies."""
        cache = CacheMode.WRITETHROUGH if self.writethrough else CacheMode.WRITEBACK
        backend = ImageBackend(held, cache=cache, driver=SimulatedDriver)
        options = WorkerOptions(Aio.IO_URING)
        worker = make(block, backend.start, options, host=self.kernel, on_queue_broken=self._tell_of_broken_queue)
        worker.open()
        try:
            block.set_writethrough(self.writethrough)
            backend.attach(worker, block)
            yield worker, backend
        finally:
            died = self.kernel.is_dead
            self.kernel.death = None
            self.kernel.state.dead = 1
            worker.abandon()
            self.kernel.state.dead = died

    def _tell_of_broken_queue(self, index: int, fault: str) -> None:
        raise Violation(f"queue {index}: {fault}")

    def _drain(self, worker: SimulatedWorker, guest: Guest) -> None:
        """Stop the rings; what was fetched is answered, what was not is the next daemon's."""
        for index, queue in enumerate(guest.queues):
            worker.drain_queue(index, lambda base, queue=queue: setattr(queue, "base", base))
        while worker.is_draining:
            worker.turn()

    def _let_guest_go(self) -> None:
        if self.guest is not None:
            self.guest.close()
            self.guest = None
