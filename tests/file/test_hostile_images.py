"""No image, however crafted, makes a visitor crash, hang or take memory without bound: it is read, or refused.

The visitor lives in 1 GiB of address space and has ten seconds of a processor an image; see `tests.visitor`.
"""

import random
import struct
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest

from tests.builder import Built, Recipe, build
from tests.builder.record import BACKING_FORMAT, COMPRESSED, COPIED, EXTENDED_L2, HEADER_FIELDS, LAZY_REFCOUNTS
from tests.visitor import Visit, visit

READERS = ["read", "check", "info", "map", "dump-header"]
WRITERS = ["write", "repair"]
EDGES = [0, 1, 2, 7, 8, 9, 22, 31, 32, 63, 64, 511, 512, 513, 65535, 65536, 65537, 1 << 20, (1 << 31) - 1, 1 << 31]
WIDE_EDGES = [1 << 32, (1 << 32) + 65536, 1 << 55, 1 << 56, (1 << 62) - 1, 1 << 62, 1 << 63, (1 << 64) - 512]


def victim(path: Path, *, version: int = 3, seed: int = 0) -> Built:
    """A small image with something of everything."""
    rng = random.Random(seed)
    recipe = Recipe(size=600 * 4096, cluster_bits=12, version=version, layout="scattered", seed=seed)
    recipe.extensions = [(BACKING_FORMAT, b"raw"), (0xCAFE, b"unknown")]
    recipe.compatible = LAZY_REFCOUNTS if version == 3 else 0
    for index in range(30):
        recipe.data(index, rng.randbytes(64))
    for index in range(30, 40):
        recipe.compressed(index, rng.randbytes(1000), skip=index % 5)
    if version == 3:
        recipe.zero(41)
        recipe.preallocated_zero(42, b"hidden")
    recipe.data(599, b"last")
    recipe.snapshot("kept")
    recipe.data(3, b"newer")
    return build(recipe, path)


def no_visit_failed(visits: list[Visit]) -> None:
    """Done or refused; a refusal is one line that names the image."""
    failed = [visit for visit in visits if visit.end == "failed"]
    assert not failed, f"{len(failed)} of {len(visits)}: {failed[0].path}\n{failed[0].text}"
    for one in visits:
        if one.end == "refused":
            assert Path(one.path).name in one.text, one


def images(tmp_path: Path, damages: Iterator[tuple[str, Callable[[Built], None]]]) -> list[Path]:
    paths = []
    for name, damage in damages:
        built = victim(tmp_path / name)
        damage(built)
        paths.append(built.path)
    return paths


def header_damages() -> Iterator[tuple[str, Callable[[Built], None]]]:
    for field, (_, code) in HEADER_FIELDS.items():
        limit = 8 * struct.calcsize(">" + code)
        for value in [*EDGES, *WIDE_EDGES, (1 << limit) - 1]:
            if value < 1 << limit:
                yield f"{field}-{value:x}", lambda built, f=field, v=value: built.set_header(**{f: v})


def table_damages() -> Iterator[tuple[str, Callable[[Built], None]]]:
    entries = [*EDGES, *WIDE_EDGES, (1 << 64) - 1]
    entries += [COPIED | 4096, COPIED, 4096 | 1, COMPRESSED, COMPRESSED | 0x3FFF_FFFF_FFFF_FFFF, COMPRESSED | 1]
    for entry in entries:
        yield f"l1-{entry:x}", lambda built, e=entry: built.set_l1(0, e)
        yield f"l2-{entry:x}", lambda built, e=entry: built.set_l2(3, e)
        yield f"reftable-{entry:x}", lambda built, e=entry: built.set_refcount_table(0, e)
    own = [
        ("l1-to-header", lambda built: built.set_l1(0, COPIED | 0)),
        ("l1-to-l1", lambda built: built.set_l1(0, COPIED | built.l1_offset)),
        ("l1-twice", lambda built: built.set_l1(0, COPIED | built.l2_offsets[1])),
        ("l2-to-l2", lambda built: built.set_l2(3, COPIED | built.l2_offsets[0])),
        ("l2-to-l1", lambda built: built.set_l2(3, COPIED | built.l1_offset)),
        ("l2-to-reftable", lambda built: built.set_l2(3, COPIED | built.refcount_table_offset)),
        ("l2-twice", lambda built: built.set_l2(5, built.l2(6))),
        ("reftable-to-itself", lambda built: built.set_refcount_table(0, built.refcount_table_offset)),
        ("reftable-to-l1", lambda built: built.set_refcount_table(0, built.l1_offset)),
    ]
    yield from own


def snapshot_damages() -> Iterator[tuple[str, Callable[[Built], None]]]:
    def damage(built: Built, at: int, code: str, value: int) -> None:
        start = struct.unpack(">Q", built.peek(HEADER_FIELDS["snapshots_offset"][0], 8))[0]
        built.poke(start + at, struct.pack(">" + code, value))

    for name, at, code in [("l1", 0, "Q"), ("l1size", 8, "I"), ("id", 12, "H"), ("name", 14, "H"), ("extra", 36, "I")]:
        for value in [0, 1, 512, 65535, (1 << 31) - 1, (1 << 32) - 1, (1 << 63) | 4096]:
            if value < 1 << 8 * struct.calcsize(code):
                yield f"snapshot-{name}-{value:x}", lambda b, a=at, c=code, v=value: damage(b, a, c, v)


def truncations() -> Iterator[tuple[str, Callable[[Built], None]]]:
    for nbytes in [0, 1, 4, 71, 72, 103, 104, 112, 511, 4095, 4096, 4097, 8192, 20000, 65536, 100_000]:
        yield f"truncated-{nbytes}", lambda built, n=nbytes: built.truncate(n)


def splashes(count: int) -> Iterator[tuple[str, Callable[[Built], None]]]:
    """Random bytes over random places of the tables, now and then of the header."""

    def splash(built: Built, seed: int) -> None:
        rng = random.Random(seed)
        tables = [built.l1_offset, built.refcount_table_offset, *([0] if seed % 8 == 0 else [])]
        tables += [*built.l2_offsets.values(), *built.refcount_block_offsets.values()]
        for _ in range(rng.randrange(1, 12)):
            built.poke(rng.choice(tables) + rng.randrange(320), rng.randbytes(rng.choice([1, 1, 2, 8])))

    for seed in range(count):
        yield f"splash-{seed}", lambda built, s=seed: splash(built, s)


DAMAGES = {
    "header fields": header_damages,
    "tables": table_damages,
    "snapshot table": snapshot_damages,
    "truncation": truncations,
    "splashes": lambda: splashes(120),
}


@pytest.mark.sample(8)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("action", READERS)
def test_reading_ends_well(tmp_path: Path, action: str, damage: str) -> None:
    every = 1 if action == "read" else 3
    no_visit_failed(visit(action, images(tmp_path, islice(DAMAGES[damage](), 0, None, every))))


@pytest.mark.sample(4)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("action", WRITERS)
def test_writing_ends_well(tmp_path: Path, action: str, damage: str) -> None:
    """One image in four: a writer syncs many times."""
    no_visit_failed(visit(action, images(tmp_path, islice(DAMAGES[damage](), 1, None, 4))))


def test_an_extension_longer_than_the_cluster_is_refused(tmp_path: Path) -> None:
    built = victim(tmp_path / "a")
    built.poke(116, struct.pack(">I", 0xFFFF_FFF0))
    (one,) = visit("read", [built.path])
    assert one.end == "refused"


def test_an_enormous_disk_without_tables_reads_as_zeros(tmp_path: Path) -> None:
    """The largest disk an L1 table of 32 MiB can map; nothing may be sized by it."""
    size = (32 << 20) // 8 * (1 << 18) * (1 << 21)
    recipe = Recipe(size=1 << 40, cluster_bits=21)
    build(recipe, tmp_path / "a").set_header(size=min(size, (1 << 63) - 512))
    (one,) = visit("read", [tmp_path / "a"])
    assert one.end == "refused"
    build(recipe, tmp_path / "b")
    (one,) = visit("read", [tmp_path / "b"])
    assert one.end == "done"


def test_subclusters_of_less_than_a_sector_are_refused(tmp_path: Path) -> None:
    build(Recipe(size=1 << 20, cluster_bits=13, incompatible=EXTENDED_L2), tmp_path / "a")
    (one,) = visit("write", [tmp_path / "a"])
    assert "extended L2 entries need 14" in one.text


def huge_tables(path: Path, nbitmaps: int, nentries: int) -> Path:
    """An image with bitmaps that are in use, their tables in a hole of the file."""
    recipe = Recipe(size=600 * 4096, cluster_bits=12, bitmaps=[(f"b{index:02}", 16) for index in range(nbitmaps)])
    recipe.data(0, b"first")
    built = build(recipe, path)
    content = path.read_bytes()
    hole = 1 << 30
    for index in range(nbitmaps):
        name = content.index(f"b{index:02}".encode())
        built.poke(name - 24, struct.pack(">QII", hole, nentries, 1 << 1 | 1 << 0))
        hole += nentries * 8
    built.truncate(hole)
    return path


def test_tables_of_bitmaps_take_no_memory_without_bound(tmp_path: Path) -> None:
    paths = [huge_tables(tmp_path / "long", 2, 0x8000000), huge_tables(tmp_path / "many", 48, 1 << 20)]
    for action in ("write", "info"):
        visits = visit(action, paths)
        no_visit_failed(visits)
        assert [each.end for each in visits] == ["done"] * 2


def snapshot_entries(*l1_tables: tuple[int, int]) -> bytes:
    """A snapshot table for L1 tables that each have a place and so many entries."""
    return b"".join(
        struct.pack(">QIHHIIQII", offset, nentries, 2, 2, 0, 0, 0, 0, 16) + struct.pack(">QQ4s4x", 0, 4096, b"idme")
        for offset, nentries in l1_tables
    )


def test_l1_tables_of_snapshots_that_overlap_are_read_once(tmp_path: Path) -> None:
    built = victim(tmp_path / "overlapping")
    entries = snapshot_entries(*((1 << 30, (4 << 20) - index) for index in range(1000)))
    built.poke(1 << 29, entries)
    built.set_header(snapshots_offset=1 << 29, nb_snapshots=1000)
    built.truncate((1 << 30) + (32 << 20))
    (one,) = visit("write", [built.path])
    assert one.end == "done"


def test_l1_tables_of_snapshots_in_one_long_row_are_refused(tmp_path: Path) -> None:
    """Each overlaps the next, so that all are one stretch of a TiB."""
    built = victim(tmp_path / "in-a-row")
    entries = snapshot_entries(*(((1 << 30) + index * ((32 << 20) - 4096), 4 << 20) for index in range(30000)))
    built.poke(1 << 29, entries)
    built.set_header(snapshots_offset=1 << 29, nb_snapshots=30000)
    built.truncate(1 << 40)
    (one,) = visit("write", [built.path])
    assert one.end == "refused"


def test_references_past_the_end_take_no_memory_without_bound(tmp_path: Path) -> None:
    """Each of 65536 is to clusters that nothing else is near: 20 KiB of counts of their own."""
    built = build(Recipe(size=1 << 45), tmp_path / "far")
    start, per_table = 1 << 20, 8192
    built.truncate(start + (8 << 16))
    for number in range(8):
        built.set_l1(number, COPIED | start + (number << 16))
        places = range(number * per_table, (number + 1) * per_table)
        built.poke(start + (number << 16), struct.pack(">8192Q", *(COPIED | (place + 16) << 28 for place in places)))
    for action in ("check", "repair"):
        (one,) = visit(action, [built.path])
        assert one.end == "done", one.text


@pytest.mark.parametrize("nb_snapshots", [3, 65535])
def test_a_lost_snapshot_table_is_not_looked_for_without_end(tmp_path: Path, nb_snapshots: int) -> None:
    """Each of 1500 clusters could be the first one of a table that goes on to the end of the file."""
    built = build(Recipe(size=600 * 4096, cluster_bits=12), tmp_path / "many")
    start = 1 << 20
    entries = snapshot_entries((4096, 1)) * (1500 * 64)
    built.poke(start, entries)
    for number in range(1500):
        built.set_refcount(start + (number << 12), 1)
    built.set_header(nb_snapshots=nb_snapshots, snapshots_offset=512)
    before = built.path.read_bytes()
    (one,) = visit("repair", [built.path])
    assert one.end == "refused", one.text
    assert built.path.read_bytes() == before


def test_holes_in_tables_are_passed_over(tmp_path: Path) -> None:
    """256 L1 tables of 32 MiB each lie in a hole."""
    built = victim(tmp_path / "hole")
    built.poke(1 << 29, snapshot_entries(*(((1 << 30) + (index << 25), 4 << 20) for index in range(256))))
    built.set_header(snapshots_offset=1 << 29, nb_snapshots=256)
    built.truncate(9 << 30)
    for action in ("check", "repair"):
        (one,) = visit(action, [built.path])
        assert one.end == "done", one.text


def test_bitmaps_and_snapshots_with_many_clusters_are_opened_soon(tmp_path: Path) -> None:
    """131072 clusters of a bitmap lie in front of a million of L1 tables."""
    recipe = Recipe(size=1 << 41, cluster_bits=12, bitmaps=[("many", 9)])
    built = build(recipe, tmp_path / "large")
    name = built.path.read_bytes().index(b"many")
    (table,) = struct.unpack(">Q", built.peek(name - 24, 8))
    built.poke(name - 12, struct.pack(">I", 1 << 1 | 1 << 0))  # in use: its bits are not read
    built.poke(table, struct.pack(">131072Q", *(1 << 30 | index << 12 for index in range(131072))))
    entries = snapshot_entries(*(((2 << 30) + (index << 25), 4 << 20) for index in range(127)))
    built.poke(1 << 29, entries)
    built.set_header(snapshots_offset=1 << 29, nb_snapshots=127)
    built.truncate(6 << 30)
    (one,) = visit("write", [built.path])
    assert one.end == "done", one.text


def test_a_sparse_file_in_the_dark_takes_no_memory_without_bound(tmp_path: Path) -> None:
    """A reference that leads nowhere, and no refcounts: new ones would keep each of 2^28 clusters, and one."""
    recipe = Recipe(size=600 * 4096, cluster_bits=12)
    recipe.data(3, b"data")
    built = build(recipe, tmp_path / "sparse")
    built.set_l2(3, COPIED | 1 << 55)
    built.set_refcount_table(0, 0)
    built.truncate((1 << 40) + 4096)
    before = built.peek(0, 1 << 20)
    (one,) = visit("repair", [built.path])
    assert one.end == "refused"
    assert "limit" in one.text
    assert built.peek(0, 1 << 20) == before
