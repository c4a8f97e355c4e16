"""Front-ends and drivers of other habits than QEMU's and Linux's: legacy ones, those that do not kick or listen."""

import struct
import time
from pathlib import Path

import pytest

from tests.builder import Recipe, build
from tests.frontend import GET_ID, OK, SET_VRING_CALL, SET_VRING_KICK, FrontEnd, Queue
from tests.packedqueue import PackedQueue
from tests.program import Daemon

NO_FD = 0x100


class LegacyFrontEnd(FrontEnd):
    generation = 0


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return build(Recipe(size=1 << 20), tmp_path / "a").path


def test_legacy_driver_is_served(image: Path) -> None:
    with Daemon(image) as daemon, LegacyFrontEnd(daemon.socket_path) as guest:
        assert not guest.features & 1 << 32
        guest.write(4096, b"legacy" * 512)
        guest.flush()
        assert guest.read(4096, 3072) == b"legacy" * 512


@pytest.mark.parametrize("queue_type", [Queue, PackedQueue])
def test_driver_that_neither_kicks_nor_wants_calls_is_served(image: Path, queue_type: type[Queue]) -> None:
    with Daemon(image) as daemon, FrontEnd(daemon.socket_path, queue_type=queue_type) as guest:
        guest.tell(SET_VRING_CALL, struct.pack("<Q", NO_FD))
        guest.tell(SET_VRING_KICK, struct.pack("<Q", NO_FD))
        deadline = time.monotonic() + 30
        for _ in range(5):
            guest.submit(GET_ID, nbytes=20)
            while not (done := guest.reap()):
                assert time.monotonic() < deadline
            assert [one.status for one in done] == [OK]
