"""The records C and Python share, and those C takes from the kernel, have the layout that the specification prints.

Read from the DWARF of the compiled extension.
"""

import struct
from functools import cache
from typing import Any, NamedTuple

import pytest
from elftools.elf.elffile import ELFFile

import ring._native
from ring.counter import NAMES
from ring.trace import RECORD, Flag, Kind
from ring.worker import EVENT


class Record(NamedTuple):
    """A struct as the compiler laid it out."""

    nbytes: int
    offsets: dict[str, int]


@cache
def records() -> dict[str, Record]:
    """Every named struct of the data plane's extension."""
    found: dict[str, Record] = {}
    with open(ring._native.__file__, "rb") as file:
        for unit in ELFFile(file).get_dwarf_info().iter_CUs():  # type: ignore[no-untyped-call]
            for entry in unit.iter_DIEs():
                if (
                    entry.tag == "DW_TAG_structure_type"
                    and {"DW_AT_name", "DW_AT_byte_size"} <= entry.attributes.keys()
                ):
                    found[entry.attributes["DW_AT_name"].value.decode()] = describe(entry)
    return found


def enumerators(name: str) -> dict[str, int]:
    """The constants of an enum of the data plane's extension."""
    with open(ring._native.__file__, "rb") as file:
        for unit in ELFFile(file).get_dwarf_info().iter_CUs():  # type: ignore[no-untyped-call]
            for entry in unit.iter_DIEs():
                if entry.tag == "DW_TAG_enumeration_type" and name_of(entry) == name:
                    return {
                        child.attributes["DW_AT_name"].value.decode(): child.attributes["DW_AT_const_value"].value
                        for child in entry.iter_children()
                    }
    raise LookupError(name)


def name_of(entry: Any) -> str | None:
    name = entry.attributes.get("DW_AT_name")
    return name and name.value.decode()


def describe(entry: Any) -> Record:
    members = [child for child in entry.iter_children() if child.tag == "DW_TAG_member"]
    offsets = {
        member.attributes["DW_AT_name"].value.decode(): member.attributes["DW_AT_data_member_location"].value
        for member in members
        if "DW_AT_name" in member.attributes
    }
    return Record(entry.attributes["DW_AT_byte_size"].value, offsets)


SPECIFIED = {
    # virtio 1.2, 2.7.5 to 2.7.8
    "vring_desc": Record(16, {"addr": 0, "len": 8, "flags": 12, "next": 14}),
    "vring_avail": Record(4, {"flags": 0, "idx": 2, "ring": 4}),
    "vring_used_elem": Record(8, {"id": 0, "len": 4}),
    "vring_used": Record(4, {"flags": 0, "idx": 2, "ring": 4}),
    # virtio 1.2, 2.8.13 and 2.8.14
    "vring_packed_desc": Record(16, {"addr": 0, "len": 8, "id": 12, "flags": 14}),
    "vring_packed_desc_event": Record(4, {"off_wrap": 0, "flags": 2}),
    # vhost-user "Inflight I/O tracking"
    "inflight_split_entry": Record(16, {"inflight": 0, "padding": 1, "next": 6, "counter": 8}),
    "inflight_split": Record(
        16, {"features": 0, "version": 8, "desc_num": 10, "last_batch_head": 12, "used_idx": 14, "desc": 16}
    ),
    "inflight_packed_entry": Record(
        32,
        {
            "inflight": 0,
            "padding": 1,
            "next": 2,
            "last": 4,
            "num": 6,
            "counter": 8,
            "id": 16,
            "flags": 18,
            "len": 20,
            "addr": 24,
        },
    ),
    "inflight_packed": Record(
        32,
        {
            "features": 0,
            "version": 8,
            "desc_num": 10,
            "free_head": 12,
            "old_free_head": 14,
            "used": 16,  # inflight_packed_used, whose offsets are asserted in C
            "padding": 24,
            "desc": 32,
        },
    ),
    # virtio 1.2, 5.2.6
    "virtio_blk_outhdr": Record(16, {"type": 0, "ioprio": 4, "sector": 8}),
    "virtio_blk_discard_write_zeroes": Record(16, {"sector": 0, "num_sectors": 8, "flags": 12}),
    # ring/extent.h, implemented by another extension
    "extent": Record(32, {"kind": 0, "slot": 4, "host_offset": 8, "nbytes": 16, "cipher": 24}),
    # ring/operations.py builds these
    "piece": Record(24, {"source": 0, "start": 8, "nbytes": 16}),
}


@pytest.mark.parametrize("name", SPECIFIED)
def test_layout_is_the_specified_one(name: str) -> None:
    assert records()[name] == SPECIFIED[name]


PACKED = {
    "worker_event": (EVENT, "kind result id type flags offset nbytes"),
    "trace_record": (RECORD, "kind result id offset nbytes slot type flags content_nbytes"),
}


@pytest.mark.parametrize("name", PACKED)
def test_record_is_what_python_packs(name: str) -> None:
    packed, names = PACKED[name]
    offsets, at = {}, 0
    for field, code in zip(names.split(), packed.format.removeprefix("="), strict=True):
        offsets[field] = at
        at += struct.calcsize("=" + code)
    assert records()[name] == Record(packed.size, offsets)


def test_kinds_and_flags_of_a_trace_are_the_compilers() -> None:
    assert enumerators("trace_kind") == {f"TRACE_{kind.name}": kind for kind in Kind}
    assert enumerators("trace_flag") == {f"TRACE_{flag.name}": flag for flag in Flag}


def test_counters_are_the_fields_of_the_frozen_record() -> None:
    assert records()["worker_counters"] == Record(8 * len(NAMES), {name: 8 * i for i, name in enumerate(NAMES)})
