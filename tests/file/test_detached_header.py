"""LUKS headers in a file of their own: made, named in every way there is, read and written by QEMU and by us."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import qcow2
from tests.frontend import FrontEnd
from tests.oracle import peers
from tests.program import DAEMON, Daemon, qcow2_tool, qcow2_tool_ok

KEY = b"correct horse\n"
SIZE = 2 << 20


@pytest.fixture
def secret(tmp_path: Path) -> list[str]:
    (tmp_path / "key").write_bytes(KEY)
    return ["--object", f"secret,id=s0,file={tmp_path}/key"]


@pytest.fixture
def header(tmp_path: Path, secret: list[str]) -> Path:
    """A header of ours beside a disk of nothing but noise."""
    path = tmp_path / "header"
    qcow2_tool_ok("create", "-q", *secret, "-f", "luks", "-o", OPTIONS, path)
    (tmp_path / "disk").write_bytes(os.urandom(SIZE))
    return path


OPTIONS = "key-secret=s0,iter-time=10,detached-header=on"


def named(header: Path) -> str:
    files = f"file.filename={header.with_name('disk')},header.driver=file,header.filename={header}"
    return f"driver=luks,{files},key-secret=s0"


def knowing_peer() -> str:
    """A QEMU that knows such headers, as it does since 9.0."""
    for peer in peers():
        said = subprocess.run([peer, "create", "-f", "luks", "-o", "help"], capture_output=True, text=True).stdout
        if "detached-header" in said:
            return peer
    pytest.skip("no QEMU here knows detached headers: QEMU_BIN names one of 9.0 or later")


def open_disk(header: Path, *, writable: bool = False) -> qcow2.Disk:
    disk = header.with_name("disk")
    return qcow2.open(disk, format="luks", luks_header=str(header), key=KEY, writable=writable)


def filled(header: Path) -> bytes:
    """What the disk holds from now on."""
    content = bytes(range(256)) * (SIZE // 256)
    with open_disk(header, writable=True) as disk:
        assert disk.size == SIZE
        disk.write(0, content)
        disk.write_zeroes(4096, 1000)
    return content[:4096] + bytes(1000) + content[5096:]


def test_a_header_of_ours_opens_a_disk_that_begins_at_its_files_start(header: Path) -> None:
    content = filled(header)
    with open_disk(header) as disk:
        assert disk.read(0, SIZE) == content
        facts = disk.info["format-specific"]["data"]
    assert (facts["detached-header"], facts["payload-offset"]) == (True, 0)
    assert content[:64] not in header.with_name("disk").read_bytes()


def test_qemu_and_we_read_what_the_other_wrote(tmp_path: Path, header: Path, secret: list[str]) -> None:
    peer = knowing_peer()
    content, plain = filled(header), tmp_path / "plain"
    subprocess.run([peer, "convert", *secret, "--image-opts", named(header), "-O", "raw", plain], check=True)
    assert plain.read_bytes() == content
    theirs = tmp_path / "theirs"
    subprocess.run([peer, "create", "-q", *secret, "-f", "luks", "-o", OPTIONS, theirs], check=True)
    words = [*secret, "-n", "-f", "raw", plain, "--target-image-opts", named(theirs)]
    subprocess.run([peer, "convert", *words], check=True)
    with open_disk(theirs) as disk:
        assert disk.read(0, SIZE) == content


def test_the_tool_takes_it_wherever_images_are_named(tmp_path: Path, header: Path, secret: list[str]) -> None:
    content, plain = filled(header), tmp_path / "plain"
    qcow2_tool_ok("convert", *secret, "--image-opts", named(header), "-O", "raw", plain)
    assert plain.read_bytes() == content
    plain.write_bytes(content[::-1])
    qcow2_tool_ok("convert", *secret, "-n", "-f", "raw", plain, "--target-image-opts", named(header))
    plain_name = f"driver=raw,file.filename={plain}"
    qcow2_tool_ok("compare", *secret, "--image-opts", named(header), plain_name)
    facts = json.loads(qcow2_tool_ok("info", "--output=json", *secret, "--image-opts", named(header)))
    assert (facts["format"], facts["virtual-size"]) == ("luks", SIZE)
    qcow2_tool_ok("map", "--output=json", "--image-opts", named(header))
    qcow2_tool_ok("resize", *secret, "--image-opts", named(header), "+1M")
    with open_disk(header) as disk:
        assert disk.read(0, disk.size) == content[::-1] + bytes(1 << 20)


def test_key_slots_of_a_detached_header_are_added(tmp_path: Path, header: Path, secret: list[str]) -> None:
    content, second = filled(header), tmp_path / "second"
    second.write_bytes(b"another")
    words = [*secret, "--object", f"secret,id=s1,file={second}", "--image-opts"]
    qcow2_tool_ok("amend", *words, "-o", "state=active,new-secret=s1,iter-time=10", named(header))
    with qcow2.open(header.with_name("disk"), format="luks", luks_header=str(header), key=b"another") as disk:
        assert disk.read(0, SIZE) == content


def test_a_header_alone_is_refused_by_name(header: Path, secret: list[str]) -> None:
    done = qcow2_tool("info", *secret, "-f", "luks", header)
    assert (done.returncode, "whose disk is in another file" in done.stderr) == (1, True)


def test_the_header_in_front_of_a_disk_opens_it_from_a_copy_too(tmp_path: Path, secret: list[str]) -> None:
    path, copy = tmp_path / "disk", tmp_path / "header"
    qcow2_tool_ok("create", "-q", *secret, "-f", "luks", "-o", "key-secret=s0,iter-time=10", path, str(SIZE))
    with qcow2.open(path, format="luks", key=KEY, writable=True) as disk:
        disk.write(0, b"here")
    copy.write_bytes(path.read_bytes()[:2068480])  # as `cryptsetup luksHeaderBackup` makes it
    with open_disk(copy) as disk:
        assert (disk.size, disk.read(0, 4)) == (SIZE, b"here")


@pytest.mark.skipif(shutil.which("cryptsetup") is None, reason="cryptsetup is not installed")
def test_cryptsetup_opens_it(tmp_path: Path, header: Path) -> None:
    words = ["--header", header, "--key-file", tmp_path / "key", "--test-passphrase", header.with_name("disk")]
    subprocess.run(["cryptsetup", "open", "--type", "luks1", *words], check=True)


@pytest.mark.parametrize("is_confined", [False, True])
def test_the_daemon_serves_it(tmp_path: Path, header: Path, is_confined: bool) -> None:
    content = bytearray(filled(header))
    options = ["--format=luks", f"--luks-header={header}", f"--key-file={tmp_path}/key"]
    with Daemon(header.with_name("disk"), *options, *["--sandbox"] * is_confined) as daemon:
        with FrontEnd(daemon.socket_path) as front_end:
            assert front_end.read(0, 4096) == content[:4096]
            front_end.write(8192, b"w" * 4096)
        daemon.stop()
    content[8192:12288] = b"w" * 4096
    with open_disk(header) as disk:
        assert disk.read(0, SIZE) == content


def test_the_daemon_refuses_a_header_for_what_has_none(tmp_path: Path) -> None:
    command = [DAEMON, "--socket-path=s", "--blk-file=a", f"--luks-header={tmp_path}/h"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, "a qcow2 image has no such file" in done.stderr) == (1, True)


def test_the_header_of_a_source_is_no_target(header: Path, secret: list[str]) -> None:
    before = header.read_bytes()
    done = qcow2_tool("convert", "-U", *secret, "--image-opts", named(header), "-O", "qcow2", header)
    assert done.returncode == 1
    assert done.stderr.endswith("the target is the source, or under it\n")
    assert header.read_bytes() == before
