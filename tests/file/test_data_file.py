"""Images whose data is in a file of its own: read, written, checked, made, as QEMU does, and safer."""

import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest

import qcow2
from tests.frontend import FrontEnd
from tests.oracle import peers
from tests.program import DAEMON, TIMEOUT, Daemon, qcow2_tool, qcow2_tool_ok

MIB = 1 << 20
SIZE = 4 * MIB
pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")
RAW = pytest.mark.parametrize("is_raw", [False, True], ids=["entries tell", "raw"])


def qemu(*arguments: str | Path, cwd: Path | None = None) -> str:
    return subprocess.run([*map(str, arguments)], check=True, capture_output=True, text=True, cwd=cwd).stdout


def make(directory: Path, *, is_raw: bool, name: str = "disk.raw") -> Path:
    path = directory / "disk.qcow2"
    options = f"data_file={name}" + (",data_file_raw=on" if is_raw else "")
    qcow2_tool_ok("create", "-o", options, path, str(SIZE))
    return path


def io(path: Path, *commands: str) -> None:
    qemu("qemu-io", "-f", "qcow2", *(word for command in commands for word in ("-c", command)), path, cwd=path.parent)


def shown_to_qemu(path: Path, peer: str = "qemu-img") -> bytes:
    copy = path.with_suffix(".copy")
    qemu(peer, "convert", "-O", "raw", path, copy, cwd=path.parent)
    return copy.read_bytes()


def assert_sound(path: Path, model: bytes, *, is_raw: bool) -> None:
    """All judges say so, and see the model; a raw data file is the model itself."""
    qcow2_tool_ok("check", path)
    for peer in peers():
        qemu(peer, "check", path, cwd=path.parent)
        assert shown_to_qemu(path, peer) == model
    with qcow2.open(path) as disk:
        assert disk.read(0, SIZE) == model
    if is_raw:
        assert path.with_name("disk.raw").read_bytes() == model


def change(disk: qcow2.Disk, model: bytearray, draw: random.Random) -> None:
    offset = draw.randrange(SIZE // 512) * 512
    nbytes = min(draw.choice([512, 4096, 65536, 200 * 512, MIB]), SIZE - offset)
    match draw.randrange(5):
        case 0 | 1:
            data = draw.randbytes(nbytes)
            disk.write(offset, data)
            model[offset : offset + nbytes] = data
        case 2 | 3:
            disk.write_zeroes(offset, nbytes, unmap=draw.random() < 0.5)
            model[offset : offset + nbytes] = bytes(nbytes)
        case _:
            before = bytes(model[offset : offset + nbytes])
            disk.discard(offset, nbytes)
            model[offset : offset + nbytes] = after = disk.read(offset, nbytes)
            assert all(new in (0, old) for new, old in zip(after, before, strict=True))
            disk.flush()


@RAW
def test_random_changes_of_ours_and_of_qemu_take_turns(tmp_path: Path, is_raw: bool) -> None:
    path, draw = make(tmp_path, is_raw=is_raw), random.Random(7)
    model = bytearray(SIZE)
    for _ in range(2):
        with qcow2.open(path, writable=True) as disk:
            for _ in range(40):
                change(disk, model, draw)
        assert_sound(path, model, is_raw=is_raw)
        io(path, "write -P 7 100k 70k", "write -z 1M 128k", "write -z -u 2M 128k", "discard 3M 64k", "write -P 9 0 512")
        model[:] = shown_to_qemu(path)
        assert_sound(path, model, is_raw=is_raw)


def test_a_write_over_a_discarded_cluster_shows_nothing_that_was_there(tmp_path: Path) -> None:
    path = make(tmp_path, is_raw=False)
    io(path, "write -P 1 0 128k", "write -z 0 64k")  # QEMU leaves the old bytes in the data file
    assert path.with_name("disk.raw").read_bytes()[:4] == b"\1" * 4
    with qcow2.open(path, writable=True) as disk:
        disk.write(512, b"x" * 512)
    assert_sound(
        path, bytes(512) + b"x" * 512 + bytes(65536 - 1024) + b"\1" * 65536 + bytes(SIZE - 131072), is_raw=False
    )


def test_what_a_backing_file_shows_is_completed(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"b" * SIZE)
    path = tmp_path / "disk.qcow2"
    qcow2_tool_ok("create", "-o", "data_file=disk.raw", "-b", "base.raw", "-F", "raw", path)
    with qcow2.open(path, writable=True) as disk:
        disk.write(65536 + 512, b"x" * 512)
        disk.discard(0, 65536)
    model = bytes(65536) + b"b" * 512 + b"x" * 512 + b"b" * (SIZE - 65536 - 1024)
    assert_sound(path, model, is_raw=False)


@RAW
def test_info_and_map_say_what_qemu_says(tmp_path: Path, is_raw: bool) -> None:
    path = make(tmp_path, is_raw=is_raw)
    io(path, "write -P 1 64k 200k", "write -z -u 128k 64k")
    ours, theirs = (
        json.loads(text)["format-specific"]["data"]
        for text in (
            qcow2_tool_ok("info", "--output=json", path),
            qemu("qemu-img", "info", "--output=json", path),
        )
    )
    assert (ours["data-file"], ours["data-file-raw"]) == (theirs["data-file"], theirs["data-file-raw"])
    assert qemu("qemu-img", "map", "-f", "qcow2", path, cwd=tmp_path).split("\n")[1:] == [
        line.replace(f"{tmp_path}/", "") for line in qcow2_tool_ok("map", path).split("\n")[1:]
    ]
    path.with_name("disk.raw").unlink()
    qcow2_tool_ok("info", path)
    qcow2_tool_ok("check", path)  # neither needs it
    assert "disk.raw: No such file" in qcow2_tool("map", path).stderr


def test_an_entry_that_leads_elsewhere_is_corrupt(tmp_path: Path) -> None:
    path = make(tmp_path, is_raw=True)
    image = bytearray(path.read_bytes())
    table = int.from_bytes(image[40:48], "big")  # the L1 table
    entries = int.from_bytes(image[table : table + 8], "big") & (1 << 56) - 1
    image[entries + 8 : entries + 16] = (2 << 16 | 1 << 63).to_bytes(8, "big")
    path.write_bytes(image)
    done = qcow2_tool("check", path)
    assert (done.returncode, "not its own place in the data file" in done.stdout + done.stderr) == (2, True)
    with qcow2.open(path) as disk, pytest.raises(qcow2.CorruptImage, match="is invalid"):
        disk.read(65536, 512)


def test_a_check_counts_only_the_image(tmp_path: Path) -> None:
    path = make(tmp_path, is_raw=True)
    facts = json.loads(qcow2_tool_ok("check", "--output=json", path))
    theirs = json.loads(qemu("qemu-img", "check", "--output=json", path, cwd=tmp_path))
    for key in ("image-end-offset", "total-clusters", "allocated-clusters"):
        assert facts[key] == theirs[key]


def test_content_that_exists_is_never_lost_unasked(tmp_path: Path) -> None:
    data, path = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    data.write_bytes(b"k" * MIB)
    options = "data_file=disk.raw,data_file_raw=on"
    done = qcow2_tool("create", "-o", options, path, "1M")
    assert (done.returncode, "exists: say data_file_use=keep" in done.stderr) == (1, True)
    assert not path.exists()
    assert "needs data_file_raw=on" in qcow2_tool("create", "-o", "data_file=disk.raw,data_file_use=keep", path).stderr
    qcow2_tool_ok("create", "-o", f"{options},data_file_use=keep", path)
    with qcow2.open(path) as disk:
        assert disk.read(0, disk.size) == b"k" * MIB
    assert shown_to_qemu(path) == b"k" * MIB
    qcow2_tool_ok("create", "-o", f"{options},data_file_use=empty", path, "2M")
    assert data.read_bytes() == bytes(2 * MIB)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("data_file_raw=on", "data-file-raw requires data-file"),
        ("data_file=d,compat=0.10", "External data files are only supported with compatibility level 1.1"),
        ("data_file=d,data_file_raw=on,backing_file=b,backing_fmt=raw", "cannot be used at the same time"),
        ("data_file=disk.qcow2,data_file_use=empty", "cannot be its own data file"),
    ],
)
def test_what_contradicts_itself_is_not_made(tmp_path: Path, options: str, text: str) -> None:
    (tmp_path / "b").write_bytes(bytes(MIB))
    (tmp_path / "disk.qcow2").write_bytes(b"precious")
    assert text in qcow2_tool("create", "-o", options, tmp_path / "disk.qcow2", "1M").stderr
    assert (tmp_path / "disk.qcow2").read_bytes() == b"precious"


def test_convert_makes_one_and_fills_one(tmp_path: Path) -> None:
    source = tmp_path / "source.raw"
    source.write_bytes(random.Random(1).randbytes(MIB) + bytes(SIZE - MIB))
    path = tmp_path / "disk.qcow2"
    qcow2_tool_ok("convert", "-f", "raw", "-O", "qcow2", "-o", "data_file=disk.raw,data_file_raw=on", source, path)
    assert_sound(path, source.read_bytes(), is_raw=True)
    source.write_bytes(b"n" * SIZE)
    qcow2_tool_ok("convert", "-n", "-f", "raw", "-O", "qcow2", source, path)
    assert_sound(path, source.read_bytes(), is_raw=True)


def test_what_is_not_supported_is_refused_by_name(tmp_path: Path) -> None:
    path = make(tmp_path, is_raw=False)
    with qcow2.open(path, writable=True) as disk:
        for attempt in (lambda: disk.resize(2 * SIZE), lambda: disk.create_snapshot("s")):
            with pytest.raises(qcow2.UnsupportedImage, match="external data file"):
                attempt()


def test_a_raw_one_gets_no_backing_file(tmp_path: Path) -> None:
    path = make(tmp_path, is_raw=True)
    (tmp_path / "base.raw").write_bytes(b"b" * SIZE)
    before = path.read_bytes()
    for options in ((), ("-u",)):
        assert qcow2_tool("rebase", *options, "-b", "base.raw", "-F", "raw", path).returncode == 1
    assert path.read_bytes()[:512] == before[:512]


def test_commit_empties_an_overlay_that_has_one(tmp_path: Path) -> None:
    base, path = tmp_path / "base.raw", tmp_path / "disk.qcow2"
    base.write_bytes(b"b" * SIZE)
    qcow2_tool_ok("create", "-o", "data_file=disk.raw", "-b", "base.raw", "-F", "raw", path)
    with qcow2.open(path, writable=True) as disk:
        disk.write(65536, b"x" * 512)
    qcow2_tool_ok("commit", path)
    model = b"b" * 65536 + b"x" * 512 + b"b" * (SIZE - 65536 - 512)
    assert base.read_bytes() == model
    assert_sound(path, model, is_raw=False)


def test_two_images_do_not_share_a_data_file(tmp_path: Path) -> None:
    path = make(tmp_path, is_raw=True)
    other = tmp_path / "other.qcow2"
    shutil.copy(path, other)
    with qcow2.open(path, writable=True), pytest.raises(OSError, match=r"disk\.raw"):
        qcow2.open(other, writable=True)


@pytest.mark.sample(3)
@RAW
@pytest.mark.parametrize("options", [("--sandbox",), ("--cache=writethrough",), ("--cache=none", "--aio=threads")])
def test_a_daemon_serves_it(tmp_path: Path, is_raw: bool, options: tuple[str, ...]) -> None:
    path = make(tmp_path, is_raw=is_raw)
    with Daemon(path, *options) as daemon, FrontEnd(daemon.socket_path) as front_end:
        front_end.write(4096, b"a" * 4096)
        front_end.write(4096, b"b" * 512)  # in place now
        front_end.write(3 * 65536, b"c" * 65536)
        front_end.flush()
        front_end.discard(3 * 65536, 65536)
        front_end.flush()
        assert front_end.read(0, 8192) == bytes(4096) + b"b" * 512 + b"a" * 3584
        assert front_end.read(3 * 65536, 65536) == bytes(65536)
        daemon.kill()
    qcow2_tool_ok("check", "-q", "-r", "leaks", path)
    assert_sound(path, bytes(4096) + b"b" * 512 + b"a" * 3584 + bytes(SIZE - 8192), is_raw=is_raw)


def refusal(path: Path, *options: str) -> str:
    command = [DAEMON, f"--blk-file={path}", f"--socket-path={path}.sock", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    return done.stderr


def test_a_daemon_writes_to_no_file_that_only_the_image_names(tmp_path: Path) -> None:
    own, elsewhere = tmp_path / "own", tmp_path / "elsewhere"
    own.mkdir()
    elsewhere.mkdir()
    path = make(own, is_raw=True, name=str(elsewhere / "disk.raw"))
    assert "is not allowed" in refusal(path)
    for option in (f"--data-file={elsewhere / 'disk.raw'}", f"--allow-files={elsewhere}"):
        with Daemon(path, "--sandbox", option) as daemon, FrontEnd(daemon.socket_path) as front_end:
            front_end.write(0, b"w" * 512)
            front_end.flush()
    assert (elsewhere / "disk.raw").read_bytes()[:512] == b"w" * 512
