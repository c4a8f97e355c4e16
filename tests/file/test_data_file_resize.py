"""Disks in a file of their own that get longer and shorter, alone and while they are served, as with QEMU."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest

import qcow2
from tests.file.test_data_file import io, make, qemu, shown_to_qemu
from tests.frontend import FrontEnd
from tests.oracle import peers, qemu_img
from tests.program import Daemon, qcow2_tool_ok
from tests.served import serve

MIB = 1 << 20
SIZE = 4 * MIB  # of what `make` makes
ODD = 65536 * 21 + 4096 + 512
pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")
RAW = pytest.mark.parametrize("is_raw", [False, True], ids=["entries tell", "raw"])


def assert_disk(path: Path, model: bytes, *, is_raw: bool) -> None:
    qcow2_tool_ok("check", path)
    for peer in peers():
        qemu(peer, "check", path, cwd=path.parent)
        assert shown_to_qemu(path, peer) == model
    with qcow2.open(path) as disk:
        assert disk.read(0, disk.size) == model
    if is_raw:
        assert path.with_name("disk.raw").read_bytes() == model


@RAW
def test_it_gets_shorter_and_longer_in_turns_with_qemu(tmp_path: Path, is_raw: bool) -> None:
    path, draw = make(tmp_path, is_raw=is_raw), random.Random(5)
    data, model = path.with_name("disk.raw"), b""
    for size in (SIZE, ODD, 600 * MIB, ODD, 2 * MIB):
        is_shorter = size < len(model)
        qcow2_tool_ok("resize", *["--shrink"] * is_shorter, path, str(size))
        model = model[:size].ljust(size, b"\0")
        assert data.stat().st_size == size, "as with QEMU"
        if size < 16 * MIB:
            assert_disk(path, model, is_raw=is_raw)
        content = draw.randbytes(70000)
        with qcow2.open(path, writable=True) as disk:
            disk.write(size - len(content), content)
        model = model[: -len(content)] + content
    io(path, "write -P 9 1M 1M")
    model = model[:MIB] + b"\x09" * MIB
    qemu("qemu-img", "resize", "-f", "qcow2", path, str(SIZE), cwd=tmp_path)
    assert_disk(path, model.ljust(SIZE, b"\0"), is_raw=is_raw)


@RAW
def test_what_the_data_file_holds_past_the_end_does_not_show(tmp_path: Path, is_raw: bool) -> None:
    path = make(tmp_path, is_raw=is_raw)
    with path.with_name("disk.raw").open("ab") as data:
        data.write(b"x" * MIB)
    qcow2_tool_ok("resize", path, str(SIZE + MIB // 2))
    with qcow2.open(path, writable=True) as disk:
        assert disk.read(0, disk.size) == bytes(disk.size)
        disk.write(SIZE + 512, b"y" * 512)
        assert disk.read(SIZE, 2048) == bytes(512) + b"y" * 512 + bytes(1024)


@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
@RAW
def test_what_is_new_is_preallocated(tmp_path: Path, is_raw: bool, preallocation: str) -> None:
    path = make(tmp_path, is_raw=is_raw)
    io(path, "write -P 5 0 4M")
    qcow2_tool_ok("resize", f"--preallocation={preallocation}", path, str(2 * SIZE))
    assert_disk(path, b"\x05" * SIZE + bytes(SIZE), is_raw=is_raw)
    assert all(row["present"] for row in json.loads(qcow2_tool_ok("map", "--output=json", path)))
    used = os.stat(path.with_name("disk.raw")).st_blocks * 512
    assert (used >= 2 * SIZE) == (preallocation != "metadata")


def test_an_encrypted_one_shows_zeros_where_it_is_new(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"key")
    for is_raw in (False, True):
        path = tmp_path / f"disk{is_raw}.qcow2"
        secret = ["--object", f"secret,id=s,file={tmp_path}/key"]
        options = f"encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,data_file=disk{is_raw}.raw"
        qcow2_tool_ok("create", *secret, "-o", options + ",data_file_raw=on" * is_raw, path, str(MIB))
        with qcow2.open(path, key=b"key", writable=True) as disk:
            disk.write(0, b"a" * MIB)
            disk.resize(MIB // 2 + 512, shrink=True)
            disk.resize(2 * MIB, preallocation="metadata")
            assert disk.read(0, 2 * MIB) == b"a" * (MIB // 2 + 512) + bytes(3 * MIB // 2 - 512)


@pytest.mark.parametrize("extended", ["off", "on"])
@pytest.mark.parametrize("how", ["library", "daemon", "full"])
def test_an_encrypted_one_that_we_wrote_grows_in_qemu(tmp_path: Path, extended: str, how: str) -> None:
    """QEMU takes what lies past the disk's end in its last cluster for zeros, encrypted ones."""
    path, key, size = tmp_path / "disk.qcow2", tmp_path / "key", 65536 * 5 + 4096
    key.write_bytes(b"key")
    secret = ["--object", f"secret,id=s,file={key}"]
    options = f"encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,data_file={tmp_path / 'disk.raw'}"
    qcow2_tool_ok("create", *secret, "-o", f"{options},extended_l2={extended}", path, str(size // 2))
    with qcow2.open(path, key=b"key", writable=True) as disk:
        disk.resize(size, preallocation="full" if how == "full" else "off")
        if how == "library":
            disk.write(size - 1024, b"a" * 1024)
    if how == "daemon":
        with Daemon(path, f"--key-file={key}") as daemon:
            with FrontEnd(daemon.socket_path) as guest:
                guest.write(size - 1024, b"a" * 1024)
            daemon.stop()
    image = f"driver=qcow2,file.filename={path},encrypt.key-secret=s"
    for peer in peers():
        size += 65536
        qemu_img("resize", "-q", *secret, "--image-opts", image, str(size), program=peer)
        qemu_img("convert", *secret, "--image-opts", image, "-O", "raw", tmp_path / "plain", program=peer)
        plain = (tmp_path / "plain").read_bytes()
        assert plain.replace(b"a", b"") == bytes(size - (1024 if how != "full" else 0))


@RAW
def test_it_grows_while_it_is_served(tmp_path: Path, is_raw: bool) -> None:
    path = make(tmp_path, is_raw=is_raw)
    with serve(path) as served, FrontEnd(served.socket_path) as guest:
        guest.write(0, b"a" * 65536)
        served.device.resize(2 * SIZE)
        guest.write(2 * SIZE - 65536, b"b" * 65536)
        guest.write(SIZE, b"c" * 512)
        guest.flush()
    assert_disk(
        path, (b"a" * 65536).ljust(SIZE, b"\0") + (b"c" * 512).ljust(SIZE - 65536, b"\0") + b"b" * 65536, is_raw=is_raw
    )
