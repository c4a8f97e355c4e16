"""What a guest's requests meet is told once a minute for as long as it comes: the next outage is told as the first."""

import struct
from pathlib import Path

import pytest

import qcow2
from tests.frontend import IN, IOERR, FrontEnd
from tests.served import serve
from vhost.problem import AGAIN_SECONDS, TOLD_MAX, Told

CLUSTER = 65536
MIB = 1 << 20
L1_OFFSET = 40  # of the header


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Its first cluster is said to lie where none can."""
    path = tmp_path / "disk"
    qcow2.create(path, size=MIB)
    with qcow2.open(path, "r+") as disk:
        disk.write(0, b"d" * CLUSTER)
    with path.open("r+b") as file:
        file.seek(L1_OFFSET)
        file.seek(*struct.unpack(">Q", file.read(8)))
        file.seek(struct.unpack(">Q", file.read(8))[0] & 0x00FFFFFFFFFFFE00)
        file.write(struct.pack(">Q", 1 << 63 | 0x200))
    return path


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_error_that_comes_again_is_told_again(image: Path) -> None:
    clock, told = Clock(), list[str]()
    with serve(image) as served, FrontEnd(served.socket_path) as guest:
        served.backend.told, served.backend.on_problem = Told(clock), told.append
        for moment in (0.0, 1.0, AGAIN_SECONDS - 1, AGAIN_SECONDS, AGAIN_SECONDS + 1, 5 * AGAIN_SECONDS):
            clock.seconds = moment
            assert guest.do(IN, 0, nbytes=CLUSTER).status == IOERR
        assert len(told) == 3
        assert len(set(told)) == 1


def test_flood_of_errors_is_cut_and_does_not_hide_the_next() -> None:
    clock = Clock()
    told = Told(clock)
    assert sum(told.is_news(f"error {number}") for number in range(2 * TOLD_MAX)) == TOLD_MAX
    clock.seconds = AGAIN_SECONDS
    assert told.is_news("error of the next outage")
