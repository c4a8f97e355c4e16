"""What cannot work ends in one line on stderr that names the thing, a non-zero status, and an untouched image."""

import os
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import qcow2
from tests.builder import Recipe, build
from tests.builder.record import (
    BACKING_FORMAT,
    CORRUPT,
    EXTENDED_L2,
    EXTERNAL_DATA,
    FEATURE_NAMES,
    LAZY_REFCOUNTS,
    feature_name_table,
)
from tests.oracle import held_by_qemu, sha256
from tests.program import DAEMON, TIMEOUT, TOOL, qcow2_tool, run


def sound(path: Path) -> None:
    recipe = Recipe(size=1 << 20)
    recipe.data(0, b"data")
    build(recipe, path)


def truncated(path: Path) -> None:
    recipe = Recipe(size=1 << 20)
    recipe.data(0, b"data")
    build(recipe, path).truncate(70_000)  # inside the cluster of the L1 table: the refcount table is gone


def unknown_feature(path: Path) -> None:
    names = feature_name_table([(0, 47, "time travel"), (1, 47, "not this one")])
    build(Recipe(size=1 << 20, incompatible=1 << 47, extensions=[(FEATURE_NAMES, names)]), path)


def encrypted(path: Path) -> None:
    build(Recipe(size=1 << 20), path).set_header(crypt_method=2)


def marked_corrupt(path: Path) -> None:
    build(Recipe(size=1 << 20, incompatible=CORRUPT), path)


def with_backing(name: str, image_format: str | None) -> Callable[[Path], None]:
    extensions = [(BACKING_FORMAT, image_format.encode())] if image_format else []
    return lambda path: build(Recipe(size=1 << 20, backing=name, extensions=extensions), path) and None


def with_header(**fields: int) -> Callable[[Path], None]:
    return lambda path: build(Recipe(size=1 << 20), path).set_header(**fields)


BAD_IMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "not a qcow2 image"),
    "short": (lambda path: path.write_bytes(b"QFI\xfb" + bytes(20)), "not a qcow2 image: 24 bytes long"),
    "not qcow2": (lambda path: path.write_bytes(b"\x7fELF" + bytes(100_000)), "not a qcow2 image"),
    "truncated": (truncated, "end of the file"),
    "unknown feature": (unknown_feature, "time travel"),
    "unnamed unknown feature": (lambda path: build(Recipe(size=1 << 20, incompatible=1 << 9), path), "9"),
    "encrypted": (encrypted, "LUKS"),
    "external data file": (lambda path: build(Recipe(size=1 << 20, incompatible=EXTERNAL_DATA), path), "data file"),
    "subclusters of 256 bytes": (
        lambda path: build(Recipe(size=1 << 20, cluster_bits=13, incompatible=EXTENDED_L2), path),
        "extended L2",
    ),
    "version 4": (with_header(version=4), "version 4"),
    "cluster of 256 bytes": (with_header(cluster_bits=8), "cluster_bits 8"),
    "cluster of 4 MiB": (with_header(cluster_bits=22), "cluster_bits 22"),
    "refcounts of 128 bits": (with_header(refcount_order=7), "refcount_order 7"),
    "L1 outside the file": (with_header(l1_table_offset=1 << 40), "l1_table_offset 0x10000000000"),
    "L1 unaligned": (with_header(l1_table_offset=0x10200), "0x10200"),
    "L1 too short": (with_header(size=1 << 40), "l1_size 1"),
    "L1 too long": (with_header(l1_size=(32 << 20) // 8 + 1), "4194304"),
    "refcount table outside the file": (with_header(refcount_table_offset=1 << 40), "refcount_table_offset"),
    "refcount table too long": (with_header(refcount_table_clusters=129), "refcount_table_clusters 129"),
    "too many snapshots": (with_header(nb_snapshots=65537), "nb_snapshots 65537"),
    "header shorter than its version": (with_header(header_length=96), "header_length 96"),
    "no such compression": (with_header(compression_type=7), "compression_type 7"),
    "backing name outside the cluster": (
        with_header(backing_file_offset=0xFFFF, backing_file_size=100),
        "backing_file_offset 0xffff",
    ),
    "backing file of no format": (with_backing("base", None), "format"),
    "backing file of a strange format": (with_backing("base", "vmdk"), "vmdk"),
    "backing file missing": (with_backing("nowhere", "raw"), "nowhere"),
    "backing file is itself": (with_backing("a", "qcow2"), "cycle"),
    "backing file over the network": (with_backing("nbd://host/disk", "raw"), "nbd"),
    "backing file of strange words": (with_backing('json:{"driver":"host_device"}', "raw"), "json:"),
}
BAD_FOR_WRITERS = {"marked corrupt": (marked_corrupt, "corrupt")}


def refused_by_library(path: Path, *, writable: bool) -> str:
    with pytest.raises((OSError, qcow2.ImageError)) as caught:
        qcow2.open(str(path), writable=writable).close()
    return str(caught.value)


def run_daemon(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run(DAEMON, *arguments, stdin=subprocess.DEVNULL)


def one_line(done: subprocess.CompletedProcess[str], program: str) -> str:
    """The complaint of a program that refused: status 1, nothing on stdout, one line that starts with its name."""
    assert done.returncode == 1, done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{program}: "), line
    assert "Traceback" not in line
    return line


def refused_by_daemon(path: Path, *options: str) -> str:
    socket_path = path.with_name("s")
    line = one_line(run_daemon(f"--socket-path={socket_path}", f"--blk-file={path}", *options), "vhost-user-qcow2")
    assert not socket_path.exists()
    return line


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_is_refused_by_the_library(tmp_path: Path, kind: str) -> None:
    make, word = BAD_IMAGES[kind]
    path = tmp_path / "a"
    make(path)
    before = sha256(path)
    for writable in (False, True):
        message = refused_by_library(path, writable=writable)
        assert word in message
        assert str(tmp_path) in message
        assert "\n" not in message
    assert sha256(path) == before


@pytest.mark.sample(10)
@pytest.mark.parametrize("kind", {**BAD_IMAGES, **BAD_FOR_WRITERS})
def test_a_bad_image_is_refused_by_the_daemon(tmp_path: Path, kind: str) -> None:
    make, word = {**BAD_IMAGES, **BAD_FOR_WRITERS}[kind]
    path = tmp_path / "a"
    make(path)
    before = sha256(path)
    line = refused_by_daemon(path)
    assert word in line
    assert str(tmp_path) in line
    assert sha256(path) == before


@pytest.mark.parametrize(
    "kind", [kind for kind in BAD_IMAGES if not kind.startswith("backing file") and "refcount table" not in kind]
)
@pytest.mark.parametrize("command", ["map", "check"])
def test_a_bad_image_is_refused_by_the_tool(tmp_path: Path, command: str, kind: str) -> None:
    make, word = BAD_IMAGES[kind]
    path = tmp_path / "a"
    make(path)
    if command == "check" and kind in ("truncated", "too many snapshots"):
        pytest.skip("what is lost is what check reports")
    if command == "check" and kind == "external data file":
        pytest.skip("check looks at no data: where it is need not be known")
    before = sha256(path)
    line = one_line(qcow2_tool(command, path), "qcow2")
    assert word in line
    assert str(path) in line
    assert sha256(path) == before


def test_an_image_marked_corrupt_opens_for_reading_only(tmp_path: Path) -> None:
    marked_corrupt(tmp_path / "a")
    with qcow2.open(str(tmp_path / "a")) as disk:
        assert disk.read(0, 512) == bytes(512)
    assert "corrupt" in refused_by_library(tmp_path / "a", writable=True)


def test_a_cycle_is_reported_with_its_whole_chain(tmp_path: Path) -> None:
    for name, backing in (("a", "b"), ("b", "c"), ("c", "b")):
        with_backing(backing, "qcow2")(tmp_path / name)
    message = refused_by_library(tmp_path / "a", writable=False)
    assert "cycle" in message
    for name in ("a", "b", "c"):
        assert str(tmp_path / name) in message


def test_a_missing_backing_file_is_reported_with_its_whole_chain(tmp_path: Path) -> None:
    with_backing("b", "qcow2")(tmp_path / "a")
    with_backing("c", "qcow2")(tmp_path / "b")
    message = refused_by_library(tmp_path / "a", writable=False)
    for name in ("a", "b", "c"):
        assert str(tmp_path / name) in message


# -- locks


def test_an_image_that_qemu_writes_is_refused_by_the_library(tmp_path: Path) -> None:
    sound(tmp_path / "a")
    with held_by_qemu(tmp_path / "a"):
        assert "lock" in refused_by_library(tmp_path / "a", writable=True)
        assert "lock" in refused_by_library(tmp_path / "a", writable=False)


def test_an_image_that_qemu_writes_is_refused_by_the_daemon(tmp_path: Path) -> None:
    sound(tmp_path / "a")
    with held_by_qemu(tmp_path / "a"):
        before = sha256(tmp_path / "a")
        assert "lock" in refused_by_daemon(tmp_path / "a")
        assert sha256(tmp_path / "a") == before


@pytest.mark.parametrize("arguments", [["check"], ["check", "-r", "all"], ["map"], ["rebase", "-u", "-b", ""]])
def test_an_image_that_qemu_writes_is_refused_by_the_tool(tmp_path: Path, arguments: list[str]) -> None:
    sound(tmp_path / "a")
    with held_by_qemu(tmp_path / "a"):
        before = sha256(tmp_path / "a")
        assert "lock" in one_line(qcow2_tool(*arguments, tmp_path / "a"), "qcow2")
        assert sha256(tmp_path / "a") == before


def test_an_image_that_qemu_reads_can_be_read_but_not_written(tmp_path: Path) -> None:
    sound(tmp_path / "a")
    with held_by_qemu(tmp_path / "a", read_only=True):
        qcow2.open(str(tmp_path / "a")).close()
        assert "lock" in refused_by_library(tmp_path / "a", writable=True)


def test_create_does_not_overwrite_an_image_in_use(tmp_path: Path) -> None:
    sound(tmp_path / "a")
    with held_by_qemu(tmp_path / "a"):
        before = sha256(tmp_path / "a")
        assert "lock" in one_line(qcow2_tool("create", "-f", "qcow2", tmp_path / "a", "1M"), "qcow2")
        assert sha256(tmp_path / "a") == before


@pytest.mark.parametrize("writable", [True, False])
def test_qemu_is_refused_while_we_have_the_image(tmp_path: Path, writable: bool) -> None:
    """Law 10: nobody changes the image under us."""
    sound(tmp_path / "a")
    with qcow2.open(str(tmp_path / "a"), writable=writable):
        command = ["qemu-io", "-f", "qcow2", "-c", "write 0 512", str(tmp_path / "a")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        assert "lock" in done.stdout + done.stderr
        repair = ["qemu-img", "check", "-r", "all", str(tmp_path / "a")]
        assert "lock" in subprocess.run(repair, capture_output=True, text=True, timeout=TIMEOUT).stderr


# -- files


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nowhere"
    assert str(path) in refused_by_library(path, writable=False)
    assert str(path) in refused_by_daemon(path)
    assert str(path) in one_line(qcow2_tool("info", path), "qcow2")
    assert not path.exists()


def test_a_directory_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert "directory" in refused_by_daemon(tmp_path / "a").lower()
    assert "directory" in refused_by_library(tmp_path / "a", writable=False).lower()


@pytest.fixture
def unwritable(tmp_path: Path) -> Iterator[Path]:
    """Root writes to any file that is not immutable, or that nobody may write while it runs."""
    program = tmp_path / "program"
    program.write_bytes(Path("/bin/sleep").read_bytes())
    program.chmod(0o755)
    if os.geteuid():
        sound(tmp_path / "a")
        (tmp_path / "a").chmod(0o444)
        yield tmp_path / "a"
        return
    with subprocess.Popen([program, "100"]) as process:
        yield program
        process.kill()


def test_an_unwritable_file_is_refused(unwritable: Path) -> None:
    before = sha256(unwritable)
    assert str(unwritable) in refused_by_library(unwritable, writable=True)
    assert str(unwritable) in refused_by_daemon(unwritable)
    assert str(unwritable) in one_line(qcow2_tool("rebase", "-u", "-b", "", unwritable), "qcow2")
    assert sha256(unwritable) == before


# -- options and sizes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-f", "qcow2", "PATH", "ten"], ["ten"]),
        (["-f", "qcow2", "PATH", "-5"], ["-5"]),
        (["-f", "qcow2", "PATH", "1.5.5G"], ["1.5.5G"]),
        (["-f", "qcow2", "PATH", "8E"], ["8E"]),
        (["-f", "qcow2", "PATH", "99999999999999999999"], ["99999999999999999999"]),
        (["-f", "qcow2", "PATH"], ["size"]),
        (["-f", "qcow2", "-o", "cluster_size=512", "PATH", "1T"], ["1T", "512"]),
        (["-f", "qcow2", "-o", "cluster_size=1000", "PATH", "1G"], ["cluster_size", "1000"]),
        (["-f", "qcow2", "-o", "cluster_size=256", "PATH", "1G"], ["cluster_size", "256", "512"]),
        (["-f", "qcow2", "-o", "cluster_size=4M", "PATH", "1G"], ["cluster_size", "2"]),
        (["-f", "qcow2", "-o", "refcount_bits=3", "PATH", "1G"], ["refcount_bits", "3"]),
        (["-f", "qcow2", "-o", "refcount_bits=128", "PATH", "1G"], ["refcount_bits", "128", "64"]),
        (["-f", "qcow2", "-o", "compat=0.10,refcount_bits=8", "PATH", "1G"], ["refcount_bits", "0.10"]),
        (["-f", "qcow2", "-o", "compat=0.10,lazy_refcounts=on", "PATH", "1G"], ["lazy_refcounts", "0.10"]),
        (["-f", "qcow2", "-o", "compat=2", "PATH", "1G"], ["compat", "2"]),
        (["-f", "qcow2", "-o", "lazy_refcounts=maybe", "PATH", "1G"], ["lazy_refcounts", "maybe"]),
        (["-f", "qcow2", "-o", "preallocation=some", "PATH", "1G"], ["preallocation", "some"]),
        (["-f", "qcow2", "-o", "flavour=mint", "PATH", "1G"], ["flavour"]),
        (["-f", "qcow2", "-o", "cluster_size", "PATH", "1G"], ["cluster_size"]),
        (["-f", "vmdk", "PATH", "1G"], ["vmdk"]),
        (["-f", "qcow2", "-b", "nowhere", "-F", "qcow2", "PATH"], ["nowhere"]),
        (["-f", "qcow2", "-b", "PATH", "PATH", "1G"], ["format"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("-") else None,
)
def test_create_refuses_nonsense(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    path = tmp_path / "a"
    line = one_line(qcow2_tool("create", *(str(path) if word == "PATH" else word for word in arguments)), "qcow2")
    for word in words:
        assert word in line
    assert not path.exists()


def test_create_keeps_an_old_image_when_it_refuses(tmp_path: Path) -> None:
    sound(tmp_path / "a")
    before = sha256(tmp_path / "a")
    one_line(qcow2_tool("create", "-f", "qcow2", "-o", "cluster_size=1000", tmp_path / "a", "1G"), "qcow2")
    assert sha256(tmp_path / "a") == before


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--cache=sometimes", ["--cache", "sometimes"]),
        ("--format=vmdk", ["--format", "vmdk"]),
        ("--num-queues=0", ["--num-queues", "0"]),
        ("--num-queues=many", ["--num-queues", "many"]),
        ("--num-queues=100000", ["--num-queues", "100000"]),
        ("--serial=" + "x" * 21, ["--serial", "20"]),
        ("--lazy-refcounts=perhaps", ["--lazy-refcounts", "perhaps"]),
        ("--fd=3", ["--fd", "--socket-path"]),
        ("--colour=blue", ["--colour"]),
    ],
)
def test_the_daemon_refuses_nonsense(tmp_path: Path, option: str, words: list[str]) -> None:
    sound(tmp_path / "a")
    before = sha256(tmp_path / "a")
    line = refused_by_daemon(tmp_path / "a", option)
    for word in words:
        assert word in line
    assert sha256(tmp_path / "a") == before


def test_a_socket_path_too_long_is_refused(tmp_path: Path) -> None:
    sound(tmp_path / "a")
    line = one_line(run_daemon(f"--socket-path=/tmp/{'x' * 104}", f"--blk-file={tmp_path / 'a'}"), "vhost-user-qcow2")
    assert "107" in line


def test_a_socket_in_use_is_refused(tmp_path: Path) -> None:
    sound(tmp_path / "a")
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(str(tmp_path / "s"))
        live.listen()
        done = run_daemon(f"--socket-path={tmp_path / 's'}", f"--blk-file={tmp_path / 'a'}")
        assert str(tmp_path / "s") in one_line(done, "vhost-user-qcow2")
    assert (tmp_path / "s").exists()


@pytest.mark.parametrize("fd", ["0", "77"])
def test_a_descriptor_that_is_no_socket_is_refused(tmp_path: Path, fd: str) -> None:
    sound(tmp_path / "a")
    assert fd in one_line(run_daemon(f"--fd={fd}", f"--blk-file={tmp_path / 'a'}"), "vhost-user-qcow2")


def test_lazy_refcounts_on_version_2_are_refused(tmp_path: Path) -> None:
    build(Recipe(size=1 << 20, version=2), tmp_path / "a")
    before = sha256(tmp_path / "a")
    assert "lazy" in refused_by_daemon(tmp_path / "a", "--lazy-refcounts=on")
    assert sha256(tmp_path / "a") == before


def test_a_corrupt_table_is_named_by_its_place(tmp_path: Path) -> None:
    recipe = Recipe(size=1 << 20, compatible=LAZY_REFCOUNTS)
    recipe.data(0, b"data")
    built = build(recipe, tmp_path / "a")
    built.poke(built.l2_entry_offset(0), struct.pack(">Q", 1 << 55 | 1 << 63))
    with qcow2.open(str(built.path)) as disk:
        with pytest.raises(qcow2.CorruptImage) as caught:
            disk.read(0, 512)
        assert caught.value.host_offset == built.l2_entry_offset(0)
        assert disk.read(65536, 512) == bytes(512)


def test_what_no_byte_stands_for_is_said_as_an_escape(tmp_path: Path) -> None:
    for words in (['json:{"driver":"\\ud800","filename":"x"}'], ["json:{'filename':'\\ud800'}"]):
        done = qcow2_tool("info", *words)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert "\\ud800" in done.stderr
    name = os.fsdecode(b"\xff")  # what a byte stands for is said as that
    assert f"/{name}: No such" in os.fsdecode(
        subprocess.run([TOOL, "info", tmp_path / name], capture_output=True).stderr
    )


def test_a_name_that_nests_too_deep_is_refused() -> None:
    for depth in (100, 950, 5000):
        for opening, end in (('{"a":', "}"), ("[", "]")):
            done = qcow2_tool("info", 'json:{"a":' + opening * depth + "1" + end * depth + "}")
            assert (done.returncode, done.stderr.count("\n")) == (1, 1), depth
