"""Visits to the NBD server that a fuzzer made up, those it kept and new ones: `tests.fuzz.visit` judges."""

import random
import struct
from collections.abc import Iterator

import pytest

from tests.fuzz import corpus
from tests.fuzz.visit import Finding, Script, Visits, answers_in, compose, follow, random_visit, visits

VISITS = 150
GREETING = b"NBDMAGICIHAVEOPT\0\3"


@pytest.fixture
def disk() -> Iterator[Visits]:
    with visits() as found:
        yield found


def test_visits_that_were_kept(disk: Visits) -> None:
    for data in corpus.load("nbd"):
        disk.visit(data)


@pytest.mark.parametrize("seed", range(4))
def test_visits_that_nobody_made_before(disk: Visits, seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(VISITS // 4):
        disk.visit(random_visit(draw))


def a_read() -> tuple[Script, bytes]:
    """One READ of 8 bytes at 512, and what comes before its answer."""
    script = Script()
    compose(bytes.fromhex("08" + "00" * 10 + "07" + "00" * 10) + struct.pack(">BBIIB", 0, 0, 512, 8, 0), script)
    options = struct.pack(">QIII", 0x3E889045565A9, 8, 1, 0) + struct.pack(">QIII", 0x3E889045565A9, 7, 1, 0)
    return script, GREETING + options


@pytest.mark.parametrize(
    "answer",
    [
        struct.pack(">IHHQIQ", 0x668E33EF, 1, 1, 2, 16, 512) + bytes(8),  # to what nobody asked
        struct.pack(">IHHQIQ", 0x668E33EF, 1, 1, 1, 16, 513) + bytes(8),  # past what was asked for
        struct.pack(">IHHQIQ", 0x668E33EF, 1, 1, 1, 12, 512) + bytes(4),  # half of it
        struct.pack(">IHHQIQ", 0x668E33EF, 0, 1, 1, 16, 512) + bytes(8),  # without an end
        struct.pack(">IHHQIQ", 0x668E33EF, 1, 1, 1, 16, 512) + bytes(7),
        struct.pack(">IIQ", 0x67446698, 0, 1) + bytes(8),  # of the other kind
    ],
)
def test_the_judge_sees_a_wrong_answer(answer: bytes) -> None:
    script, before = a_read()
    with pytest.raises(Finding):
        answers_in(before + answer, script)


def test_the_judge_sees_wrong_bytes() -> None:
    script, before = a_read()
    answer = struct.pack(">IHHQIQ", 0x668E33EF, 1, 1, 1, 16, 512) + b"12345678"
    with pytest.raises(Finding):
        follow(script, answers_in(before + answer, script), bytearray(1 << 20))
