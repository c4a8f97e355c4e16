"""Parts of sectors that are encrypted as a whole, written side by side: no byte is what nobody wrote last."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from qcow2.driver.buffer import MemoryBuffer
from qcow2.node.luks import LuksImage
from qcow2.node.node import Node
from tests.crash import luks
from tests.crash.driver import CrashDriver
from tests.engine import PASSPHRASE, noise, read, set_up

pytestmark = pytest.mark.pure

SIZE = 64 << 10
PLACE = 1024  # that writers share
HALF, WHOLE = 256, 512
Started = tuple[CrashDriver, Any]


def raw_luks(seed: int) -> Started:
    file, driver = luks.start()[0].copy(), CrashDriver(seed)
    return driver, driver.run(LuksImage.unlock(file, luks.keyring(PASSPHRASE), writable=True))


def qcow2(seed: int) -> Started:
    bench = set_up(SIZE, seed=seed, cluster_bits=10, encrypted=True)
    bench.write(0, noise(SIZE))
    return bench.driver, bench.image


def overlay(seed: int) -> Started:
    bench = set_up(SIZE, seed=seed, cluster_bits=10, encrypted=True, base=noise(SIZE))
    return bench.driver, bench.image


def subclusters(seed: int) -> Started:
    bench = set_up(SIZE, seed=seed, cluster_bits=14, encrypted=True, base=noise(SIZE), has_subclusters=True)
    return bench.driver, bench.image


async def change(node: Node, start: int, data: bytes) -> None:
    """Zeros are written as such."""
    if any(data):
        await node.write(start, MemoryBuffer(memoryview(data)))
    else:
        await node.write_zeroes(start, len(data), unmap=False)


@pytest.mark.parametrize("unit", [HALF, 100, WHOLE, 700])
@pytest.mark.parametrize("begin", [raw_luks, qcow2, overlay, subclusters])
def test_each_byte_is_what_one_of_its_writers_wrote(begin: Callable[[int], Started], unit: int) -> None:
    """Of *unit* bytes each, or whole sectors beside them."""
    draw = random.Random(unit)
    driver, node = begin(unit)
    for number in range(200):
        place = number % (node.size // PLACE) * PLACE
        old = read(driver, node, place, PLACE)
        written: list[set[int]] = [set() for _ in old]
        for byte in range(draw.randint(2, 6)):  # the first of them zero
            step = WHOLE if draw.random() < 0.3 else unit
            start = draw.randrange(PLACE // step) * step
            for offset in range(start, start + step):
                written[offset].add(byte)
            driver.spawn(change(node, place + start, bytes([byte]) * step))
        driver.finish()
        found = read(driver, node, place, PLACE)
        lost = [at for at, byte in enumerate(found) if byte not in (written[at] or {old[at]})]
        assert not lost, f"round {number}: {len(lost)} bytes from {lost[0]} on"
