"""Nothing outside the disk is changed, whoever asks: no cluster past its end is ever mapped."""

from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from qcow2.driver.buffer import MemoryBuffer
from qcow2.engine.image import Image
from tests.engine import noise, set_up

pytestmark = pytest.mark.pure

CLUSTER = 512
SIZE = 10 * CLUSTER
CONTENT = memoryview(bytes([7]) * 2 * CLUSTER)

Change = Callable[[Image, int], Coroutine[Any, Any, None]]
CHANGES: dict[str, Change] = {
    "write": lambda image, at: image.write(at, MemoryBuffer(CONTENT)),
    "write_compressed": lambda image, at: image.write_compressed(at, CONTENT),
    "write_zeroes": lambda image, at: image.write_zeroes(at, len(CONTENT), unmap=False),
    "discard": lambda image, at: image.discard(at, len(CONTENT)),
    "fetch": lambda image, at: image.fetch(at, len(CONTENT), CONTENT),
    "fetch_compressed": lambda image, at: image.fetch_compressed(at, CONTENT),
}
PLACES = {"before": -CLUSTER, "across": SIZE - CLUSTER, "behind": SIZE, "far": 1 << 40}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_outside_the_disk_is_refused_before_it_begins(change: Change, place: int) -> None:
    bench = set_up(SIZE)
    bench.write(0, noise(SIZE - CLUSTER))
    before = bench.file.content()
    with pytest.raises(ValueError, match=f"1024 bytes at {place} are not inside the disk of {SIZE} bytes"):
        bench.driver.run(change(bench.image, place))
    assert bench.file.content() == before
    bench.close()
    bench.assert_sound()
