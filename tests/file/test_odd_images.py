"""Images that are odd and sound: QEMU reads them, and so do we."""

import os
import struct
import time
from pathlib import Path

import pytest
import zstandard

import qcow2
from tests.oracle import assert_clean, qemu_check, qemu_img, qemu_io
from tests.program import qcow2_tool_ok

CLUSTER = 65536
OFFSET_MASK = 0x00FFFFFFFFFFFE00


def test_empty_end_of_the_l1_table_may_be_cut_off(tmp_path: Path) -> None:
    """Sparse copies cut zeros off the end of a file. What is written then lands past the table."""
    path = tmp_path / "disk"
    qemu_img("create", "-q", "-f", "qcow2", path, "64M")
    with path.open("rb") as file:
        (l1,) = struct.unpack_from(">Q", file.read(48), 40)
    os.truncate(path, l1)
    assert qemu_check(path)[0] == 0
    assert "No errors" in qcow2_tool_ok("check", path)
    with qcow2.open(path) as disk:
        assert disk.read(0, 512) == bytes(512)
    assert path.stat().st_size == l1
    with qcow2.open(path, writable=True) as disk:
        disk.write(0, b"1" * CLUSTER)
        disk.write(disk.size - CLUSTER, b"2" * CLUSTER)
    assert_clean(path)
    with qcow2.open(path) as disk:
        assert disk.read(0, CLUSTER) + disk.read(disk.size - CLUSTER, CLUSTER) == b"1" * CLUSTER + b"2" * CLUSTER


@pytest.mark.parametrize("window_log", [23, 24, 25, 27])
def test_zstd_frame_may_name_a_large_window(tmp_path: Path, window_log: int) -> None:
    """Streamed at level 20 and more, or --long. The cluster bounds what is touched of it."""
    data = bytes((at * 7 + at // 256) & 255 for at in range(CLUSTER))
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=window_log, write_content_size=False)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    frame = packer.compress(data[:1000]) + packer.compress(data[1000:]) + packer.flush()
    path = tmp_path / "disk"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "compression_type=zstd", path, str(8 * CLUSTER))
    qemu_io(path, f"write 0 {CLUSTER}")
    with path.open("r+b") as file:
        (l1,) = struct.unpack_from(">Q", file.read(48), 40)
        file.seek(l1)
        l2 = int.from_bytes(file.read(8), "big") & OFFSET_MASK
        file.seek(l2)
        host_offset = int.from_bytes(file.read(8), "big") & OFFSET_MASK
        file.seek(host_offset)
        file.write(frame)
        file.seek(l2)
        file.write((1 << 62 | (-(-len(frame) // 512) - 1) << 54 | host_offset).to_bytes(8, "big"))
    with qcow2.open(path) as disk:
        assert disk.read(0, CLUSTER) == data


def test_what_has_no_table_is_one_stretch(tmp_path: Path) -> None:
    """An L2 table of 512-byte clusters maps 32 KiB; an empty disk has none, and is told of at once."""
    path = tmp_path / "disk"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "4G")
    with qcow2.open(path, writable=True) as disk:
        disk.write(1 << 30, b"x")
        steps = 0
        driver_run = disk._driver.run

        def count(coroutine: "object") -> object:
            nonlocal steps
            steps += 1
            return driver_run(coroutine)  # type: ignore[arg-type]

        disk._driver.run = count  # type: ignore[method-assign, assignment]
        extents = list(disk.extents(0, disk.size))
    assert [(extent.guest_offset, extent.is_data) for extent in extents] == [
        (0, False),
        (1 << 30, True),
        ((1 << 30) + 512, False),
    ]
    assert steps < 10


def test_a_hole_at_the_end_of_the_file_may_be_of_any_length(tmp_path: Path) -> None:
    """No refcount block counts it, and none of 2^27 that could is asked for."""
    path = tmp_path / "disk"
    qcow2_tool_ok("create", "-o", "cluster_size=512", path, "1M")
    os.truncate(path, (1 << 44) - (1 << 20))  # all that ext4 has
    began = time.process_time()
    with qcow2.open(path, writable=True) as disk:
        disk.write(0, b"1" * 4096)
    assert time.process_time() - began < 6
    with qcow2.open(path) as disk:
        assert disk.read(0, 4096) == b"1" * 4096
