"""Options of the tool that others of these files leave out: what each one does, and what it must not do."""

import json
import os
import random
import subprocess
from pathlib import Path

import pytest

import qcow2
from tests.oracle import assert_clean, assert_same_bytes, qemu_img, qemu_io, qemu_read
from tests.program import TIMEOUT, TOOL, qcow2_tool, qcow2_tool_ok

MIB = 1 << 20
SECRET = ("--object", "secret,id=s,data=abc")
ENCRYPTED = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    qemu_io(path, "write -P 1 0 512k")
    return path


@pytest.fixture
def top(base: Path) -> Path:
    """Over the base, with its own from 256 KiB on for 384 KiB."""
    path = base.with_name("top")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", path, "1M")
    qemu_io(path, "write -P 2 256k 384k", "write -z 128k 64k")
    return path


@pytest.fixture
def as_qemu_img(tmp_path: Path) -> Path:
    path = tmp_path / "qemu-img"
    path.symlink_to(TOOL)
    return path


def decrypted(path: Path) -> bytes:
    """The disk as QEMU reads it."""
    image = f"driver=qcow2,file.filename={path},encrypt.key-secret=s"
    raw = path.with_name("decrypted")
    qemu_img("convert", *SECRET, "--image-opts", image, "-O", "raw", raw)
    return raw.read_bytes()


def test_limits_are_told(base: Path) -> None:
    facts = json.loads(qcow2_tool_ok("info", "--limits", "--output=json", base))
    assert next(iter(facts)) == "limits"
    assert facts["limits"] == {
        "write-zeroes-alignment": 65536,
        "request-alignment": 1,
        "min-mem-alignment": 1,
        "discard-alignment": 65536,
        "opt-mem-alignment": os.sysconf("SC_PAGE_SIZE"),
        "max-iov": 1024,
    }
    assert "    discard alignment: 65536\n" in qcow2_tool_ok("info", "--limits", base)


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ("2", 4),  # the id before the name
        ("snapshot.name=2", 3),
        ("snapshot.id=2", 4),
        ("snapshot.id=3,snapshot.name=b", 5),
        ("snapshot.name=b", 4),  # the first
        ("snapshot.id=1,snapshot.name=b", None),
        ("snapshot.nosuch=1", None),
    ],
)
def test_snapshot_is_chosen_by_id_by_name_or_both(base: Path, wanted: str, pattern: int | None) -> None:
    for number, name in enumerate(("2", "b", "b"), 3):
        qemu_io(base, f"write -P {number} 0 64k")
        qemu_img("snapshot", "-c", name, base)
    target = base.with_name("raw")
    done = qcow2_tool("convert", "-l", wanted, "-O", "raw", base, target)
    assert (done.returncode == 0) is (pattern is not None)
    assert target.exists() is (pattern is not None)
    if pattern is not None:
        assert target.read_bytes()[:65536] == bytes([pattern]) * 65536


def test_of_several_snapshots_none_is_made(base: Path) -> None:
    done = qcow2_tool("snapshot", "-c", "a", "-c", "b", base)
    assert (done.returncode, "-c/--create: not allowed with argument -c/--create" in done.stderr) == (1, True)
    assert qcow2_tool_ok("snapshot", "-l", base) == ""


def test_snapshots_of_one_name_are_said(base: Path) -> None:
    assert qcow2_tool("snapshot", "-c", "a", base).stderr == ""
    assert "1 snapshots are named 'a' already" in qcow2_tool("snapshot", "-c", "a", base).stderr
    assert "of id 1" in qcow2_tool("snapshot", "-a", "a", base).stderr
    assert "of id 1" in qcow2_tool("snapshot", "-d", "a", base).stderr
    assert qcow2_tool("snapshot", "-d", "a", base).stderr == ""


def test_check_says_that_a_lazy_image_was_not_closed(base: Path) -> None:
    qemu_img("amend", "-o", "lazy_refcounts=on", base)
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write 0 64k", "-c", "write 1000k 4k", "-c", "abort", base],
        capture_output=True,
    )
    line = "not closed cleanly: the next writable open repairs this"
    assert line in qcow2_tool("check", base).stderr
    assert line not in qcow2_tool("check", "-r", "all", base).stderr
    assert qcow2_tool("check", base).stderr == ""


def test_findings_are_said_up_to_a_limit_and_counted_beyond(tmp_path: Path) -> None:
    path = tmp_path / "wrong"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata,cluster_size=4k", path, "60M")
    with path.open("r+b") as file:
        header = file.read(64)
        file.seek(int.from_bytes(header[48:56], "big"))
        blocks = [int.from_bytes(file.read(8), "big") for _ in range(8)]
        for block in filter(None, blocks):
            file.seek(block)
            counts = file.read(4096)
            file.seek(block)
            file.write(counts.replace(b"\0\1", b"\0\2"))
    expected = json.loads(qemu_img("check", "--output=json", path, check=False).stdout)
    done = qcow2_tool("check", "--output=json", path)
    facts = json.loads(done.stdout)
    assert {key: facts[key] for key in ("corruptions", "leaks")} == {
        key: expected[key] for key in ("corruptions", "leaks")
    }
    lines = done.stderr.splitlines()
    assert (len(lines), lines[-1]) == (
        10_001,
        f"... and {facts['corruptions'] + facts['leaks'] - 10_000} more findings",
    )
    fixed = qcow2_tool("check", "-r", "all", path)
    assert (fixed.returncode, fixed.stderr.splitlines()[-1]) == (0, lines[-1])
    assert_clean(path)


@pytest.mark.parametrize("options", [ENCRYPTED, "data_file=data"], ids=["encrypted", "data file"])
@pytest.mark.parametrize("below", ["base", "other"])
def test_new_image_of_any_kind_may_share_a_backing_file(
    top: Path, options: str, below: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(top.parent)  # where QEMU looks for a data file
    expected, target = qemu_read(top), top.with_name("new")
    qemu_img("create", "-q", "-f", "qcow2", top.with_name("other"), "2M")
    qemu_io(top.with_name("other"), "write -P 9 0 1M")
    qcow2_tool_ok("convert", *SECRET, "-B", below, "-F", "qcow2", "-O", "qcow2", "-o", options, top, target)
    assert_same_bytes(decrypted(target) if "encrypt" in options else qemu_read(target), expected)
    qcow2_tool_ok("check", target)
    if below == "base":
        extents = [each for each in json.loads(qcow2_tool_ok("map", "--output=json", target)) if each["depth"] == 0]
        assert sum(each["length"] for each in extents if each["data"]) == 384 << 10


@pytest.mark.parametrize(
    "options",
    [
        ("-O", "qcow2", "-o", ENCRYPTED),
        ("-O", "luks", "-o", "key-secret=s,iter-time=10"),
        ("-O", "qcow2", "-o", "data_file=data"),
    ],
    ids=["encrypted", "luks", "data file"],
)
def test_image_of_any_kind_is_none_until_it_is_whole(tmp_path: Path, options: tuple[str, ...]) -> None:
    source, target = tmp_path / "source", tmp_path / "new"
    with source.open("wb") as file:
        file.seek(MIB)  # the first bytes of a disk tell nothing here
        file.write(os.urandom(8 * MIB))
    command = [TOOL, "convert", *SECRET, "-p", "-r", "2M", "-m", "1", "-f", "raw", *options, source, target]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        shown = b""
        while shown.count(b"\r") < 3:  # some of it is copied
            shown += os.read(process.stdout.fileno(), 4096)
        process.kill()
        assert process.wait(TIMEOUT) == -9
    image_format = options[1]
    assert qcow2_tool("info", "-f", image_format, target).returncode == 1
    assert qemu_img("info", "-f", image_format, target, check=False).returncode == 1


def test_reserved_subclusters_show_the_backing_file_until_they_are_written(base: Path) -> None:
    path = base.with_name("new")
    words = ("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "-o", "extended_l2=on,preallocation=metadata")
    for program, name in ((qcow2_tool_ok, "new"), (qemu_img, "theirs")):
        program(*words, base.with_name(name))
    assert_clean(path)
    ours, theirs = (
        json.loads(qemu_img("map", "--output=json", base.with_name(name)).stdout) for name in ("new", "theirs")
    )
    assert [(each["start"], each["length"], each["depth"]) for each in ours] == [
        (each["start"], each["length"], each["depth"]) for each in theirs
    ]
    size = path.stat().st_size
    with qcow2.open(path, "r+") as disk:
        disk.write(100, b"x")
    assert path.stat().st_size == size
    assert_same_bytes(qemu_read(path), b"\1" * 100 + b"x" + b"\1" * ((512 << 10) - 101) + bytes(512 << 10))


@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_data_file_is_reserved(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, data = tmp_path / "image", tmp_path / "data"
    for raw in ("off", "on"):
        options = f"data_file=data,data_file_raw={raw},data_file_use=empty,preallocation={mode}"
        qcow2_tool_ok("create", "-q", "-f", "qcow2", "-o", options, path, "1M")
        assert data.stat().st_blocks * 512 >= MIB
        assert_clean(path)
        assert qemu_read(path) == bytes(MIB)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_longer_disk_is_reserved(tmp_path: Path, image_format: str, mode: str) -> None:
    path = tmp_path / "image"
    qcow2_tool_ok("create", "-q", "-f", image_format, path, "1M")
    qcow2_tool_ok("resize", "-q", "-f", image_format, f"--preallocation={mode}", path, "3M")
    assert path.stat().st_blocks * 512 >= 2 * MIB
    assert qemu_read(path, image_format) == bytes(3 * MIB)


def test_preallocation_of_a_longer_disk_is_known_by_its_name(base: Path) -> None:
    with qcow2.open(base, "r+") as disk:
        disk.resize(2 * MIB, preallocation="full")
        with pytest.raises(ValueError, match="nosuch"):
            disk.resize(3 * MIB, preallocation="nosuch")
        assert disk.size == 2 * MIB
    assert base.stat().st_blocks * 512 >= MIB


def test_zeros_cannot_be_taken_for_granted_over_a_backing_file(base: Path, top: Path) -> None:
    done = qcow2_tool("convert", "-n", "--target-is-zero", "-O", "qcow2", base, top)
    assert (done.returncode, "destination image has a backing file" in done.stderr) == (1, True)


@pytest.mark.parametrize(
    "options", ["cluster_size=512", "cluster_size=4k", "lazy_refcounts=on", "extended_l2=on", "cluster_size=2M"]
)
@pytest.mark.parametrize("how", ["create", "convert"])
def test_image_that_is_full_is_as_large_as_was_measured(tmp_path: Path, options: str, how: str) -> None:
    """Also while it is open."""
    words = ("-O", "qcow2", "--output=json", "-o", options, "--size", "12M")
    measured = json.loads(qcow2_tool_ok("measure", *words))["fully-allocated"]
    path, raw = tmp_path / "image", tmp_path / "raw"
    if how == "create":
        qcow2_tool_ok("create", "-q", "-o", options, path, "12M")
    else:
        with raw.open("wb") as file:
            file.truncate(12 * MIB)
        qcow2_tool_ok("convert", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
    with qcow2.open(path, "r+") as disk:
        for offset in random.Random(5).sample(range(0, disk.size, 65536), disk.size // 65536):
            disk.write(offset, b"x" * 65536)
        assert path.stat().st_size <= measured
    assert path.stat().st_size <= measured


@pytest.mark.parametrize("size", ["512k", "3M"])
def test_snapshot_is_as_long_as_its_disk_was(base: Path, tmp_path: Path, size: str) -> None:
    before = qemu_read(base)
    qcow2_tool_ok("snapshot", "-c", "kept", base)
    qcow2_tool_ok("resize", "-q", "--shrink", base, size)
    qcow2_tool_ok("convert", "-O", "raw", "-l", "kept", base, tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == before
    assert qcow2_tool_ok("measure", "-O", "raw", "-l", "kept", base).startswith(f"required size: {len(before)}\n")


@pytest.mark.parametrize(
    "options",
    [
        "extended_l2=on,cluster_size=4k",
        "refcount_bits=8,compat=0.10",
        "lazy_refcounts=on,compat=0.10",
        "compression_type=zstd,compat=0.10",
        "extended_l2=on,compat=0.10",
        "data_file=data,compat=0.10",
        "data_file_raw=on",
    ],
)
def test_image_that_cannot_be_made_is_not_measured(tmp_path: Path, base: Path, options: str) -> None:
    created = qcow2_tool("create", "-q", "-o", options, tmp_path / "image", "1M")
    assert created.returncode == 1
    for source in (["--size", "1M"], [base]):
        measured = qcow2_tool("measure", "-O", "qcow2", "-o", options, *source)
        assert (measured.returncode, measured.stdout, measured.stderr) == (1, "", created.stderr)


@pytest.mark.parametrize("backing", [(), ("-b", "base", "-F", "qcow2")], ids=["alone", "over the base"])
def test_target_that_is_there_holds_the_disk_whatever_it_is_over(top: Path, backing: tuple[str, ...]) -> None:
    target = top.with_name("new")
    qemu_img("create", "-q", "-f", "qcow2", *backing, target, "1M")
    qemu_io(target, "write -P 7 0 1M")
    qcow2_tool_ok("convert", "-n", "-B", "base", "-F", "qcow2", "-O", "qcow2", top, target)
    assert qemu_img("compare", top, target).stdout == "Images are identical.\n"


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_what_the_host_copies_is_as_sparse_as_it_was(tmp_path: Path, image_format: str) -> None:
    source, target = tmp_path / "source", tmp_path / "new"
    content = os.urandom(MIB) + bytes(30 * MIB) + os.urandom(MIB + 512)
    with source.open("wb") as file:
        file.write(content[:MIB])
        file.seek(31 * MIB)
        file.write(content[31 * MIB :])
    qcow2_tool_ok("convert", "-C", "-f", "raw", "-O", image_format, source, target)
    assert_same_bytes(qemu_read(target, image_format), content)
    assert target.stat().st_blocks * 512 < 4 * MIB


def test_encrypted_clusters_have_no_place_that_anybody_could_read(base: Path) -> None:
    path = base.with_name("new")
    qcow2_tool_ok("convert", *SECRET, "-O", "qcow2", "-o", ENCRYPTED, base, path)
    extents = json.loads(qcow2_tool_ok("map", "--output=json", path))
    assert any(each["data"] for each in extents)
    assert not any("offset" in each for each in extents)
    done = qcow2_tool("map", path)
    assert (done.returncode, "external, encrypted or compressed clusters" in done.stderr) == (1, True)


def test_value_may_end_in_a_comma(tmp_path: Path) -> None:
    path = tmp_path / "a,"
    qcow2_tool_ok("create", "-q", "-f", "qcow2", path, "1M")
    name = f"driver=qcow2,file.filename={path}".replace("a,", "a,,") + ",file.driver=file"
    assert qcow2_tool_ok("info", "--image-opts", name).startswith(f"image: {path}\n")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("info --nosuch x", "unrecognized option '--nosuch'"),
        ("info --output=xml x", "--output must be used with human or json as argument."),
        ("check -r foo x", "Unknown option value for -r (expecting 'leaks' or 'all'): foo"),
        ("commit -t foo x", "Invalid cache option: foo"),
        ("info -f", "missing argument for option '-f'"),
        ("info", "Expecting one image file name"),
        ("info a b", "Expecting one image file name"),
        ("nosuch", "Command not found: nosuch"),
    ],
)
def test_as_qemu_img_a_senseless_command_line_is_told_in_its_words(as_qemu_img: Path, words: str, text: str) -> None:
    for program in (as_qemu_img, "qemu-img"):
        done = subprocess.run([program, *words.split()], capture_output=True, text=True, timeout=TIMEOUT)
        hint = "" if text.startswith(("--", "Invalid")) else "Try 'qemu-img --help' for more information\n"
        assert (done.returncode, done.stderr) == (1, f"qemu-img: {text}\n{hint}")


@pytest.mark.parametrize(
    "options",
    [
        "nosuch=1",
        "cluster_size=3k",
        "cluster_size=xx",
        "compat=9",
        "refcount_bits=3",
        "lazy_refcounts=maybe",
        "preallocation=foo",
        "backing_file=base,backing_fmt=qcow2,preallocation=full",
        "compat=0.10,lazy_refcounts=on",
    ],
)
def test_as_qemu_img_a_target_that_cannot_be_is_told_in_its_words(base: Path, as_qemu_img: Path, options: str) -> None:
    said = []
    for program in (as_qemu_img, Path("qemu-img")):
        command = [program, "convert", "-f", "qcow2", "-O", "qcow2", "-o", options, "base", "new"]
        done = subprocess.run(command, cwd=base.parent, capture_output=True, text=True, timeout=TIMEOUT)
        said.append((done.returncode, done.stderr))
        assert not base.with_name("new").exists()
    assert said[0] == said[1]


def test_as_qemu_img_a_version_is_said_that_scripts_can_read(as_qemu_img: Path) -> None:
    said = subprocess.check_output([as_qemu_img, "--version"], text=True)
    assert said.startswith("qemu-img version 7.2.0 (qcow2 version ")


def test_rest_of_a_disk_is_read_at_once(base: Path) -> None:
    with qcow2.open(base) as disk, disk.file() as file:
        file.seek(512 << 10)
        assert (file.read(), file.tell(), file.read()) == (bytes(512 << 10), MIB, b"")
        file.seek(5 * MIB)
        assert (file.read(), file.tell()) == (b"", 5 * MIB)


def test_encrypted_raw_disk_is_known_as_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "luks"
    qcow2_tool_ok("create", "-q", *SECRET, "-f", "luks", "-o", "key-secret=s,iter-time=10", path, "1M")
    with qcow2.open(path, format="luks", key=b"abc") as disk:
        assert (disk.info["format"], disk.info["encrypted"]) == ("luks", True)
