"""The header: what is refused, what survives, and which bytes a change of a feature bit touches."""

import re
import struct
from collections.abc import Coroutine
from typing import Any

import pytest

import qcow2
from qcow2.format.header import clear_autoclear, load_header, mark_repaired, read_header, rewrite_header
from tests.builder.record import extension, feature_name_table
from tests.crash.driver import CrashDriver, Issued, SimulatedFile

CLUSTER = 512
FIELDS = ">IIQIIQIIQQIIQQQQIIB7x"
UNKNOWN = [(0xCAFE, b"first, 15 bytes"), (0xBEEF, b""), (0xCAFE, bytes(range(40)))]


def image(*, incompatible: int = 0, autoclear: int = 0, **changes: int) -> SimulatedFile:
    """An empty disk of one L2 table's size in six clusters of 512 bytes, written field by field."""
    fields = {
        "magic": 0x514649FB,
        "version": 3,
        "backing_file_offset": 0,
        "backing_file_size": 0,
        "cluster_bits": 9,
        "size": 64 * CLUSTER,
        "crypt_method": 0,
        "l1_size": 1,
        "l1_table_offset": 3 * CLUSTER,
        "refcount_table_offset": CLUSTER,
        "refcount_table_clusters": 1,
        "nb_snapshots": 0,
        "snapshots_offset": 0,
        "incompatible": incompatible,
        "compatible": 1 << 50,
        "autoclear": autoclear,
        "refcount_order": 4,
        "header_length": 128,
        "compression_type": 0,
    } | changes
    names = feature_name_table([(0, 63, "time travel"), (1, 63, "not this")])
    packed = struct.pack(FIELDS, *fields.values()) + b"\xde\xad" * 8
    packed += b"".join(extension(kind, data) for kind, data in UNKNOWN) + extension(0x6803F857, names) + bytes(8)
    assert len(packed) <= CLUSTER
    file = SimulatedFile("a.qcow2", {}, 6 * CLUSTER)
    file.write(0, packed)
    file.write(CLUSTER, struct.pack(">Q", 2 * CLUSTER))
    file.write(2 * CLUSTER, struct.pack(">5H", 1, 1, 1, 1, 0))
    return file


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return CrashDriver().run(coroutine)


def writes(driver: CrashDriver) -> list[tuple[int, int]]:
    """Place and length of each write, in order."""
    return [(entry.effect.host_offset, entry.effect.nbytes) for entry in driver.journal if isinstance(entry, Issued)]


def test_an_unknown_incompatible_bit_is_refused_by_its_name_in_the_image() -> None:
    with pytest.raises(qcow2.UnsupportedImage, match="time travel"):
        run(read_header(image(incompatible=1 << 63)))


def test_an_unknown_incompatible_bit_without_a_name_is_refused_by_its_number() -> None:
    with pytest.raises(qcow2.UnsupportedImage, match="bit 62"):
        run(read_header(image(incompatible=1 << 62)))


@pytest.mark.parametrize(
    ("field", "offset"),
    [
        *(("l1_table_offset", offset) for offset in (0, 513, 40 << 20, 1 << 62)),  # its empty end may be cut off
        *(("refcount_table_offset", offset) for offset in (0, 513, 6 * CLUSTER, 1 << 62)),
    ],
)
def test_a_table_that_cannot_be_there_is_refused(field: str, offset: int) -> None:
    with pytest.raises(qcow2.CorruptImage, match=field):
        run(read_header(image(**{field: offset})))


def test_the_last_cluster_of_the_file_may_hold_a_table() -> None:
    run(read_header(image(refcount_table_offset=5 * CLUSTER)))


@pytest.mark.parametrize(("nbytes", "refused"), [(64 * CLUSTER, False), (64 * CLUSTER + 1, True)])
def test_the_l1_table_must_map_the_disk(nbytes: int, refused: bool) -> None:
    if refused:
        with pytest.raises(qcow2.CorruptImage, match="l1_size 1"):
            run(read_header(image(size=nbytes)))
    else:
        run(read_header(image(size=nbytes)))


def test_rewriting_an_unchanged_header_changes_no_byte() -> None:
    file = image(incompatible=1, autoclear=1 << 40)
    before = file.content()
    run(rewrite_header(file, run(read_header(file))))
    assert file.content() == before


@pytest.mark.parametrize("name", ["b", "longer/than/before.qcow2"])
def test_another_backing_file_keeps_what_is_unknown(name: str) -> None:
    file = image()
    run(rewrite_header(file, run(read_header(file)).with_backing(name, "raw")))
    header = run(load_header(file))
    assert (header.backing_name, header.backing_format) == (name, "raw")
    assert [(e.magic, e.data) for e in header.extensions if e.magic in (0xCAFE, 0xBEEF)] == UNKNOWN
    assert header.later_fields == bytes(7) + b"\xde\xad" * 8
    assert header.record.compatible_features == 1 << 50


def test_a_name_that_does_not_fit_is_refused_before_any_write() -> None:
    file = image()
    before = file.content()
    with pytest.raises(qcow2.UnsupportedImage, match="512"):
        run(rewrite_header(file, run(read_header(file)).with_backing("x" * 200, "raw")))
    assert file.content() == before


def test_the_dirty_bit_is_cleared_after_a_sync_of_its_own() -> None:
    file, driver = image(incompatible=1), CrashDriver()
    driver.run(mark_repaired(file, driver.run(read_header(file))))
    assert [type(entry).__name__ for entry in driver.journal] == ["Synced", "Issued", "Completed", "Synced"]
    assert writes(driver) == [(72, 8)]
    assert not run(read_header(file)).is_dirty


def test_a_repair_clears_the_corrupt_bit_too() -> None:
    file = image(incompatible=3)
    assert not run(mark_repaired(file, run(read_header(file)))).is_corrupt
    assert run(read_header(file)).record.incompatible_features == 0


def test_autoclear_bits_are_cleared_by_eight_bytes() -> None:
    file, driver = image(autoclear=1 << 63 | 1), CrashDriver()
    driver.run(clear_autoclear(file, driver.run(read_header(file))))
    assert writes(driver) == [(88, 8)]
    assert run(read_header(file)).record.autoclear_features == 0


@pytest.mark.parametrize("name", [b"da\0ta", b"data\0", b"\0"])
def test_a_name_with_a_zero_byte_is_refused_and_never_cut_off(name: bytes) -> None:
    with_data_file = image(incompatible=4)
    with_data_file.write(128, extension(0x44415441, name) + bytes(8))
    with pytest.raises(qcow2.CorruptImage, match=f"data file name {re.escape(repr(name))} holds a zero byte"):
        run(load_header(with_data_file))
    with_backing = image(backing_file_offset=500, backing_file_size=len(name))
    with_backing.write(500, name)
    with pytest.raises(qcow2.CorruptImage, match=f"backing file name {re.escape(repr(name))} holds a zero byte"):
        run(load_header(with_backing))
