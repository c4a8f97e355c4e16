"""One suite for the drivers of the engine: what an operation promises does not depend on who keeps it."""

import errno
import os
import random
import subprocess
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from qcow2.driver import operation as op
from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.file import BlockingDriver, HostFile
from qcow2.driver.memory import SharedMemory
from qcow2.driver.pool import PoolDriver
from qcow2.driver.shared import SharedDriver
from qcow2.driver.task import Task
from ring.aio import Aio, WorkerOptions
from ring.worker import Worker
from tests.crash.driver import CrashDriver, SimulatedFile
from tests.patience import TIMEOUT
from vhost.ringdriver import RingDriver
from virtio.native import NativeBlock

CONTENT = bytes(range(1, 256)) * 64  # 16320 bytes: no multiple of a sector or a page
Run = Callable[[Coroutine[Any, Any, Any]], Any]


@dataclass(frozen=True)
class Rig:
    """A driver with one file that holds CONTENT."""

    file: op.File
    run: Run
    content: Callable[[], bytes]
    memory: op.Memory
    remembered: Callable[[], bytes]


@contextmanager
def shared(path: Path) -> Iterator[SharedMemory]:
    memory = SharedMemory(f"{path}.memory", 4096)
    try:
        yield memory
    finally:
        memory.remove()


@contextmanager
def blocking(path: Path) -> Iterator[Rig]:
    with HostFile.open(str(path), writable=True) as file, shared(path) as memory:
        yield Rig(file, BlockingDriver().run, path.read_bytes, memory, partial(memory.load, lambda user: True, 1 << 20))


@contextmanager
def pool(path: Path) -> Iterator[Rig]:
    with HostFile.open(str(path), writable=True) as file, shared(path) as memory, PoolDriver(3) as driver:
        yield Rig(file, driver.run, path.read_bytes, memory, partial(memory.load, lambda user: True, 1 << 20))


@contextmanager
def side_by_side(path: Path) -> Iterator[Rig]:
    driver = SharedDriver()
    with HostFile.open(str(path), writable=True) as file, shared(path) as memory:
        yield Rig(file, driver.run, path.read_bytes, memory, partial(memory.load, lambda user: True, 1 << 20))
        driver.close()


@contextmanager
def ring(path: Path, aio: Aio = Aio.AUTO) -> Iterator[Rig]:
    with HostFile.open(str(path), writable=True) as file, shared(path) as memory:
        with Worker(NativeBlock(size=0), lambda request: None, WorkerOptions(aio)) as worker:
            slot = worker.call(lambda: worker.add_file(file.fd))
            driver = RingDriver(worker, {file: slot}, None)
            run = partial(run_on_worker, worker, driver)
            yield Rig(file, run, path.read_bytes, memory, partial(memory.load, lambda user: True, 1 << 20))


def threads(path: Path) -> AbstractContextManager[Rig]:
    return ring(path, Aio.THREADS)


def run_on_worker(worker: Worker, driver: RingDriver, coroutine: Coroutine[Any, Any, Any]) -> Any:
    ended: Future[Task] = Future()
    worker.call(lambda: driver.run(coroutine, ended.set_result))
    task = ended.result(timeout=TIMEOUT)
    if task.error is not None:
        raise task.error
    return task.result


@contextmanager
def crash(path: Path) -> Iterator[Rig]:
    file = SimulatedFile.parse(str(path), CONTENT)
    driver = CrashDriver(seed=1)
    yield Rig(file, driver.run, file.content, file.memory, lambda: bytes(file.memory.content))


@pytest.fixture(
    params=[blocking, pool, side_by_side, ring, threads, crash],
    ids=["blocking", "pool", "shared", "ring", "threads", "crash"],
)
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    with request.param(path) as it:
        yield it


async def do(operation: op.Operation) -> Any:
    return await operation


async def all_of(coroutines: list[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Run them side by side and wait for all, as the engine does: Spawn and Signal."""
    results: list[Any] = [None] * len(coroutines)
    signals = [op.Signal() for _ in coroutines]

    async def one(index: int) -> None:
        results[index] = await coroutines[index]
        signals[index].set()

    for index in range(len(coroutines)):
        await op.Spawn(one(index))
    for signal in signals:
        await signal.wait()
    return results


RANGES = [(0, 1), (0, 512), (1, 511), (510, 5), (4095, 4098), (16000, 320), (16319, 1)]


@pytest.mark.parametrize(("start", "nbytes"), RANGES)
def test_read_returns_what_is_there(rig: Rig, start: int, nbytes: int) -> None:
    assert rig.run(do(op.Read(rig.file, start, nbytes))) == CONTENT[start : start + nbytes]


@pytest.mark.parametrize(("start", "nbytes"), [(16000, 1000), (16319, 2), (16320, 512), (1 << 30, 65536)])
def test_what_lies_past_the_end_reads_as_zeros(rig: Rig, start: int, nbytes: int) -> None:
    assert rig.run(do(op.Read(rig.file, start, nbytes))) == CONTENT[start:][:nbytes].ljust(nbytes, b"\0")


def test_read_into_fills_a_slice_and_nothing_around_it(rig: Rig) -> None:
    memory = bytearray(b"?" * 1000)
    target = MemoryBuffer(memoryview(memory)).slice(100, 700)
    rig.run(do(op.ReadInto(rig.file, 16000, target, data=True)))
    assert memory == b"?" * 100 + CONTENT[16000:] + bytes(380) + b"?" * 200


@pytest.mark.parametrize(("start", "nbytes"), [*RANGES, (16320, 100), (20000, 5000)])
def test_write_changes_its_range_and_nothing_else(rig: Rig, start: int, nbytes: int) -> None:
    data = b"\0" + b"n" * (nbytes - 1)
    rig.run(do(op.Write(rig.file, start, data)))
    before = CONTENT.ljust(start, b"\0")
    assert rig.content() == before[:start] + data + before[start + nbytes :]


def test_pieces_of_every_kind_are_written_one_after_the_other(rig: Rig) -> None:
    pieces = [b"ab", bytearray(b"cd"), memoryview(b"efgh")[1:3], MemoryBuffer(memoryview(b"xijx")).slice(1, 2), b""]
    rig.run(do(op.Write(rig.file, 3, *pieces)))
    assert rig.content()[:13] == CONTENT[:3] + b"abcdfgij" + CONTENT[11:13]


def test_more_pieces_than_one_system_call_takes(rig: Rig) -> None:
    rig.run(do(op.Write(rig.file, 0, *(bytes([number % 251]) for number in range(3000)))))
    assert rig.content()[:3000] == bytes(number % 251 for number in range(3000))


@pytest.mark.parametrize("nparts", [1, 40, 700])
def test_some_parts_are_written_or_as_they_were(rig: Rig, nparts: int) -> None:
    parts = [(number * 23, bytes([number % 251]) * 11) for number in range(nparts)]
    count = rig.run(do(op.WriteSome(rig.file, parts)))
    expected = bytearray(CONTENT)
    for offset, data in parts[:count]:
        expected[offset : offset + len(data)] = data
    assert 0 <= count <= nparts
    assert rig.content() == expected


def test_a_part_that_cannot_be_written_ends_them(rig: Rig) -> None:
    parts = [(0, b"first"), ((1 << 63) - 2, b"no place"), (99, b"third")]
    try:
        count = rig.run(do(op.WriteSome(rig.file, parts)))
    except OSError:
        count = 1
    assert count <= 1
    assert rig.content() == (b"first" + CONTENT[5:] if count else CONTENT)


@pytest.mark.parametrize(("start", "nbytes"), [(0, 16320), (5000, 1), (4096, 8192), (16000, 100000), (20000, 10)])
def test_zero_clears_its_range_and_keeps_the_length(rig: Rig, start: int, nbytes: int) -> None:
    rig.run(do(op.Zero(rig.file, start, nbytes)))
    cleared = len(CONTENT[start : start + nbytes])
    assert rig.content() == CONTENT[:start] + bytes(cleared) + CONTENT[start + cleared :]


@pytest.mark.parametrize("reserve", [False, True], ids=["", "reserve"])
@pytest.mark.parametrize("nbytes", [0, 1, 10000, 16320, 70000])
def test_resize_cuts_or_extends_with_zeros(rig: Rig, nbytes: int, reserve: bool) -> None:
    rig.run(do(op.Resize(rig.file, nbytes, reserve=reserve)))
    assert rig.content() == CONTENT[:nbytes].ljust(nbytes, b"\0")
    assert rig.run(do(op.Size(rig.file))) == nbytes


def test_resize_sets_space_aside_if_the_host_can(rig: Rig, tmp_path: Path) -> None:
    if not isinstance(rig.file, HostFile):
        pytest.skip("a simulated file takes no space")
    other = tmp_path / "other"
    other.touch()
    can = subprocess.run(["fallocate", "--zero-range", "--keep-size", "--length", "1", other], capture_output=True)
    if can.returncode:
        pytest.skip("this file system cannot")
    rig.run(do(op.Resize(rig.file, 2 << 20, reserve=True)))
    assert os.fstat(rig.file.fd).st_blocks * 512 >= 2 << 20
    rig.run(do(op.Resize(rig.file, 4 << 20)))
    assert os.fstat(rig.file.fd).st_blocks * 512 < 3 << 20


def test_size_follows_a_write_past_the_end(rig: Rig) -> None:
    assert rig.run(do(op.Size(rig.file))) == 16320
    rig.run(do(op.Write(rig.file, 20000, b"x")))
    assert rig.run(do(op.Size(rig.file))) == 20001


def test_what_is_stored_is_remembered_in_order(rig: Rig) -> None:
    rig.run(do(op.Store(rig.memory, (100, b"second"), (0, b"first"))))
    rig.run(do(op.Store(rig.memory, (103, b"!"))))
    assert rig.remembered().rstrip(b"\0") == b"first" + bytes(95) + b"sec!nd"
    assert rig.content() == CONTENT


def test_sync_and_grace_come_back(rig: Rig) -> None:
    assert rig.run(all_of([do(op.Sync(rig.file)), do(op.Grace()), do(op.Sync(rig.file))])) == [None, None, None]


def test_what_the_host_has_is_data_or_reads_as_zeros(rig: Rig) -> None:
    rig.run(do(op.Resize(rig.file, 4 << 20)))
    offset, holes = 0, 0
    while offset < 4 << 20:
        is_data, nbytes = rig.run(do(op.Occupied(rig.file, offset, (4 << 20) - offset)))
        assert 0 < nbytes <= (4 << 20) - offset
        assert is_data or not any(rig.content()[offset : offset + nbytes])
        offset, holes = offset + nbytes, holes + (not is_data)
    assert rig.run(do(op.Occupied(rig.file, 0, 100))) == (True, 100)
    assert holes <= 1


def test_no_more_is_told_to_be_allocated_than_is(rig: Rig) -> None:
    rig.run(do(op.Resize(rig.file, 4 << 20)))
    assert len(CONTENT) <= rig.run(do(op.Allocated(rig.file))) <= 4 << 20


def test_long_transfers_side_by_side_all_arrive(rig: Rig) -> None:
    blocks = [bytes([number]) * (128 << 10) for number in range(1, 12)]
    rig.run(all_of([do(op.Write(rig.file, index * len(block), block)) for index, block in enumerate(blocks)]))
    reads = [do(op.Read(rig.file, index * len(block), len(block))) for index, block in enumerate(blocks)]
    assert rig.run(all_of([*reads, do(op.Grace()), do(op.Sync(rig.file))]))[:-2] == blocks


def test_compute_gives_its_result(rig: Rig) -> None:
    assert rig.run(do(op.Compute(lambda: sum(range(10))))) == 45


def test_compute_gives_its_error(rig: Rig) -> None:
    with pytest.raises(ZeroDivisionError):
        rig.run(do(op.Compute(lambda: 1 // 0)))


def test_operations_together_are_done_in_turn(rig: Rig) -> None:
    target = bytearray(100_000)
    steps = [op.Write(rig.file, 0, b"w" * len(target)), op.ReadInto(rig.file, 0, MemoryBuffer(memoryview(target)))]
    assert rig.run(do(op.Together(steps, lambda: target.count(b"w")))) == len(target)
    assert rig.run(do(op.Together(steps))) is None


@pytest.mark.parametrize("seed", range(3))
def test_alike_operations_together_are_as_each_alone(rig: Rig, seed: int) -> None:
    draw = random.Random(seed)
    model = bytearray(600_000)
    rig.run(do(op.Write(rig.file, 0, bytes(model))))
    for _ in range(5):
        writes = []
        for _ in range(draw.randrange(1, 6)):
            start, piece = draw.randrange(300_000), draw.randbytes(draw.randrange(1, 90_000))
            kind = draw.choice([bytes, bytearray, memoryview, lambda data: MemoryBuffer(memoryview(data))])
            writes.append(op.Write(rig.file, start, kind(piece)))
            model[start : start + len(piece)] = piece
        rig.run(do(op.Together(writes)))
        targets = [bytearray(b"?" * draw.randrange(1, 90_000)) for _ in range(draw.randrange(1, 6))]
        starts = [draw.randrange(620_000) for _ in targets]
        reads = [
            op.ReadInto(rig.file, start, MemoryBuffer(memoryview(target)))
            for start, target in zip(starts, targets, strict=True)
        ]
        assert rig.run(do(op.Together(reads, lambda: "done"))) == "done"
        for start, target in zip(starts, targets, strict=True):
            assert target == model[start : start + len(target)].ljust(len(target), b"\0")
    assert rig.content() == model


FROM_FILE_TO_FILE = pytest.mark.parametrize("rig", [blocking, pool], indirect=True)  # where jobs run


@FROM_FILE_TO_FILE
@pytest.mark.parametrize("unit", [512, 4096, op.LARGEST_UNIT])
def test_data_is_copied_from_file_to_file_and_zeros_are_left_out(rig: Rig, tmp_path: Path, unit: int) -> None:
    draw = random.Random(unit)
    units = [draw.randbytes(unit) if draw.random() < 0.5 else bytes(unit) for _ in range(900_000 // unit)]
    content = b"".join(units)[:-100]
    source, scratch = tmp_path / "source", memoryview(bytearray(op.SCRATCH_BYTES))
    source.write_bytes(b"before" + content)
    expected = bytearray(b"\xff" * 1_000_000)
    rig.run(do(op.Write(rig.file, 0, expected)))
    with HostFile.open(str(source)) as file:
        found = rig.run(do(op.CopyData(file, rig.file, [(6, 10, len(content) + 50)], unit, scratch)))
    content += bytes(50)  # past the end of the file
    for start in range(0, len(content), unit):
        if any(piece := content[start : start + unit]):
            expected[10 + start : 10 + start + len(piece)] = piece
    assert rig.content() == expected
    units = [any(content[start : start + unit]) for start in range(0, len(content), unit)]
    told = [any(start <= at * unit < end for start, end in found[0]) for at in range(len(units))]
    assert told == units
    assert all(before[1] < after[0] for before, after in pairwise(found[0]))


@FROM_FILE_TO_FILE
@pytest.mark.parametrize("at", [0, 700, op.LARGEST_UNIT - 1, op.LARGEST_UNIT, 600_000, None])
def test_files_are_equal_up_to_the_sector_that_differs(rig: Rig, tmp_path: Path, at: int | None) -> None:
    content = random.Random(1).randbytes(700_000)
    other, scratch = tmp_path / "other", memoryview(bytearray(op.SCRATCH_BYTES))
    changed = bytearray(content)
    if at is not None:
        changed[at] ^= 1
    other.write_bytes(changed)
    rig.run(do(op.Write(rig.file, 0, bytes(512) + content)))
    with HostFile.open(str(other)) as file:
        nequal = rig.run(do(op.Equal(rig.file, file, [(512, 0, 800_000)], scratch)))
    assert nequal == (800_000 if at is None else at // 512 * 512)


@FROM_FILE_TO_FILE
def test_many_stretches_are_copied_at_once(rig: Rig, tmp_path: Path) -> None:
    draw = random.Random(5)
    content = draw.randbytes(900_000)
    (tmp_path / "source").write_bytes(content)
    pairs = [(draw.randrange(600_000), place, draw.randrange(1, 300_000)) for place in (900_000, 0, 400_000)]
    expected = bytearray(b"\xff" * 1_300_000)
    rig.run(do(op.Write(rig.file, 0, expected)))
    with HostFile.open(str(tmp_path / "source")) as file:
        rig.run(do(op.CopyData(file, rig.file, pairs, 4096, memoryview(bytearray(op.SCRATCH_BYTES)))))
    for offset, target_offset, nbytes in pairs:
        expected[target_offset : target_offset + nbytes] = content[offset : offset + nbytes]
    assert rig.content() == expected


@FROM_FILE_TO_FILE
@pytest.mark.parametrize("at", [None, 0, 99_000, 100_000, 150_000, 300_000, 400_000, 450_000])
def test_stretches_are_equal_as_one(rig: Rig, tmp_path: Path, at: int | None) -> None:
    content = random.Random(1).randbytes(500_000)
    changed = bytearray(content)
    if at is not None:
        changed[at] ^= 1
    (tmp_path / "other").write_bytes(changed)
    rig.run(do(op.Write(rig.file, 0, bytes(512) + content)))
    pairs = [(512 + start, start, nbytes) for start, nbytes in ((400_000, 1000), (0, 100_000), (150_000, 200_000))]
    with HostFile.open(str(tmp_path / "other")) as file:
        nequal = rig.run(do(op.Equal(rig.file, file, pairs, memoryview(bytearray(op.SCRATCH_BYTES)))))
    expected = 0
    for _, start, nbytes in pairs:
        if at is not None and start <= at < start + nbytes:
            expected += (at - start) // 512 * 512
            break
        expected += nbytes
    assert nequal == expected


@pytest.mark.parametrize("rig", [blocking, pool], indirect=True)
def test_what_fails_together_names_the_file(rig: Rig, tmp_path: Path) -> None:
    directory = Directory(tmp_path)
    reads = [op.ReadInto(directory, 0, MemoryBuffer(memoryview(bytearray(100_000)))) for _ in range(2)]
    writes = [op.Write(directory, 0, bytes(100_000)) for _ in range(2)]
    for operations, error in ((reads, errno.EISDIR), (writes, errno.EBADF)):
        with pytest.raises(OSError) as raised:
            rig.run(do(op.Together(operations)))
        assert (raised.value.errno, raised.value.filename) == (error, str(tmp_path))
    directory.close()


@FROM_FILE_TO_FILE
def test_what_cannot_be_read_is_no_copy(rig: Rig, tmp_path: Path) -> None:
    scratch = memoryview(bytearray(op.SCRATCH_BYTES))
    with pytest.raises(IsADirectoryError):
        rig.run(do(op.CopyData(directory := Directory(tmp_path), rig.file, [(0, 0, 512)], 512, scratch)))
    with pytest.raises(IsADirectoryError):
        rig.run(do(op.Equal(rig.file, directory, [(0, 0, 512)], scratch)))
    directory.close()
    assert rig.content() == CONTENT


class Directory(HostFile):
    """Whatever is read of it, the host refuses."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), os.open(path, os.O_RDONLY), writable=False)


def test_none_comes_after_one_that_fails(rig: Rig) -> None:
    if isinstance(rig.file, SimulatedFile):
        pytest.skip("a simulated file has no largest offset")
    steps = [op.Write(rig.file, (1 << 63) - 1, b"xy"), op.Write(rig.file, 0, b"w")]
    with pytest.raises(OSError, match=r"."):
        rig.run(do(op.Together(steps, lambda: 1 // 0)))
    assert rig.content() == CONTENT


def test_impossible_offset_is_an_error_at_the_await(rig: Rig) -> None:
    async def attempt() -> int:
        try:
            await op.Write(rig.file, (1 << 63) - 1, b"xy")
        except OSError as error:
            return error.errno or 0
        return 0

    if isinstance(rig.file, SimulatedFile):
        pytest.skip("a simulated file has no largest offset")
    assert rig.run(attempt()) in (errno.EINVAL, errno.EFBIG, errno.EOVERFLOW)


def test_many_at_once_all_come_back_with_their_own_result(rig: Rig) -> None:
    reads = [do(op.Read(rig.file, start, 7)) for start in range(0, 16000, 8)]  # more than a worker has operations
    assert rig.run(all_of(reads)) == [CONTENT[start : start + 7] for start in range(0, 16000, 8)]


@pytest.mark.sample(1)
def test_many_writes_at_once_all_arrive(rig: Rig) -> None:
    rig.run(all_of([do(op.Write(rig.file, start, b"w")) for start in range(0, 16000, 2)]))
    assert rig.content()[:16000:2] == b"w" * 8000


def test_signal_wakes_those_who_wait_in_the_order_they_came(rig: Rig) -> None:
    signal = op.Signal()
    order: list[int] = []

    async def wait(number: int) -> None:
        await signal.wait()
        order.append(number)

    async def main() -> None:
        for number in range(5):
            await op.Spawn(wait(number))
        await op.Read(rig.file, 0, 1)
        signal.set()
        await op.Read(rig.file, 0, 1)

    rig.run(main())
    assert order == [0, 1, 2, 3, 4]
