"""Hostile images in memory: mutants of every field end well, and our verdict on them is QEMU's but for known kinds."""

import random
import resource
import struct
from pathlib import Path

import pytest

from qcow2.driver.operation import Read, Size
from qcow2.error import ImageError
from qcow2.format.header import read_header
from qcow2.judge.repair import repair
from qcow2.judge.report import Report
from tests.builder.record import HEADER_FIELDS
from tests.crash.driver import SimulatedFile
from tests.fuzz import corpus
from tests.fuzz.mutation import BASES, BUILT, EDGES, bases, mutate, random_input
from tests.fuzz.trial import BACKING, Finding, attempt, run, try_out
from tests.fuzz.verdict import Verdict, explain, ours, qemus

MUTANTS = 400
COMPARED = 300
MEMORY_LIMIT = 64 << 10  # KiB that the process may grow by over all mutants; their files have 10 to 700 KiB
NOUNS = [
    "magic",
    "qcow2 version",
    "incompatible feature",
    "encryption",
    "snapshot",
    "header extension",
    "backing file",
    "data file",
]


@pytest.mark.parametrize("number", range(BASES))
def test_the_base_images_are_sound(number: int) -> None:
    outcome = try_out(mutate(bytes([number])).content)
    assert isinstance(outcome.verdict, Report)
    assert outcome.verdict.corruptions == outcome.verdict.leaks == 0
    assert ours(bases()[number].content) == Verdict("clean", "")


def test_the_corpus_ends_well() -> None:
    """What coverage-guided fuzzing found worth keeping, every finding of it among them."""
    inputs = corpus.load("images")
    assert len(inputs) > 100
    for data in inputs:
        try_out_named(data)


def test_random_mutants_end_well() -> None:
    rng = random.Random(2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(MUTANTS):
        try_out_named(random_input(rng))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY_LIMIT


def try_out_named(data: bytes) -> None:
    """Try a mutant out; a failure names the input that replays it."""
    mutant = mutate(data)
    try:
        try_out(mutant.content)
    except Exception as error:
        error.add_note(f"{mutant.base.name}: {'; '.join(mutant.changes)}: bytes.fromhex({data.hex()!r})")
        raise


def test_a_step_that_spins_would_be_found() -> None:
    async def spin() -> None:
        while True:
            await Size(SimulatedFile.parse("image", b""))

    with pytest.raises(AssertionError, match="the engine spins"):
        run(spin())


def test_a_read_in_proportion_to_a_lie_would_be_found() -> None:
    async def believe() -> None:
        await Read(SimulatedFile.parse("image", b""), 0, 1 << 30)

    with pytest.raises(Finding, match="Read of 1073741824 bytes"):
        run(believe())


def test_our_verdict_is_qemus_or_a_known_kind_of_difference(tmp_path: Path) -> None:
    """And what we call sound after a repair, QEMU does too, or gives a known reason."""
    rng = random.Random(3)
    (tmp_path / "base").write_bytes(BACKING)
    path = tmp_path / "a"
    same = 0
    for _ in range(COMPARED):
        data = random_input(rng, BUILT)
        mutant = mutate(data)
        path.write_bytes(mutant.content)
        our, qemu = ours(mutant.content), qemus(path)
        same += our.word == qemu.word
        assert our.word == qemu.word or explain(our, qemu), (mutant.base.name, mutant.changes, our, qemu, data.hex())
        file = SimulatedFile.parse("image", mutant.content)
        repaired = attempt(lambda file=file: run(repair(file)))
        if isinstance(repaired, Report) and not repaired.corruptions and not repaired.check_errors:
            path.write_bytes(file.content())
            qemu = qemus(path)
            assert qemu.word == "clean" or explain(Verdict("clean", ""), qemu), (mutant.changes, qemu, data.hex())
    assert same > COMPARED * 0.85


@pytest.mark.parametrize("field", HEADER_FIELDS)
@pytest.mark.parametrize("number", [0, 1, 8])
def test_a_refused_header_field_is_named(number: int, field: str) -> None:
    base = bases()[number]
    offset, code = HEADER_FIELDS[field]
    for value in EDGES:
        content = bytearray(base.content)
        struct.pack_into(">" + code, content, offset, value % (1 << 8 * struct.calcsize(">" + code)))
        refusal = attempt(lambda content=content: run(read_header(SimulatedFile.parse("image", bytes(content)))))
        if isinstance(refusal, ImageError):
            assert any(noun in str(refusal) for noun in {*HEADER_FIELDS, *NOUNS}), refusal
