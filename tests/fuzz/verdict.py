"""Two judges of one image, our check and `qemu-img check`, and every kind of difference between them that we accept."""

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from qcow2.judge.check import check
from qcow2.judge.report import Report
from tests.crash.driver import SimulatedFile
from tests.fuzz.trial import attempt, run
from tests.patience import TIMEOUT

STATUS = {0: "clean", 2: "corrupt", 3: "leaks"}


@dataclass(frozen=True)
class Verdict:
    """*word*: clean, leaks, corrupt, error (parts cannot be checked) or refused; *text*: what was said."""

    word: str
    text: str


def ours(content: bytes) -> Verdict:
    """Our verdict on an image in memory."""
    lines: list[str] = []
    found = attempt(lambda: run(check(SimulatedFile.parse("image", content), say=lines.append)))
    if not isinstance(found, Report):
        return Verdict("refused", str(found))
    if found.check_errors:
        return Verdict("error", "\n".join(lines))
    return Verdict("corrupt" if found.corruptions else "leaks" if found.leaks else "clean", "\n".join(lines))


def qemus(path: Path) -> Verdict:
    """QEMU's verdict on an image file."""
    command = ["qemu-img", "check", "-f", "qcow2", "--output=json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode >= 0, f"qemu-img died of signal {-done.returncode}"
    if not done.stdout:
        return Verdict("refused", done.stderr)
    report = json.loads(done.stdout)
    word = "error" if report["check-errors"] else STATUS[done.returncode]
    return Verdict(word, done.stderr)


@dataclass(frozen=True)
class Kind:
    """Why two judges may differ: by their words, and by what each must have said."""

    why: str
    our_words: str
    qemu_words: str
    our_text: str = ""
    qemu_text: str = ""

    def explains(self, our: Verdict, qemu: Verdict) -> bool:
        return (
            our.word in self.our_words.split()
            and qemu.word in self.qemu_words.split()
            and re.search(self.our_text, our.text) is not None
            and re.search(self.qemu_text, qemu.text) is not None
        )


ANSWERED = "clean leaks corrupt error"
KINDS = (
    # QEMU does not open what we check: fields that mean nothing to us, or that we can put right.
    Kind("an offset of a backing file name that is empty", ANSWERED, "refused", "", "Invalid backing file offset"),
    Kind("an offset of a snapshot table that is empty", ANSWERED, "refused", "", "snapshot table offset invalid"),
    Kind(
        "an autoclear bit that announces a raw data file; we do not know it and clear it before the first write",
        ANSWERED,
        "refused",
        "",
        "data-file-raw requires a data file",
    ),
    Kind("a length of the end marker, where we stop reading", ANSWERED, "refused", "", "Header extension too large"),
    Kind(
        "a backing file of a strange format, which check needs not open",
        ANSWERED,
        "refused",
        "",
        "Unknown driver|ext_backing_format: len=",
    ),
    Kind("bitmaps; QEMU loads them, we count their clusters", ANSWERED, "refused", "", "[Bb]itmap"),
    Kind(
        "a refcount table that cannot lie there: we count without it and write another",
        "corrupt error",
        "refused",
        "refcount table",
        "(?i)refcount table|reference count table",
    ),
    # We do not open, or do not check to the end, what QEMU counts as best it can.
    Kind(
        "a snapshot table that leaves the file or has entries beyond the limits: who its clusters belong to is unknown",
        "error",
        ANSWERED + " refused",
        "the snapshot table cannot be read",
    ),
    Kind(
        "more snapshots than there can be: we say how many the table has, QEMU does since 11",
        "corrupt",
        "refused error",
        "nb_snapshots .*: the snapshot table has",
    ),
    Kind(
        "a snapshot's L1 table that leaves the file, lies over another (walking it could take forever), or is nowhere",
        "corrupt",
        ANSWERED + " refused",
        "snapshot L1 table of .* cannot lie there|has no L1 table",
    ),
    Kind("a bitmap's table, the same way", "error", ANSWERED + " refused", "table of bitmap .* cannot lie there"),
    Kind(
        "an L1 table cut off by the end of the file, or over the header",
        "refused",
        ANSWERED,
        "l1_table_offset .*(past the end|is 0)",
    ),
    Kind(
        "a file shorter than a header, the rest of which QEMU takes for zeros",
        "refused",
        ANSWERED,
        "bytes long, a header has",
    ),
    Kind("a header length that is not a multiple of 8", "refused", ANSWERED, "header_length .*, not a multiple of 8"),
    Kind(
        "a backing file name with a zero byte, which no file has, or within the header's own fields",
        "refused",
        ANSWERED,
        "holds a zero byte|name of .* bytes lies outside",
    ),
    # Both answer, and we say more.
    Kind(
        "the zero flag in version 2, where it is reserved", "corrupt", "clean leaks", "zero flag set, which version 2"
    ),
    Kind("a refcount table cut off within its last cluster", "corrupt error", "clean leaks", "cut off by the end"),
    Kind(
        "an L2 table that the active image uses twice: no writer may", "corrupt", "clean leaks", "shares its L2 table"
    ),
    Kind("data over a table; the refcounts count both", "corrupt", "clean leaks", "tables overlap at"),
    # Both answer, and QEMU says more.
    Kind(
        "a snapshot without the extra data of version 3",
        "clean leaks",
        "corrupt",
        "",
        "snapshot table entry .* incomplete",
    ),
    Kind("a refcount block that cannot be read: we need none", "corrupt", "error", "refcount (block|table)"),
)


def explain(our: Verdict, qemu: Verdict) -> Kind | None:
    """The first kind that accounts for a difference."""
    return next((kind for kind in KINDS if kind.explains(our, qemu)), None)
