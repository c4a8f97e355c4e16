"""Images whose data is in a file of its own: read, written, checked, made, as QEMU does, and safer."""

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

import qcow2
from tests.frontend import FrontEnd
from tests.oracle import peers
from tests.program import DAEMON, Daemon, qcow2_tool, qcow2_tool_ok, run

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
    qcow2_tool_ok("info", path)  # does not need it
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


def test_content_is_kept_or_not_in_the_words_of_qemu_11(tmp_path: Path) -> None:
    data, path = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    data.write_bytes(b"k" * MIB)
    options = "data_file=disk.raw,data_file_raw=on"
    assert "keep_data_file=on" in qcow2_tool_ok("create", "-o", f"{options},keep_data_file=on", path, "1M")
    assert shown_to_qemu(path) == b"k" * MIB == data.read_bytes()
    qcow2_tool_ok("create", "-o", f"{options},keep_data_file=off", path, "1M")
    assert data.read_bytes() == bytes(MIB)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("keep_data_file=on", "Must not use 'keep_data_file=on' without 'data_file'"),
        ("data_file=b,keep_data_file=on", "needs data_file_raw=on"),
        ("data_file=b,keep_data_file=off,data_file_use=keep", "contradicts data_file_use=keep"),
        ("data_file=nosuch,data_file_raw=on,keep_data_file=on", "No such file or directory"),
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


@pytest.mark.parametrize("command", ["create", "convert"])
@pytest.mark.parametrize("use", ["empty", "keep"])
def test_content_stays_if_the_header_has_no_room_for_its_name(tmp_path: Path, command: str, use: str) -> None:
    path, data, source = (tmp_path / name for name in ("disk", "x" * 200 + "/" + "x" * 200, "source"))
    data.parent.mkdir()
    data.write_bytes(b"precious")
    qcow2.create(source, MIB)
    options = f"cluster_size=512,data_file={data.relative_to(tmp_path)},data_file_raw=on,data_file_use={use}"
    words = ["-f", "qcow2", path, "1M"] if command == "create" else ["-O", "qcow2", source, path]
    done = qcow2_tool(command, "-o", options, *words)
    assert (done.returncode, done.stdout, "limit 512" in done.stderr) == (1, "", True)
    assert data.read_bytes() == b"precious"
    assert not path.exists()


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
    with qcow2.open(path, writable=True) as disk, pytest.raises(qcow2.UnsupportedImage, match="external data file"):
        disk.create_snapshot("s")


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
    done = run(DAEMON, f"--blk-file={path}", f"--socket-path={path}.sock", *options)
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


def combined(directory: Path, *extra: str, is_raw: bool) -> Path:
    path = directory / "disk.qcow2"
    options = ["data_file=disk.raw", *["data_file_raw=on"] * is_raw, *extra]
    (directory / "key").write_bytes(b"key")
    secret = ["--object", f"secret,id=s,file={directory}/key"]
    qcow2_tool_ok("create", *secret, "-o", ",".join(options), path, str(SIZE))
    return path


LUKS = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"


def test_what_is_in_a_raw_file_shows_through_subclusters(tmp_path: Path) -> None:
    """QEMU's own images of this sort show zeros, until something is written around."""
    (tmp_path / "disk.raw").write_bytes(b"k" * SIZE)
    path = combined(tmp_path, "data_file_use=keep", "extended_l2=on", is_raw=True)
    model = bytearray(b"k" * SIZE)
    with qcow2.open(path, writable=True) as disk:
        disk.write(65536 + 512, b"x" * 1024)
        disk.write_zeroes(2 * 65536, 4096)
        disk.discard(3 * 65536, 65536)
        model[65536 + 512 : 65536 + 1536] = b"x" * 1024
        model[2 * 65536 : 2 * 65536 + 4096] = bytes(4096)
        model[3 * 65536 : 4 * 65536] = bytes(65536)
    assert_sound(path, model, is_raw=True)


def test_subclusters_that_qemu_left_without_data_are_zeros_in_the_raw_file(tmp_path: Path) -> None:
    """Its entries of such an image say nothing: zeros show, whatever the file holds."""
    path = tmp_path / "disk.qcow2"
    options = "data_file=disk.raw,data_file_raw=on,extended_l2=on"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, str(SIZE), cwd=tmp_path)
    with (tmp_path / "disk.raw").open("r+b") as data:
        data.write(b"k" * 65536)
    with qcow2.open(path, writable=True) as disk:
        assert disk.read(0, 65536) == bytes(65536)
        disk.write(512, b"x" * 512)
        assert disk.read(0, 65536) == bytes(512) + b"x" * 512 + bytes(65536 - 1024)
    data_bytes = (tmp_path / "disk.raw").read_bytes()
    assert data_bytes[:2048] == bytes(512) + b"x" * 512 + bytes(1024)
    assert shown_to_qemu(path)[:2048] == data_bytes[:2048]


def test_a_part_of_the_first_cluster_is_found_and_let_go(tmp_path: Path) -> None:
    """Its place is at 0, as if there were none."""
    path = combined(tmp_path, "extended_l2=on", is_raw=False)
    with qcow2.open(path, writable=True) as disk:
        disk.write(4096, b"x" * 2048)
        disk.flush()
        disk.write_zeroes(0, 65536, unmap=False)
        disk.write(8192, b"y" * 2048)
    model = bytes(8192) + b"y" * 2048 + bytes(SIZE - 10240)
    assert_sound(path, model, is_raw=False)
    with qcow2.open(path, writable=True) as disk:
        disk.discard(8192, 2048)
    assert_sound(path, bytes(SIZE), is_raw=False)


@pytest.mark.parametrize("extra", [(), ("extended_l2=on",)], ids=["clusters", "subclusters"])
@RAW
def test_an_encrypted_data_file_is_ciphertext_throughout(tmp_path: Path, is_raw: bool, extra: tuple[str, ...]) -> None:
    path, draw = combined(tmp_path, LUKS, *extra, is_raw=is_raw), random.Random(3)
    pattern = b"plaintext" * (SIZE // 9 + 1)
    with qcow2.open(path, key=b"key", writable=True) as disk:
        model = bytearray(disk.read(0, SIZE))
        assert any(model) == is_raw, "in a raw one holes are noise"
        for _ in range(40):
            offset = draw.randrange(SIZE // 512) * 512
            nbytes = min(draw.choice([512, 4096, 65536, 300 * 512]), SIZE - offset)
            model[offset : offset + nbytes] = pattern[:nbytes] if draw.random() < 0.7 else bytes(nbytes)
            if model[offset]:
                disk.write(offset, pattern[:nbytes])
            else:
                disk.write_zeroes(offset, nbytes, unmap=draw.random() < 0.5)
            disk.discard(draw.randrange(60) * 65536, 0 if not is_raw else 65536)
        assert disk.read(0, SIZE) == model
    assert b"plaintext" not in path.with_name("disk.raw").read_bytes()
    secret = ["--object", f"secret,id=s,file={tmp_path}/key", "--image-opts"]
    opts = f"driver=qcow2,file.filename={path},encrypt.key-secret=s,data-file.filename={tmp_path}/disk.raw"
    for peer in peers():
        qemu(peer, "check", *secret, f"{opts},data-file.driver=file")
        qemu(peer, "convert", *secret, f"{opts},data-file.driver=file", "-O", "raw", tmp_path / "plain")
        assert (tmp_path / "plain").read_bytes() == model


@pytest.mark.parametrize("is_raw", [False, True])
@pytest.mark.parametrize("is_served", [False, True])
def test_what_an_encrypted_image_sets_aside_is_not_in_its_data_file(
    tmp_path: Path, is_served: bool, is_raw: bool
) -> None:
    """Clusters of the image file, for tables and bits of bitmaps: the disk has data at the same offsets."""
    path, full, step = tmp_path / "disk.qcow2", 8 * MIB, 512 * MIB
    key = tmp_path / "key"
    key.write_bytes(b"k")
    options = {"data_file_raw": True} if is_raw else {}
    qcow2.create(path, 16 * step, data_file="disk.raw", key=b"k", iter_time=10, **options)  # type: ignore[arg-type]
    data = random.Random(4).randbytes(full)
    with qcow2.open(path, writable=True, key=b"k") as disk:
        disk.write(0, data)
        disk.bitmaps.add("changes")
    places = range(step, 16 * step, step)
    if is_served:
        with Daemon(path, f"--key-file={key}") as daemon, FrontEnd(daemon.socket_path) as guest:
            for place in places:
                guest.write(place, b"w" * 512)
            daemon.stop()
    else:
        with qcow2.open(path, writable=True, key=b"k") as disk:
            for place in places:
                disk.write(place, b"w" * 512)
    with qcow2.open(path, key=b"k") as disk:
        assert disk.read(0, full) == data
        assert all(disk.read(place, 512) == b"w" * 512 for place in places)


def test_content_that_exists_is_not_kept_as_ciphertext(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(b"k" * SIZE)
    (tmp_path / "key").write_bytes(b"key")
    words = ["--object", f"secret,id=s,file={tmp_path}/key", "-o"]
    options = f"data_file=disk.raw,data_file_raw=on,data_file_use=keep,{LUKS}"
    done = qcow2_tool("create", *words, options, tmp_path / "disk.qcow2", str(SIZE))
    assert (done.returncode, "not encrypted with the key" in done.stderr) == (1, True)


@RAW
@pytest.mark.parametrize("extra", ["", ",extended_l2=on"])
def test_what_a_data_file_has_lost_is_told(tmp_path: Path, is_raw: bool, extra: str) -> None:
    path = make(tmp_path, is_raw=is_raw, name=f"disk.raw{extra}")
    io(path, "write -P 5 0 3M", "write -z 1M 128k", "write -P 6 3100k 4k")
    qcow2_tool_ok("check", path)
    data_file = tmp_path / "disk.raw"
    os.truncate(data_file, MIB - 512)  # inside a cluster that begins before
    lost = [
        f"ERROR data cluster at {at:#x} lies past the end of the data file at 0xffe00"
        for at in range(MIB + (128 << 10), SIZE if is_raw else 3 * MIB + 65536, 65536)
    ]
    if is_raw:
        lost.insert(0, "ERROR the disk ends at 0x400000, its raw data file at 0xffe00")
    for words in ([], ["-U"], ["-r", "leaks"], ["-r", "all"]):
        done = qcow2_tool("check", *words, path)
        assert (done.returncode, done.stderr.splitlines()) == (2, lost)
        assert f"{len(lost)} errors were found on the image." in done.stdout
    os.truncate(data_file, SIZE)
    qcow2_tool_ok("check", path)


@pytest.mark.parametrize("words", [[], ["-U"], ["-r", "leaks"], ["-r", "all"]], ids=" ".join)
def test_image_whose_data_file_is_gone_is_not_called_sound(tmp_path: Path, words: list[str]) -> None:
    path = make(tmp_path, is_raw=False)
    (tmp_path / "disk.raw").unlink()
    done = qcow2_tool("check", *words, path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"qcow2: {tmp_path / 'disk.raw'}: No such file or directory\n"


def test_places_that_are_known_are_repaired(tmp_path: Path) -> None:
    """Of a raw file any is; of another one an entry that lost its flag."""
    for is_raw, broken in ((True, 7 << 20 | 2), (True, 0xFFFF << 40), (False, 65536)):
        path = make(tmp_path, is_raw=is_raw)
        with qcow2.open(path, writable=True) as disk:
            disk.write(0, b"a" * SIZE)
        image = bytearray(path.read_bytes())
        table = int.from_bytes(image[40:48], "big")
        entries = int.from_bytes(image[table : table + 8], "big") & (1 << 56) - 1
        image[entries + 8 : entries + 16] = broken.to_bytes(8, "big")
        path.write_bytes(image)
        assert qcow2_tool("check", path).returncode == 2
        assert qcow2_tool("check", "-r", "all", path).returncode == 0
        assert_sound(path, b"a" * SIZE, is_raw=is_raw)
        path.unlink()
        path.with_name("disk.raw").unlink()
