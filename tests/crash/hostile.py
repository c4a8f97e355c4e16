"""Law 9 on a list of images, each with one field that cannot be true: refused, and nothing touched.

The images are the independent builder's. What the field means to guest cluster 3 is named by the case.
"""

import random
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from qcow2.driver.buffer import MemoryBuffer
from qcow2.engine.image import Image
from qcow2.engine.opened import OpenOptions
from qcow2.error import ImageError
from qcow2.judge.check import check
from qcow2.judge.report import Report
from tests.builder import Built, Recipe, build
from tests.builder.record import COPIED
from tests.crash.driver import SimulatedFile
from tests.crash.explorer import Violation
from tests.fuzz.trial import attempt, run, try_out

CLUSTER = 4096
GUEST_CLUSTER = 3
FAR = 1 << 40  # past the end of every file

CASES: dict[str, Callable[[Built], None]] = {
    "l1-too-long": lambda built: built.set_header(l1_size=(1 << 32) - 1),
    "l1-too-short": lambda built: built.set_header(l1_size=0),
    "l1-past-the-end": lambda built: built.set_header(l1_table_offset=FAR),
    "l1-unaligned": lambda built: built.set_header(l1_table_offset=built.l1_offset + 512),
    "refcount-table-past-the-end": lambda built: built.set_header(refcount_table_offset=FAR),
    "l2-past-the-end": lambda built: built.set_l1(0, COPIED | FAR),
    "l2-unaligned": lambda built: built.set_l1(0, COPIED | built.l2_offsets[0] + 512),
    "l1-entry-reserved-bit": lambda built: built.set_l1(0, COPIED | built.l2_offsets[0] | 1),
    "data-past-the-end": lambda built: built.set_l2(GUEST_CLUSTER, COPIED | FAR),
    "data-unaligned": lambda built: built.set_l2(GUEST_CLUSTER, built.l2(GUEST_CLUSTER) + 512),
    "l2-entry-reserved-bit": lambda built: built.set_l2(GUEST_CLUSTER, built.l2(GUEST_CLUSTER) | 2),
    "data-in-the-l1-table": lambda built: built.set_l2(GUEST_CLUSTER, COPIED | built.l1_offset),
    "data-in-an-l2-table": lambda built: built.set_l2(GUEST_CLUSTER, COPIED | built.l2_offsets[0]),
    "data-in-the-refcount-table": lambda built: built.set_l2(GUEST_CLUSTER, COPIED | built.refcount_table_offset),
    "data-in-a-refcount-block": lambda built: built.set_l2(GUEST_CLUSTER, COPIED | built.refcount_block_offsets[0]),
}


def hostile_image(case: str) -> bytes:
    """A sound image but for what *case* says."""
    rng = random.Random(case)
    recipe = Recipe(size=600 * CLUSTER, cluster_bits=12, layout="scattered", seed=9)
    for index in range(8):
        recipe.data(index, rng.randbytes(64))
    recipe.data(599, b"last")
    with TemporaryDirectory() as directory:
        built = build(recipe, Path(directory) / "image")
        CASES[case](built)
        return built.path.read_bytes()


def is_only_marked(old: bytes, new: bytes) -> bool:
    """Whether *new* is *old* with the corrupt bit set, and COPIED flags cleared, at most."""
    differing = [offset for offset in range(len(old)) if old[offset] != new[offset]]
    flags = {offset for offset in differing if offset % 8 == 0 and old[offset] == new[offset] | 0x80}
    return len(old) == len(new) and all(offset in flags or (offset, new[offset]) == (79, 2) for offset in differing)


def face(case: str) -> int:
    """Check, open and write the image of *case*, and do to it whatever a fuzzer would; how many images that were.

    Raises: Violation if it is called sound, if guest cluster 3 can be written, or if more than flags changed.
    """
    content = hostile_image(case)
    verdict = attempt(lambda: run(check(SimulatedFile.parse("image", content))))
    if isinstance(verdict, Report) and not verdict.corruptions and not verdict.check_errors:
        raise Violation(f"{case}: check calls it sound")
    file = SimulatedFile.parse("image", content)
    if not isinstance(attempt(lambda: _write(file)), ImageError):
        raise Violation(f"{case}: guest cluster {GUEST_CLUSTER} is not refused")
    if not is_only_marked(content, file.content()):
        raise Violation(f"{case}: refused, and the file was changed")
    try_out(content)
    return 1


def _write(file: SimulatedFile) -> None:
    image: Image = run(Image.open(file, options=OpenOptions(writable=True)))
    run(image.write(GUEST_CLUSTER * CLUSTER, MemoryBuffer(memoryview(b"\xa5" * CLUSTER))))
