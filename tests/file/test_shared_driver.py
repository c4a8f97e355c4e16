"""What the shared driver promises besides the conformance suite: threads side by side, and an end if we are wrong."""

import os
import subprocess
import sys
import threading
from pathlib import Path

from qcow2.driver import shared
from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.file import HostFile
from qcow2.driver.operation import Compute, Grace, ReadInto, Signal, Size
from qcow2.driver.shared import SharedDriver
from qcow2.engine import reaper
from tests.program import TIMEOUT
from tests.slowdisk import READ, SlowDisk


def test_a_grace_waits_for_the_transfers_of_other_threads(tmp_path: Path) -> None:
    """And they hold nobody up who asks for something else."""
    (tmp_path / "backing").mkdir()
    (tmp_path / "slow").mkdir()
    (tmp_path / "backing" / "disk").write_bytes(b"x" * 4096)
    driver, order, has_begun = SharedDriver(), [], threading.Event()

    async def read(file: HostFile) -> None:
        await ReadInto(file, 0, MemoryBuffer(memoryview(bytearray(512))))
        order.append("read")

    async def wait() -> None:
        has_begun.set()
        await Grace()
        order.append("grace")

    async def look(file: HostFile) -> int:
        return int(await Size(file))

    with SlowDisk(tmp_path / "backing", tmp_path / "slow") as disk, HostFile.open(str(disk.path / "disk")) as file:
        with disk.holding(READ):
            threads = [threading.Thread(target=lambda: driver.run(read(file)))]
            threads[0].start()
            disk.wait_for_one()
            threads.append(threading.Thread(target=lambda: driver.run(wait())))
            threads[1].start()
            has_begun.wait(TIMEOUT)
            assert driver.run(look(file)) == 4096
            assert order == []
        for thread in threads:
            thread.join()
        driver.close()
    assert order == ["read", "grace"]


def test_threads_wake_one_another() -> None:
    driver, signals = SharedDriver(), [Signal() for _ in range(9)]
    order: list[int] = []

    async def pass_on(number: int) -> None:
        await signals[number].wait()
        order.append(number)
        signals[number + 1].set()

    async def begin() -> None:
        signals[0].set()

    threads = [threading.Thread(target=lambda n=n: driver.run(pass_on(n))) for n in reversed(range(8))]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    driver.run(begin())
    for thread in threads:
        thread.join()
    driver.close()
    assert order == list(range(8))


BUG = """
from qcow2.driver.operation import Signal, Spawn
from qcow2.driver.shared import SharedDriver

async def wrong():
    raise KeyError("ours")

async def main():
    await Spawn(wrong())
    await Signal().wait()

SharedDriver().run(main())
"""


def test_a_bug_in_what_was_spawned_ends_the_process_loudly() -> None:
    done = subprocess.run([sys.executable, "-c", BUG], capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == os.EX_SOFTWARE
    assert "KeyError: 'ours'" in done.stderr


def test_a_grace_waits_for_no_computation() -> None:
    """Nor for a sync: a client's flush would hold up the writes of others."""
    begun, ended = threading.Event(), threading.Event()

    def compute() -> None:
        begun.set()
        ended.wait(TIMEOUT)

    async def look() -> None:
        await Compute(compute)

    async def wait() -> None:
        await Grace()

    driver = SharedDriver()
    other = threading.Thread(target=lambda: driver.run(look()))
    other.start()
    assert begun.wait(TIMEOUT)
    driver.run(wait())
    assert other.is_alive()
    ended.set()
    other.join(TIMEOUT)
    driver.close()


def test_the_reaper_leaves_a_helper_to_others() -> None:
    """What else the engine spawns, as the commit that a FLUSH waits for, would wait behind its punches."""
    assert shared.NHELPERS > reaper.PUNCHES + 1
