"""The one decoder of table entries, against the specification written down once more; and that it is the only one."""

import random
import re
from pathlib import Path

import pytest

from qcow2.native import ffi, lib
from qcow2.plane.entry import WORD_BITS, Entries
from qcow2.plane.l2cache import Kind

ROOT = Path(__file__).resolve().parents[2]
DECODER = {"qcow2/plane/entry.h", "qcow2/plane/entry.py", "qcow2/native.py", "qcow2/native.cdef"}
BITS = re.compile(
    r"(?i:0x0*(?:00ff_?ffff_?ffff_?fe00|7f00_?0000_?0000_?01ff|3f00_?0000_?0000_?01fe))|<< *6[23]\b"
    r"|(?<!\w)(?:L1_)?ENTRY_(?:OFFSET|COPIED|COMPRESSED|ZERO|RESERVED)\b",
)
OTHERS = {  # bits of other tables, and what is that large for another reason
    "qcow2/format/layout.py": "BITMAP_ENTRY_OFFSET_MASK",
    "qcow2/node/raw.py": "FILE_SIZE_MAX",
    "qcow2/tool/quantity.py": "LIMIT",
}


def test_no_bit_of_an_entry_is_known_outside_the_decoder() -> None:
    found: list[str] = []
    for path in sorted([*ROOT.glob("qcow2/**/*.py"), *ROOT.glob("qcow2/**/*.[ch]")]):
        name = str(path.relative_to(ROOT))
        lines = path.read_text().splitlines() if name not in DECODER else ()
        known = OTHERS.get(name, "nothing")
        found += [f"{name}: {line.strip()}" for line in lines if BITS.search(line) and known not in line]
    assert found == []


def expected_kind(word: int, version: int) -> Kind:
    """What the specification says of an 8-byte entry, wherever the file ends."""
    offset = word >> 9 & (1 << 47) - 1
    if word >> 62 & 1:
        return Kind.COMPRESSED
    if word >> 56 & 0x3F or word >> 1 & 0xFF or (version < 3 and word & 1):
        return Kind.BAD
    if word & 1:
        return Kind.ZERO_ALLOCATED if offset else Kind.ZERO_PLAIN
    return Kind.DATA if offset else Kind.UNALLOCATED


def decode(entries: Entries, entry: int, guest_offset: int = 0) -> tuple[Kind, int, int]:
    """Kind, host offset and length of the run that a map of one such entry describes at *guest_offset*."""
    cluster_size = 1 << entries.native.cluster_bits
    l2map = ffi.gc(lib.l2map_create(entries.native, 64 * cluster_size, 64), lib.l2map_destroy)
    l1 = ffi.new("uint64_t[]", [cluster_size])
    lib.l2map_set_l1(l2map, l1, 1)
    lib.l2map_set_file_end(l2map, 1 << 62)
    slice_bytes = min(cluster_size, 4096)
    table = entries.pack([entry]).ljust(slice_bytes, b"\0")
    lib.l2map_load(l2map, 0, ffi.from_buffer("uint8_t[]", table))
    run = ffi.new("struct l2_run *")
    lib.l2map_describe(l2map, guest_offset, cluster_size - guest_offset, run)
    assert run.entry.word | run.entry.bitmap << WORD_BITS == entry
    return Kind(run.kind), run.host_offset, run.nbytes


@pytest.mark.parametrize(("cluster_bits", "version"), [(9, 2), (9, 3), (16, 3), (21, 3), (21, 2)])
def test_random_entries_mean_what_the_specification_says(cluster_bits: int, version: int) -> None:
    draw = random.Random(cluster_bits * version)
    entries = Entries(cluster_bits, version)
    for _ in range(400):
        word = draw.getrandbits(64) & draw.getrandbits(64) & draw.choice([(1 << 64) - 1, (1 << 56) - 1 & ~0x1FE])
        if draw.random() < 0.8 and not word >> 62 & 1:
            word &= ~((1 << cluster_bits) - 2)
        kind, host_offset, nbytes = decode(entries, word)
        expected = expected_kind(word, version)
        if expected not in (Kind.COMPRESSED, Kind.BAD) and word & ((1 << cluster_bits) - 1) & ~1:
            expected = Kind.BAD  # askew
        assert kind == expected, f"{word:#018x}"
        assert nbytes == 1 << cluster_bits
        if kind == Kind.COMPRESSED:
            shift = 62 - (cluster_bits - 8)
            assert host_offset == word & (1 << shift) - 1
            sectors = (word >> shift & (1 << cluster_bits - 8) - 1) + 1
            assert entries.payload(word) == (host_offset, sectors * 512 - host_offset % 512)
        elif kind != Kind.BAD:
            assert host_offset == entries.host_offset(word) == word & 0x00FF_FFFF_FFFF_FE00


@pytest.mark.parametrize("cluster_bits", [14, 16, 21])
def test_random_subclusters_mean_what_the_specification_says(cluster_bits: int) -> None:
    draw = random.Random(cluster_bits)
    entries = Entries(cluster_bits, 3, has_subclusters=True)
    unit = 1 << cluster_bits - 5
    for _ in range(400):
        data, zero = (draw.choice([0, draw.getrandbits(32), 0xFFFF << draw.randrange(16), 0xFFFFFFFF]) for _ in "12")
        if draw.random() < 0.9:
            zero &= ~data
        offset = draw.choice([0, draw.randrange(1, 1000) << cluster_bits])
        word = offset | draw.getrandbits(1) << 63 | draw.getrandbits(1)  # bit 0 means nothing
        at = draw.randrange(32)
        kinds = [
            Kind.DATA
            if data >> i & 1
            else (Kind.ZERO_ALLOCATED if offset else Kind.ZERO_PLAIN)
            if zero >> i & 1
            else Kind.UNALLOCATED
            for i in range(32)
        ]
        kind, host_offset, nbytes = decode(entries, word | (data | zero << 32) << WORD_BITS, at * unit)
        if data & zero or (data and not offset):
            assert kind == Kind.BAD
            continue
        same = next((i for i in range(at, 32) if kinds[i] != kinds[at]), 32)
        assert (kind, nbytes) == (kinds[at], (same - at) * unit)
        assert host_offset == (offset + at * unit if offset else 0)


def test_what_is_made_says_what_it_shall() -> None:
    plain, extended = Entries(16, 3), Entries(16, 3, has_subclusters=True)
    assert plain.data(0x50000, 2) == [1 << 63 | 0x50000, 1 << 63 | 0x60000]
    assert (plain.zeros, Entries(16, 2).zeros) == (1, 0)
    assert extended.zeros == 0xFFFFFFFF << 32 << WORD_BITS
    (full,) = extended.data(0x50000)
    assert extended.pack([full]).hex() == "800000000005000000000000ffffffff"
    assert extended.pack([extended.zeroed(full, 2, 3)]).hex() == "80000000000500000000000cfffffff3"
    assert extended.written(extended.zeros, 0x50000, 31, 31) == 1 << 63 | 0x50000 | 0x7FFFFFFF_80000000 << WORD_BITS
    assert extended.written(0, 0x50000, 0, 31) == full
    assert plain.moved(plain.data(0x50000)[0], 2) == plain.data(0x50000, 2)


@pytest.mark.parametrize("cluster_bits", range(9, 22))
def test_every_stream_of_a_cluster_has_an_entry(cluster_bits: int) -> None:
    entries = Entries(cluster_bits, 3)
    for host_offset in (1 << 30, (1 << 30) + 511):
        for nbytes in (1, 512, 1 << cluster_bits):
            start, most = entries.payload(entries.descriptor(host_offset, nbytes))
            assert start == host_offset
            assert nbytes <= most < nbytes + 512
