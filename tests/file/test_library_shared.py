"""A `Disk` in a program with threads, signals and forks: right bytes, and it goes on.

``DISK_SECONDS=3600 pytest tests/file/test_library_shared.py`` lets the threads work for an hour, on each of two images;
``DISK_SEEDS=200`` interrupts so many programs, 40 times each.
"""

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType

import pytest

import qcow2
from qcow2.library.own_thread import OwnThread, _Job
from tests.forked import fork, status_of
from tests.oracle import assert_not_corrupt, qemu_img
from tests.patience import TIMEOUT

SECONDS = float(os.environ.get("DISK_SECONDS", "3"))
THREADS = 8
BLOCK = 4096
BLOCKS = 1024  # of each thread
SIZE = THREADS * BLOCKS * BLOCK


@pytest.fixture(params=["off", "on"])
def overlay(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Blocks of the threads alternate, so each cluster is everybody's."""
    (tmp_path / "base").write_bytes(b"b" * SIZE)
    path = tmp_path / "disk.qcow2"
    options = f"lazy_refcounts={request.param}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, "-b", tmp_path / "base", "-F", "raw", path)
    return path


def work(number: int, disk: qcow2.Disk, end: float, wrong: list[str]) -> dict[int, bytes]:
    """Write, read, flush and discard blocks of one's own; what they hold."""
    draw, held = random.Random(number), dict[int, bytes]()
    count = 0
    while time.monotonic() < end:
        block = draw.randrange(BLOCKS) * THREADS + number
        match draw.randrange(8):
            case 0 | 1 | 2:
                held[block] = b"%7d." % draw.randrange(10_000_000) * (BLOCK // 8)
                disk.write(block * BLOCK, held[block])
            case 3 if count % 16 == 0:
                disk.flush()
            case 4:
                disk.write_zeroes(block * BLOCK, BLOCK, unmap=False)
                held[block] = bytes(BLOCK)
            case _:
                if disk.read(block * BLOCK, BLOCK) != held.get(block, b"b" * BLOCK):
                    wrong.append(f"block {block} of thread {number} after {count} deeds")
        count += 1
    return held


Deeds = Callable[[qcow2.Disk, float, list[str]], dict[int, bytes]]  # on a disk, until then: what blocks hold


def share(overlay: Path, everybody: Sequence[Deeds]) -> None:
    """A thread for each of *everybody*, on one disk: it holds in the end what they say."""
    wrong, held, failures = list[str](), dict[int, bytes](), list[BaseException]()

    def run(deeds: Deeds) -> None:
        try:
            held.update(deeds(disk, end, wrong))
        except BaseException as error:  # looked at below
            failures.append(error)

    with qcow2.open(overlay, writable=True) as disk:
        end = time.monotonic() + SECONDS
        threads = [threading.Thread(target=run, args=(deeds,)) for deeds in everybody]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (wrong, failures) == ([], [])
    with qcow2.open(overlay) as disk:
        assert all(disk.read(block * BLOCK, BLOCK) == data for block, data in held.items())
    assert_not_corrupt(overlay)


def test_threads_share_a_disk(overlay: Path) -> None:
    share(overlay, [partial(work, number) for number in range(THREADS)])


async def work_in_a_loop(disk: qcow2.Disk, first: int, end: float, wrong: list[str]) -> dict[int, bytes]:
    """The same deeds as two tasks of an event loop; what their blocks hold."""
    held = dict[int, bytes]()

    async def one(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < end:
            block = draw.randrange(BLOCKS) * THREADS + number
            if draw.random() < 0.5:
                held[block] = b"%7d." % draw.randrange(10_000_000) * (BLOCK // 8)
                await disk.awrite(block * BLOCK, held[block])
            elif await disk.aread(block * BLOCK, BLOCK) != held.get(block, b"b" * BLOCK):
                wrong.append(f"block {block} of task {number}")

    await asyncio.gather(one(first), one(first + 1))
    return held


def test_two_threads_and_an_event_loop_share_a_disk(overlay: Path) -> None:
    def loop(disk: qcow2.Disk, end: float, wrong: list[str]) -> dict[int, bytes]:
        return asyncio.run(work_in_a_loop(disk, 2, end, wrong))

    share(overlay, [partial(work, 0), partial(work, 1), loop])


INTERRUPTED = """
import random, signal, sys, warnings, qcow2
warnings.simplefilter("error")
draw = random.Random(int(sys.argv[2]))
class Interrupt(Exception): pass
def interrupt(*_): raise Interrupt
signal.signal(signal.SIGALRM, interrupt)
disk = qcow2.open(sys.argv[1], writable=True)
held = {}
for turn in range(40):
    block = None
    try:
        signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.0001, 0.003))
        while True:
            block = draw.randrange(1024)
            if draw.random() < 0.15: disk.flush()
            else:
                held.pop(block, None)
                disk.write(block * 4096, bytes([turn]) * 512)
                held[block] = turn
    except Interrupt: pass
    finally: signal.setitimer(signal.ITIMER_REAL, 0)
assert all(disk.read(block * 4096, 512) == bytes([turn]) * 512 for block, turn in held.items())
disk.flush()
disk.close()
"""


FIRST_CALL = """
import _thread, signal, sys, qcow2
disk = qcow2.open(sys.argv[1], writable=True)
mask, block = signal.pthread_sigmask(signal.SIG_BLOCK, ()), signal.pthread_sigmask
def late(how, which):  # the signal came before it was blocked, and is acted on after
    old = block(how, which)
    if how == signal.SIG_BLOCK and which: raise KeyboardInterrupt
    return old
signal.pthread_sigmask = late
try: disk.flush(); assert not "reached"
except KeyboardInterrupt: pass
signal.pthread_sigmask = block
assert block(signal.SIG_BLOCK, ()) == mask, "signals stay blocked"
assert disk.read(0, 1) == b"b"
disk.close()
"""


def test_an_interrupt_of_the_first_call_leaves_no_signal_blocked(overlay: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FIRST_CALL, overlay], capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stderr) == (0, "")


FIRST_STEP = """
import signal, sys, threading, qcow2
block = signal.pthread_sigmask
def late(how, which):  # the signal came while it was blocked, and is acted on after
    if how == signal.SIG_SETMASK: signal.raise_signal(signal.SIGINT)
    return block(how, which)
signal.pthread_sigmask = late
try: qcow2.commit(sys.argv[1])
except KeyboardInterrupt: signal.pthread_sigmask = block
left = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
for thread in left: thread.join(10)
assert block is signal.pthread_sigmask and not any(thread.is_alive() for thread in left), left
"""


def test_an_interrupt_while_the_thread_of_a_job_starts_leaves_no_thread(overlay: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FIRST_STEP, overlay], capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stderr) == (0, "")


ONE_TOO_MANY = """
import signal, sys, threading, qcow2
disk = qcow2.open(sys.argv[1], writable=True)
heard = []  # the masks under which threads died
threading.Thread.__del__ = lambda thread: heard.append(block(signal.SIG_BLOCK, ()))
block, starts = signal.pthread_sigmask, []
def late(how, which):
    if how == signal.SIG_SETMASK: starts.append(how)
    while how == signal.SIG_SETMASK and sum(thread.name == "qcow2 disk" for thread in threading.enumerate()) > 1:
        pass  # the second one ends before signals are let in
    old = block(how, which)
    if how == signal.SIG_SETMASK and len(starts) == 1: raise KeyboardInterrupt  # and nobody knows of the first
    return old
signal.pthread_sigmask = late
try: disk.flush()
except KeyboardInterrupt: pass
disk.flush()
signal.pthread_sigmask = block
del threading.Thread.__del__
assert len(starts) == 2 and heard and all(signal.SIGINT in mask for mask in heard), (starts, heard)
disk.close()
"""


def test_a_thread_too_many_dies_where_no_interrupt_comes(overlay: Path) -> None:
    """The callbacks of weak references to it, which Python's own set of threads has, would swallow one."""
    program = [sys.executable, "-c", ONE_TOO_MANY, overlay]
    done = subprocess.run(program, capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("seed", range(int(os.environ.get("DISK_SEEDS", "4"))))
def test_interrupts_at_any_moment_leave_the_disk_going(overlay: Path, seed: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, overlay, str(seed)], capture_output=True, text=True, timeout=TIMEOUT
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert_not_corrupt(overlay)


@pytest.mark.parametrize("ask", [qcow2.Disk.flush, lambda disk: asyncio.run(disk.aflush())], ids=["call", "awaited"])
def test_a_call_that_meets_a_close_is_refused(overlay: Path, ask: Callable[[qcow2.Disk], None]) -> None:
    """The close comes after the call has found the disk's thread, and before it has handed in what to do."""
    disk = qcow2.open(overlay)
    disk.read(0, 1)
    said = []

    def close_first(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code is _Job.__init__.__code__:
            sys.settrace(None)
            closer = threading.Thread(target=disk.close)
            closer.start()
            closer.join()

    def call() -> None:
        sys.settrace(close_first)
        try:
            ask(disk)
        except ValueError as error:
            said.append(str(error))
        finally:
            sys.settrace(None)

    caller = threading.Thread(target=call, daemon=True)
    caller.start()
    caller.join(TIMEOUT)
    assert said == [f"{overlay}: the disk is closed"]


def test_who_awaits_a_disk_that_is_being_given_up_does_not_wait_in_the_loop(overlay: Path) -> None:
    """Who gives it up waits for what the disk's thread is at."""
    disk, at_work, goes_on, is_stopped = qcow2.open(overlay), *(threading.Event() for _ in range(3))
    said = []

    def work() -> None:
        at_work.set()
        goes_on.wait(TIMEOUT)

    def look(frame: FrameType, event: str, _: object) -> None:
        if frame.f_code is OwnThread.is_ours.fget.__code__:  # asked in the midst of it
            sys.settrace(None)
            is_stopped.set()

    def give_up() -> None:
        sys.settrace(look)
        disk.abandon()

    def ask() -> None:
        try:
            asyncio.run(disk.aread(0, 1))
        except ValueError as error:
            said.append((str(error), goes_on.is_set()))

    disk._thread.begin(work)
    assert at_work.wait(TIMEOUT)
    threads = [threading.Thread(target=target, daemon=True) for target in (give_up, ask)]
    threads[0].start()
    assert is_stopped.wait(TIMEOUT)
    threads[1].start()
    threads[1].join(TIMEOUT / 4)
    goes_on.set()
    threads[0].join(TIMEOUT)
    assert said == [(f"{overlay}: the disk is closed", False)]


def test_dropped_disk_warns_and_gives_its_lock_back(overlay: Path) -> None:
    disk = qcow2.open(overlay, writable=True)
    disk.write(0, b"new")
    with pytest.warns(ResourceWarning, match=r"unclosed <qcow2.Disk '.*disk.qcow2', \d+ bytes, writable>"):
        del disk  # the last reference
    with qcow2.open(overlay, writable=True) as disk:
        assert disk.read(0, 3) == b"new"


def test_child_of_a_fork_cannot_use_the_disk_and_does_not_close_it(overlay: Path) -> None:
    with qcow2.open(overlay, writable=True) as disk:
        disk.write(0, b"new")

        def live() -> int:
            try:
                disk.write(0, b"bad")
            except OSError as error:
                disk.close()
                return 0 if "parent process" in str(error) else 1
            return 2

        assert status_of(fork(live)) == 0
        disk.write(4096, b"more")
        assert disk.read(0, 3) == b"new"
    assert_not_corrupt(overlay)


def test_child_of_a_fork_is_told_no_facts(overlay: Path) -> None:
    with qcow2.open(overlay) as disk:
        disk.read(0, 4096)
        assert disk.info["virtual-size"] == disk.size

        def live() -> int:
            signal.alarm(TIMEOUT)  # nobody answers
            try:
                disk.info  # noqa: B018
            except OSError as error:
                return 0 if "parent process" in str(error) else 1
            return 2

        assert status_of(fork(live)) == 0


def test_facts_of_a_disk_that_is_closed_are_none(overlay: Path) -> None:
    disk = qcow2.open(overlay)
    disk.close()
    with pytest.raises(ValueError, match="the disk is closed"):
        disk.info  # noqa: B018


@pytest.mark.filterwarnings("ignore:unclosed")
def test_disk_that_is_dropped_on_its_own_thread_ends_that(overlay: Path) -> None:
    """A garbage collector runs anywhere."""
    held = [qcow2.open(overlay, writable=True)]
    held[0].write(0, b"new")
    caller = threading.Thread(target=held[0]._thread.call, args=(held.clear,), daemon=True)
    caller.start()
    caller.join(TIMEOUT)
    assert not caller.is_alive()
    with qcow2.open(overlay, writable=True) as disk:
        assert disk.read(0, 3) == b"new"


def test_close_gives_the_locks_back_while_a_child_of_a_fork_lives(overlay: Path) -> None:
    """Which has copies of the descriptors, and ends without a word to the disk."""
    disk = qcow2.open(overlay, "r+")
    disk.write(0, b"new")
    ended, end = os.pipe()

    def live() -> int:
        os.close(end)
        os.read(ended, 1)
        return 0

    child = fork(live)
    try:
        disk.close()
        with qcow2.open(overlay, "r+") as again:
            assert again.read(0, 3) == b"new"
    finally:
        os.close(end)
        os.close(ended)
        assert status_of(child) == 0
    assert_not_corrupt(overlay)


@pytest.mark.parametrize("name", [lambda path: path, str, os.fsencode], ids=["Path", "str", "bytes"])
def test_path_is_any_that_python_takes(overlay: Path, name: "type[str]") -> None:
    with qcow2.open(name(overlay)) as disk:
        assert disk.read(0, 1) == b"b"


def test_module_shows_what_it_has() -> None:
    assert set(qcow2.__all__) <= set(dir(qcow2))
    code = "import pydoc, qcow2; print(pydoc.plain(pydoc.render_doc(qcow2)))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for word in ("class Disk", "write_zeroes", "open_disk(", "CorruptImage", qcow2.__version__):
        assert word in said
