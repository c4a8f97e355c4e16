"""The records C and Python share, and those C takes from the kernel, have the layout that the specification prints.

Read from the DWARF of the compiled extension.
"""

import io
import re
import struct
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from elftools.elf.elffile import ELFFile

import qcow2._native
import ring._native
from qcow2.plane.l2cache import Kind as RunKind
from qcow2.plane.tally import Role
from ring import operations, worker
from ring.counter import NAMES
from ring.memory import REGIONS_MAX
from ring.trace import RECORD, Flag, Kind
from ring.virtqueue import QUEUES_MAX
from ring.worker import EVENT
from virtio.config import SERIAL_MAX


class Record(NamedTuple):
    """A struct as the compiler laid it out."""

    nbytes: int
    offsets: dict[str, int]


@cache
def records() -> dict[str, Record]:
    """Every named struct of the data plane's extension."""
    found: dict[str, Record] = {}
    for entry in entries(ring._native.__file__):
        if entry.tag == "DW_TAG_structure_type" and {"DW_AT_name", "DW_AT_byte_size"} <= entry.attributes.keys():
            found[entry.attributes["DW_AT_name"].value.decode()] = describe(entry)
    return found


def enumerators(name: str, extension: ModuleType = ring._native) -> dict[str, int]:
    """The constants of an enum of an extension."""
    for entry in entries(extension.__file__ or ""):
        if entry.tag == "DW_TAG_enumeration_type" and name_of(entry) == name:
            return {
                child.attributes["DW_AT_name"].value.decode(): child.attributes["DW_AT_const_value"].value
                for child in entry.iter_children()
            }
    raise LookupError(name)


@cache
def entries(path: str) -> list[Any]:
    """What DWARF says of each type, function and variable of a compiled file."""
    with open(path, "rb") as file:
        elf = ELFFile(io.BytesIO(file.read()))
    units = elf.get_dwarf_info().iter_CUs()  # type: ignore[no-untyped-call]
    return [entry for unit in units for entry in unit.get_top_DIE().iter_children()]


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


MIRRORED: dict[str, tuple[ModuleType, dict[str, int]]] = {
    "trace_kind": (ring._native, {f"TRACE_{kind.name}": kind for kind in Kind}),
    "trace_flag": (ring._native, {f"TRACE_{flag.name}": flag for flag in Flag}),
    "worker_event_kind": (
        ring._native,
        {
            f"EVENT_{name}": getattr(worker, name)
            for name in ("REQUEST", "DONE", "CONTROL", "DRAINED", "BROKEN", "SYNC_FAILED", "IDLE", "QUIET", "ROOM")
        },
    ),
    "transfer_flag": (
        ring._native,
        {f"TRANSFER_{name}": getattr(operations, name) for name in ("READ", "WRITE", "DATA", "DESPITE")},
    ),
    "l2_kind": (qcow2._native, {f"L2_{kind.name}": kind for kind in RunKind}),
}


@pytest.mark.parametrize("name", MIRRORED)
def test_numbers_that_python_repeats_are_the_compilers(name: str) -> None:
    extension, numbers = MIRRORED[name]
    assert enumerators(name, extension) == numbers


def test_roles_that_python_repeats_are_the_compilers() -> None:
    """Each side has some of its own: no bit has two meanings."""
    compiled = enumerators("tally_role", qcow2._native)
    repeated = {f"TALLY_{role.name}": int(role) for role in Role}
    assert {name: number for name, number in compiled.items() if name in repeated}.items() <= repeated.items()
    assert not {number for name, number in repeated.items() if name not in compiled} & set(compiled.values())


LIMITS = [
    ("ring/memory.h", "GUEST_REGIONS_MAX", REGIONS_MAX),
    ("ring/worker.h", "WORKER_QUEUES", QUEUES_MAX),
    ("virtio/block.h", "BLOCK_SERIAL_NBYTES", SERIAL_MAX),
]


@pytest.mark.parametrize(("header", "name", "number"), LIMITS)
def test_limits_that_python_repeats_are_those_of_the_headers(header: str, name: str, number: int) -> None:
    text = (Path(__file__).parents[2] / header).read_text()
    assert re.findall(rf"#define {name} (\d+)", text) == [str(number)]


def test_counters_are_the_fields_of_the_frozen_record() -> None:
    assert records()["worker_counters"] == Record(8 * len(NAMES), {name: 8 * i for i, name in enumerate(NAMES)})
