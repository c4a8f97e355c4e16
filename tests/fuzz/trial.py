"""What is done with a hostile image in memory: opened, read, checked, repaired, written, grown; and what must hold.

Refusals are `OSError` and `ImageError`, one line each. The crash driver bounds the operations, and each may move only
so many bytes. An image that check calls sound opens for writing, keeps what is written and is sound afterwards.
"""

import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.operation import Operation, Read, ReadInto, Write, Zero
from qcow2.engine.growth import grown_size
from qcow2.engine.image import Image
from qcow2.engine.opened import OpenOptions
from qcow2.error import CorruptImage, ImageError
from qcow2.format.header import read_header, require_uncorrupted
from qcow2.judge.check import check
from qcow2.judge.repair import repair
from qcow2.judge.report import Report
from qcow2.node.raw import RawImage
from tests.crash.driver import CrashDriver, SimulatedFile
from tests.fuzz.made import DATA, KEYS

OPERATIONS = 20_000  # of one step; the bases need at most a few hundred
PIECE = 1 << 13
MAX_READ = 1 << 22  # one operation's bytes: tables lie inside the file, and clusters have 2 MiB at most
BACKING = b"under " * 2000


class Finding(AssertionError):
    """A hostile image did what none may."""


def _bounded(operation: Operation) -> OSError | None:
    nbytes = 0
    match operation:
        case Read():
            nbytes = operation.nbytes
        case ReadInto():
            nbytes = len(operation.target)
        case Write():
            nbytes = sum(map(len, operation.pieces))
        case Zero():
            nbytes = 0  # costs nothing, however long
        case _:
            pass
    if nbytes > MAX_READ:
        raise Finding(f"{type(operation).__name__} of {nbytes} bytes")
    return None


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run one step to its end with bounded operations.

    Raises: OSError and ImageError, the documented refusals; Finding if one has no words or many lines.
    """
    driver = CrashDriver(fault=_bounded, limit=OPERATIONS)
    try:
        return driver.run(coroutine)
    except (OSError, ImageError) as refusal:
        text = str(refusal)
        if not text or "\n" in text:
            raise Finding(f"refused with {text!r}") from refusal
        raise


def attempt(deed: Callable[[], Any]) -> Any:
    """The result of *deed*, or its documented refusal."""
    try:
        return deed()
    except (OSError, ImageError) as refusal:
        return refusal


@dataclass(frozen=True)
class Outcome:
    """How an image fared: the report of a check, or the refusal, and that after its repair if there was one."""

    verdict: Report | Exception
    repaired: Report | Exception | None
    repaired_content: bytes | None  # of an image that repair left sound


def try_out(content: bytes) -> Outcome:
    """Do everything to an image with *content*.

    Raises: Finding, or whatever else must not happen.
    """
    verdict = attempt(lambda: run(check(SimulatedFile.parse("image", content), say=_one_line)))
    file = SimulatedFile.parse("image", content)
    opened = attempt(lambda: _open(file, writable=True))
    if isinstance(opened, Image):
        _change(file, opened, must_work=_is_sound(verdict))
    elif _is_sound(verdict) and not _may_refuse_writer(content):
        raise Finding(f"check finds nothing, and it does not open: {opened}")
    return _repair(content, verdict)


def _one_line(text: str) -> None:
    if "\n" in text:
        raise Finding(f"a finding of several lines: {text!r}")


def _is_sound(verdict: Report | Exception | None) -> bool:
    return isinstance(verdict, Report) and not verdict.corruptions and not verdict.check_errors


def _may_refuse_writer(content: bytes) -> bool:
    """Marked corrupt, though nothing is; over a backing file that we have no words for; or by its LUKS header."""
    return bool(content[79] & 2) or any(content[8:16]) or any(content[32:36])


def _repair(content: bytes, verdict: Report | Exception) -> Outcome:
    file = SimulatedFile.parse("image", content)
    before = _read_all(content)
    repaired = attempt(lambda: run(repair(file)))
    if isinstance(verdict, Exception):
        if file.content() != content:
            raise Finding(f"what cannot be checked was changed: {verdict}")
        return Outcome(verdict, repaired, None)
    _require_kept(before, _read_all(file.content()))
    if not _is_sound(repaired):
        return Outcome(verdict, repaired, None)
    sound = file.content()
    again = run(check(file))
    if again.corruptions or again.leaks or again.check_errors:
        raise Finding(f"repaired, and checked again: {again}")
    run(repair(file))
    if file.content() != sound:
        raise Finding("a second repair changes what the first left")
    opened = attempt(lambda: _open(file, writable=True))
    if isinstance(opened, Image):
        _change(file, opened, must_work=True)
    elif not _may_refuse_writer(sound):
        raise Finding(f"repaired, and it does not open: {opened}")
    return Outcome(verdict, repaired, sound)


def _open(file: SimulatedFile, *, writable: bool) -> Image:
    """Open it as a daemon would, repairing first what was not closed cleanly."""
    header = run(read_header(file, trust_refcounts=False))
    backing = None
    if header.backing_name is not None:
        below = SimulatedFile.parse("base", BACKING)
        below.writable = False
        backing = run(RawImage.open(below))
    if writable and header.is_dirty:
        require_uncorrupted(file, header)
        report = run(repair(file))
        if report.check_errors or report.corruptions:
            raise CorruptImage(file.path, 0, "not closed cleanly, and cannot be repaired")
    options = OpenOptions(writable=writable, cache_size=1 << 20, keys=KEYS)
    data = SimulatedFile.parse("data", DATA) if header.record.has_data_file else None
    image: Image = run(Image.open(file, backing=backing, data_file=data, options=options))
    return image


def _places(size: int) -> list[int]:
    """Where to look on a disk that may claim to be enormous: its start, its end, and in between."""
    near = range(0, min(size, 12 * PIECE), PIECE)
    spread = [size // 4 * quarter for quarter in range(4)]
    return sorted({max(0, min(place, size - PIECE)) for place in [*near, *spread, size]})


def _read(image: Image, offset: int, nbytes: int) -> bytes:
    target = bytearray(nbytes)
    run(image.read(offset, MemoryBuffer(memoryview(target))))
    return bytes(target)


def _read_all(content: bytes) -> dict[int, bytes]:
    """What can be read of the disk in *content*, by its place."""
    image = attempt(lambda: _open(SimulatedFile.parse("image", content), writable=False))
    if not isinstance(image, Image):
        return {}
    places = _places(image.size)
    found = {
        place: attempt(lambda place=place: _read(image, place, min(PIECE, image.size - place))) for place in places
    }
    return {place: data for place, data in found.items() if isinstance(data, bytes)}


def _require_kept(before: dict[int, bytes], after: dict[int, bytes]) -> None:
    """A repair changes nothing of what could be read."""
    for place, data in before.items():
        if after.get(place) != data:
            raise Finding(f"a repair changed what is read at {place:#x}")


def _change(file: SimulatedFile, image: Image, *, must_work: bool) -> None:
    """Write, clear, grow and close; on a sound image each succeeds, and it is sound when it is closed."""
    written: list[tuple[int, bytes]] = []
    refusals: list[Exception] = []

    def do(coroutine: Coroutine[Any, Any, Any]) -> bool:
        result = attempt(lambda: run(coroutine))
        if isinstance(result, Exception):
            refusals.append(result)
        return not isinstance(result, Exception)

    for number, place in enumerate(_places(image.size)):
        nbytes = min(PIECE, image.size - place)
        data = bytes([0xA0 + number]) * (nbytes // 3)
        written = [(at, old) for at, old in written if at + len(old) <= place]
        if number % 3 == 0:
            do(image.write_zeroes(place, nbytes, unmap=bool(number % 2)))
        elif number % 3 == 1:
            do(image.discard(place, nbytes))
        if data and do(image.write(place, MemoryBuffer(memoryview(data)))):
            written.append((place, data))
        do(image.flush())
    if not image.geometry.has_data_file:
        size = attempt(lambda: grown_size(file, image.header, image.size + 5 * PIECE))
        if isinstance(size, int):
            do(image.grow(size))
    if must_work:
        _require_no_refusal(refusals)
    for place, data in written:
        got = attempt(lambda place=place, data=data: _read(image, place, len(data)))
        if must_work and got != data:
            raise Finding(f"written at {place:#x}, not read back: {got!r:.200}")
    closed = do(image.close())
    if must_work:
        _require_no_refusal(refusals)
        _require_sound(file, closed=closed)


def _require_no_refusal(refusals: list[Exception]) -> None:
    """But of what check cannot have known: garbage in compressed clusters."""
    refusals = [refusal for refusal in refusals if "compressed cluster" not in str(refusal)]
    if refusals:
        raise Finding(f"a sound image refuses: {refusals[0]}")


NOT_COPIED = re.compile(r"OFLAG_COPIED .*_entry=(?![89a-f][0-9a-f]{15}\b)")  # the flag is not set


def _require_sound(file: SimulatedFile, *, closed: bool) -> None:
    """Leaks are permitted. If one of two clusters that share their host cluster is written, nobody marks the other."""
    lines: list[str] = []
    report = run(check(file, say=lines.append))
    wrong = [line for line in lines if line.startswith("ERROR") and not NOT_COPIED.search(line)]
    if wrong or not closed:
        raise Finding(f"a sound image is not any more: {wrong or report}")
