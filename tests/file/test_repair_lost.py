"""`check -r` of what the image itself tells how to mend: a lost snapshot table, places of zeros that lie askew."""

import random
import struct
from pathlib import Path

import pytest

import qcow2
from tests.oracle import assert_clean, qemu_img, read_header
from tests.program import qcow2_tool, qcow2_tool_ok

SIZE = 2 << 20


def poke(path: Path, offset: int, form: str, *values: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack(form, *values))


def created(path: Path, nsnapshots: int, options: str = "compat=1.1") -> bytes:
    """An image with so many snapshots; what its disk holds."""
    draw = random.Random(nsnapshots)
    qcow2_tool_ok("create", "-o", options, path, str(SIZE))
    with qcow2.open(path, writable=True) as disk:
        for number in range(nsnapshots + 1):
            disk.write(number * 70000, draw.randbytes(100000))
            if number < nsnapshots:
                disk.create_snapshot(f"s{number}")
        return disk.read(0, SIZE)


def shown(path: Path, snapshot: str | None = None) -> bytes:
    with qcow2.open(path, snapshot=snapshot) as disk:
        return disk.read(0, SIZE)


def test_a_number_of_snapshots_is_none_if_all_that_is_counted_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a"
    content = created(path, 0)
    poke(path, 60, ">I", 512)
    assert qcow2_tool("check", path).returncode == 1
    qcow2_tool_ok("check", "-r", "all", path)
    assert_clean(path)
    assert shown(path) == content


@pytest.mark.parametrize("offset", [0, 1 << 43, 512])
@pytest.mark.parametrize("nsnapshots", [1, 3])
def test_a_snapshot_table_is_found_where_it_is(tmp_path: Path, nsnapshots: int, offset: int) -> None:
    path = tmp_path / "a"
    content = created(path, nsnapshots)
    snapshots = [shown(path, f"s{number}") for number in range(nsnapshots)]
    before = read_header(path).fields["snapshots_offset"]
    poke(path, 64, ">Q", offset)
    assert qcow2_tool("check", path).returncode == 1
    qcow2_tool_ok("check", "-r", "all", path)
    assert read_header(path).fields["snapshots_offset"] == before
    assert_clean(path)
    assert shown(path) == content
    assert [shown(path, f"s{number}") for number in range(nsnapshots)] == snapshots


@pytest.mark.parametrize("count", [1, 4, 70000])
def test_snapshots_that_nobody_can_tell_are_not_given_up(tmp_path: Path, count: int) -> None:
    path = tmp_path / "a"
    created(path, 3)
    poke(path, 60, ">IQ", count, 1 << 43)
    before = path.read_bytes()
    assert qcow2_tool("check", "-r", "all", path).returncode == 1
    assert path.read_bytes() == before


@pytest.mark.parametrize("options", ["compat=1.1", "extended_l2=on"])
@pytest.mark.parametrize("has_snapshot", [False, True])
def test_a_place_of_zeros_that_lies_askew_is_let_go(tmp_path: Path, options: str, has_snapshot: bool) -> None:
    path = tmp_path / "a"
    content = created(path, 0, options)
    with qcow2.open(path, writable=True) as disk:
        disk.write(15 * 65536, b"x" * 65536)
        disk.write_zeroes(15 * 65536, 65536, unmap=True)
        if has_snapshot:
            disk.create_snapshot("s")
    image = path.read_bytes()
    (table,) = struct.unpack_from(">Q", image, struct.unpack_from(">Q", image, 40)[0])
    width = 16 if "extended" in options else 8
    at = (table & (1 << 56) - 512) + 15 * width
    poke(path, at, ">Q", struct.unpack_from(">Q", image, at)[0] + 512)
    assert qcow2_tool("check", path).returncode == 2
    qcow2_tool_ok("check", "-r", "all", path)
    qemu_img("check", path)
    assert shown(path) == content
