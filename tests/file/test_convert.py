"""`qcow2 convert` and `dd`: beside qemu-img's the same disk, the same words; nothing half done passes for whole."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import qcow2
from tests.bitmapreader import bitmaps_of
from tests.file.test_tool_like_qemu import MIB, adapted, has_other_words, images, said
from tests.oracle import assert_clean, peers, qemu_img, qemu_io, qemu_read
from tests.program import TIMEOUT, TOOL, qcow2_tool, qcow2_tool_ok

__all__ = ["images"]  # the fixture

ROWS = [
    "convert -O qcow2 summit new",
    "convert -O raw summit new",
    "convert summit new",
    "convert -f qcow2 -O qcow2 -o cluster_size=4k,compat=0.10 summit new",
    "convert -O qcow2 -o cluster_size=2M,refcount_bits=1 summit new",
    "convert -O qcow2 -m 1 -S 64k -t none -T writeback summit new",
    "convert -O qcow2 -W -m 16 -S 512 summit new",
    "convert -O qcow2 -S 0 data new",
    "convert -O raw -S 0 data new",
    "convert -O qcow2 -o preallocation=metadata data new",
    "convert -O qcow2 -o preallocation=full data new",
    "convert -O raw -o preallocation=falloc data new",
    "convert -f raw -O qcow2 raw new",
    "convert -f raw -O raw raw new",
    "convert -O qcow2 data long other new",
    "convert -O qcow2 -B data -F qcow2 top new",
    "convert -O qcow2 -B data -F qcow2 -o cluster_size=128k top new",
    "convert -O qcow2 -o backing_file=top,backing_fmt=qcow2,cluster_size=4k summit new",
    "convert -c -O qcow2 summit new",
    "convert -c -O qcow2 -o compression_type=zstd,cluster_size=4k summit new",
    "convert -c -O qcow2 -W -o cluster_size=512,refcount_bits=1 summit new",
    "convert -c -O qcow2 -S 0 -o refcount_bits=8,cluster_size=2M long new",
    "convert -c -O qcow2 -B data -F qcow2 top new",
    "convert -l first -O qcow2 kept new",
    "convert -l snapshot.name=second -O raw kept new",
    "convert -l 1 -O raw kept new",
    "convert -l third -O raw kept new",
    "convert -c -O raw data new",
    "convert -c -O qcow2 -o preallocation=metadata data new",
    "convert -O qcow2 -p data new",
    "convert -O qcow2 -p -q data new",
    "convert -O qcow2 -U data new",
    "convert -O qcow2 -r 1G data new",
    "convert -O qcow2 empty new",
    "convert -O qcow2 data nowhere/new",
    "convert -O raw nosuch new",
    "convert -O qcow2 nosuch data new",
    "convert -O foo data new",
    "convert data",
    "convert",
    "convert -S 1 data new",
    "convert -m 17 data new",
    "convert -m 0 data new",
    "convert --target-is-zero data new",
    "convert --bitmaps -O qcow2 old new",
    "convert --bitmaps -O qcow2 -o compat=0.10 old new",
    "convert --bitmaps -O raw old new",
    "convert -n -O qcow2 data new",
    "convert -C -O qcow2 data new",
    "convert -C -S 4k -O raw data new",
    "convert -C -c -O qcow2 data new",
    "convert --target-image-opts data new",
    "convert -n --target-image-opts -O qcow2 data driver=qcow2,file.filename=new",
    "convert -O raw -B data -F qcow2 top new",
    "convert -O qcow2 -B data top new",
    "convert -O qcow2 -o backing_file=data,backing_fmt=qcow2 top data new",
    "dd if=summit of=new",
    "dd -O qcow2 if=summit of=new bs=64k skip=1 count=20",
    "dd -O qcow2 bs=64k count=2 skip=1 if=summit of=new",
    "dd -f raw -O raw if=raw of=new bs=1000 skip=70 count=100",
    "dd -O raw if=data of=new skip=10000",
    "dd -O qcow2 if=data of=new count=0",
    "dd if=data",
    "dd of=new",
    "dd bs=0 if=data of=new",
    "dd foo if=data of=new",
    "dd -O foo if=data of=new",
    "dd if=nosuch of=new",
]


@pytest.mark.sample(12)
@pytest.mark.parametrize("words", ROWS)
@pytest.mark.parametrize("peer", peers(), ids=os.path.basename)
def test_same_words_make_the_same_disk(images: Path, tmp_path: Path, peer: str, words: str) -> None:
    results = []
    for number, program in enumerate((TOOL, peer)):
        place = tmp_path / str(number)
        place.mkdir()
        for image in images.iterdir():
            (place / image.name).symlink_to(image)
        results.append((said(program, place, words), found(place / "new", words)))
    (ours, disk), (theirs, expected) = results
    if has_other_words(peer, words):
        assert ours[0] == theirs[0]
    else:
        assert (ours[0], adapted(ours[1], peer)) == theirs
    assert disk == expected


def found(path: Path, words: str) -> bytes | None:
    """The disk, or the file of a raw one; an image has to be sound."""
    if not path.exists():
        return None
    if "-O qcow2" not in words:
        return path.read_bytes()
    assert_clean(path)
    return qemu_read(path)


@pytest.mark.parametrize("words", [("-O", "qcow2"), ("-O", "raw"), ("-O", "qcow2", "-S", "64k"), ("-m", "1")], ids=str)
def test_sparse_stays_as_sparse_as_with_qemu(tmp_path: Path, words: tuple[str, ...]) -> None:
    source = tmp_path / "source"
    with source.open("wb") as file:
        for offset in range(0, 32 * MIB, 3 * MIB):
            file.seek(offset)
            file.write(random.Random(offset).randbytes(300 << 10))
        file.truncate(64 * MIB)
    qcow2_tool_ok("convert", "-f", "raw", *words, source, tmp_path / "ours")
    qemu_img("convert", "-f", "raw", *words, source, tmp_path / "theirs")
    ours, theirs = ((tmp_path / name).stat().st_blocks * 512 for name in ("ours", "theirs"))
    assert ours <= theirs + (64 << 10)


@pytest.mark.parametrize(
    "words",
    [
        "-S 0 -O raw",
        "-O raw -o preallocation=falloc",
        "-O raw -o preallocation=full",
        "-O qcow2 -o preallocation=full",
        "-O qcow2 -o encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10,preallocation=falloc",
        "-O qcow2 -o encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10,preallocation=full",
    ],
)
def test_what_shall_have_space_has_it(tmp_path: Path, words: str) -> None:
    (tmp_path / "source").write_bytes(bytes(8 * MIB))
    secret = ["--object", "secret,id=key,data=123456"] if "secret" in words else []
    qcow2_tool_ok("convert", *secret, "-f", "raw", *words.split(), tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").stat().st_blocks * 512 >= 8 * MIB


@pytest.mark.parametrize("fills", [(), ("--target-is-zero",)], ids=["", "target-is-zero"])
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_target_that_is_there_gets_the_disk_and_keeps_what_is_behind_it(
    images: Path, tmp_path: Path, image_format: str, fills: tuple[str, ...]
) -> None:
    target = tmp_path / "target"
    qemu_img("create", "-q", "-f", image_format, target, "4M")
    if not fills:
        qemu_io(target, "write -P 9 0 4M", options=("-f", image_format))
    qcow2_tool_ok("convert", "-n", *fills, "-O", image_format, images / "long", target)
    assert qemu_read(target, image_format)[: 3 * MIB] == qemu_read(images / "long")
    assert qemu_read(target, image_format)[3 * MIB :] == (bytes(MIB) if fills else b"\t" * MIB)
    if image_format == "qcow2":
        assert_clean(target)


@pytest.mark.sample(4)
@pytest.mark.parametrize("words", [(), ("--target-is-zero",), ("-m", "1"), ("-W",)], ids=str)
@pytest.mark.parametrize("cluster_size", ["4k", "64k", "1M"])
def test_target_that_is_there_is_written_compressed(
    images: Path, tmp_path: Path, cluster_size: str, words: tuple[str, ...]
) -> None:
    target = tmp_path / "target"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster_size}", target, str(3 * MIB + 512))
    if not words:
        qemu_io(target, "write -P 9 0 3M")
    qcow2_tool_ok("convert", "-c", "-n", *words, "-O", "qcow2", images / "long", target)
    assert qemu_read(target) == qemu_read(images / "long") + bytes(512)
    assert_clean(target)
    kinds = {each["compressed"] for each in json.loads(qcow2_tool_ok("map", "--output=json", target)) if each["data"]}
    assert kinds == {True}


def test_target_may_be_a_list_of_options(images: Path, tmp_path: Path) -> None:
    target = tmp_path / "a,b"
    qemu_img("create", "-q", "-f", "qcow2", target, "1M")
    name = f"driver=qcow2,file.driver=file,file.filename={str(target).replace(',', ',,')}"
    qcow2_tool_ok("convert", "-n", "--target-image-opts", images / "data", name)
    assert qemu_read(target) == qemu_read(images / "data")


def test_last_cluster_of_a_shorter_source_is_not_compressed(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"text" * (70 << 8))
    qemu_img("create", "-q", "-f", "qcow2", target, "1M")
    qemu_io(target, "write -P 9 0 1M")
    qcow2_tool_ok("convert", "-c", "-n", "-f", "raw", "-O", "qcow2", source, target)
    assert qemu_read(target) == source.read_bytes().ljust(MIB, b"\t")
    assert_clean(target)


def test_bitmaps_of_what_is_written_to_record_it(images: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    qemu_img("create", "-q", "-f", "qcow2", "-b", images / "data", "-F", "qcow2", target)
    qemu_img("bitmap", "--add", target, "one")
    for words in (["rebase", "-b", ""], ["convert", "-n", "-O", "qcow2", images / "data"]):
        copy = tmp_path / words[0]
        copy.write_bytes(target.read_bytes())
        qcow2_tool_ok(*words, copy)
        bitmap = bitmaps_of(copy)["one"]
        assert bitmap.is_valid
        assert bool(bitmap.dirty) == (words[0] == "convert")  # a rebase changes nothing that is seen


def test_bitmaps_are_copied_if_they_can_be(tmp_path: Path) -> None:
    source = tmp_path / "source"
    qemu_img("create", "-q", "-f", "qcow2", source, "64M")
    qemu_img("bitmap", "--add", "-g", "4k", source, "one")
    qemu_io(source, "write 1M 70k")
    qemu_img("bitmap", "--add", "--disable", source, "two")
    qcow2_tool_ok("convert", "--bitmaps", "-O", "qcow2", source, tmp_path / "ours")
    qcow2_tool_ok("convert", "--bitmaps", "-c", "-O", "qcow2", source, tmp_path / "packed")
    qemu_img("convert", "--bitmaps", "-O", "qcow2", source, tmp_path / "theirs")
    for name in ("ours", "packed"):
        assert bitmaps_of(tmp_path / name) == bitmaps_of(tmp_path / "theirs")
        assert_clean(tmp_path / name)
    again = qcow2_tool("convert", "--bitmaps", "-n", "-O", "qcow2", source, tmp_path / "ours")
    assert again.stderr == "qcow2: Failed to create bitmap one: Bitmap already exists: one\n"
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write 0 512", "-c", "abort", source], capture_output=True, check=False
    )
    broken = qcow2_tool("convert", "--bitmaps", "-O", "qcow2", source, tmp_path / "broken")
    assert "Cannot copy inconsistent bitmap 'one'" in broken.stderr
    assert not (tmp_path / "broken").exists()
    words = ["--bitmaps", "--skip-broken-bitmaps", "-O", "qcow2"]
    skipped = qcow2_tool("convert", *words, source, tmp_path / "broken")
    assert (skipped.returncode, skipped.stderr.count("Skipping inconsistent bitmap")) == (0, 2)


@pytest.mark.parametrize("options", [[], ["-o", "lazy_refcounts=on"], ["-c"], ["-n"]], ids=" ".join)
def test_copy_with_bitmaps_takes_no_more_than_was_measured(tmp_path: Path, options: list[str]) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    qemu_img("create", "-q", "-f", "qcow2", source, "20M")
    names = ("one", "two")
    for name in names:
        qemu_img("bitmap", "--add", source, name)
    qemu_io(source, "write -P 5 0 20M")
    measured = json.loads(qcow2_tool_ok("measure", "-O", "qcow2", "--output=json", source))
    nbytes = measured["required"] + measured["bitmaps"]
    if options == ["-n"]:
        qcow2_tool_ok("create", "-q", target, "20M")
    words = [TOOL, "convert", "--bitmaps", *options, "-O", "qcow2", source, target]
    done = subprocess.run(["prlimit", f"--fsize={nbytes}", *words], capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stderr) == (0, "")
    assert_clean(target)
    assert sorted(bitmaps_of(target)) == sorted(names)
    for name in names:
        assert bitmaps_of(target)[name].dirty == bitmaps_of(source)[name].dirty
    assert target.stat().st_size <= nbytes


def test_copy_whose_bitmaps_have_no_room_is_none(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    qemu_img("create", "-q", "-f", "qcow2", source, "4M")
    for name in ("one", "two"):
        qemu_img("bitmap", "--add", source, name)
    qemu_io(source, "write -P 5 0 4M")
    measured = json.loads(qcow2_tool_ok("measure", "-O", "qcow2", "--output=json", source))
    limited = ["prlimit", f"--fsize={measured['required'] + measured['bitmaps'] - 65536}", TOOL]
    words = ["convert", "--bitmaps", "-O", "qcow2", source, target]
    done = subprocess.run([*limited, *words], capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stderr) == (1, "qcow2: Failed to create bitmaps: File too large\n")
    assert not target.exists()
    qcow2_tool_ok("create", "-q", target, "4M")
    done = subprocess.run([*limited, *words, "-n"], capture_output=True, text=True, timeout=TIMEOUT)
    assert done.stderr == "qcow2: The disk is copied, its bitmaps are not: File too large\n"
    assert qcow2.compare(source, target) is None
    assert not bitmaps_of(target)


def test_bitmaps_are_of_the_disk_as_it_is_now(tmp_path: Path) -> None:
    source = tmp_path / "source"
    qemu_img("create", "-q", "-f", "qcow2", source, "1G")
    qemu_img("snapshot", "-c", "same", source)
    qemu_img("bitmap", "--add", source, "one")
    qemu_io(source, "write 512M 64k")
    qcow2_tool_ok("convert", "-l", "same", "--bitmaps", "-O", "qcow2", source, tmp_path / "ours")
    qemu_img("convert", "-l", "same", "--bitmaps", "-O", "qcow2", source, tmp_path / "theirs")
    assert bitmaps_of(tmp_path / "ours") == bitmaps_of(tmp_path / "theirs")
    qcow2_tool_ok("resize", source, "100G")
    for words in ([], ["--skip-broken-bitmaps"]):
        done = qcow2_tool("convert", "-l", "same", "--bitmaps", *words, "-O", "qcow2", source, tmp_path / "new")
        text = "bitmaps are of the disk as it is now, of 107374182400 bytes: a snapshot of 1073741824 bytes has none"
        assert (done.returncode, done.stderr) == (1, f"qcow2: {source}: {text}\n")
    assert not (tmp_path / "new").exists()
    assert "bitmaps size" not in qcow2_tool_ok("measure", "-l", "same", "-O", "qcow2", source)
    with qcow2.open(source, snapshot="same") as disk:
        assert [(bitmap.name, bitmap.is_valid) for bitmap in disk.bitmaps] == [("one", True)]
        assert list(disk.bitmaps.dirty("one")) == [(512 * MIB, 65536), (1 << 30, 99 << 30)]


def test_a_luks_disk_is_not_advised_to_be_raw(tmp_path: Path) -> None:
    path = tmp_path / "a"
    secret = ["--object", "secret,id=s,data=k", "-o", "key-secret=s,iter-time=10"]
    qcow2_tool_ok("create", "-q", "-f", "luks", *secret, path, "1M")
    done = qcow2_tool("info", path)
    assert done.returncode == 1
    assert done.stderr.endswith("; of a LUKS disk say -f luks, to a daemon --format=luks\n")


def test_raw_disk_is_never_guessed(images: Path, tmp_path: Path) -> None:
    done = qcow2_tool("convert", "-O", "qcow2", images / "raw", tmp_path / "new")
    assert done.returncode == 1
    assert done.stderr.endswith("; of a raw disk say -f raw, to a daemon --format=raw\n")
    assert not (tmp_path / "new").exists()


def test_target_that_is_too_small_is_left_alone(images: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"x" * MIB)
    done = qcow2_tool("convert", "-n", "-O", "raw", images / "long", target)
    assert (done.returncode, done.stderr) == (1, "qcow2: output file is smaller than input file\n")
    assert target.read_bytes() == b"x" * MIB


def test_backing_file_that_is_not_the_sources_gives_the_right_disk(tmp_path: Path, images: Path) -> None:
    """QEMU copies what the top image has, whatever is below, and says that all is well."""
    for base in ("other", "data"):
        for source in ("summit", "top", "long", "data"):
            target = tmp_path / f"{source} over {base}"
            options = ("-B", images / base, "-F", "qcow2", "-o", "cluster_size=32k")
            qcow2_tool_ok("convert", "-O", "qcow2", *options, images / source, target)
            assert_clean(target)
            assert qemu_read(target) == qemu_read(images / source)
    assert (tmp_path / "data over data").stat().st_size < MIB // 2  # nothing differs
    old = tmp_path / "old"
    qcow2_tool_ok("convert", "-O", "qcow2", *options[:-1], "compat=0.10", images / "empty", old)
    assert qemu_read(old) == bytes(MIB)


@pytest.mark.sample(2)
@pytest.mark.parametrize("seed", range(4))
def test_any_disk_comes_through_any_format(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    sizes = ("512", "4k", "64k", "2M")
    base, top = tmp_path / "base", tmp_path / "top"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={draw.choice(sizes)}", base, "5M")
    size = f"cluster_size={draw.choice(sizes)},compat={draw.choice(('0.10', '1.1'))}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", size, "-b", base, "-F", "qcow2", top, "7M")
    for path, limit in ((base, 5 * MIB), (top, 7 * MIB)):
        verbs = draw.choices(["write -P 1", "write -P 2", "write -z", "write -P 0", "discard"], k=25)
        starts = [draw.randrange(limit - MIB) >> 9 << 9 for _ in verbs]
        lengths = [draw.choice((512, 4096, 70 << 10, 900 << 10)) for _ in verbs]
        qemu_io(path, *(f"{verb} {at} {n}" for verb, at, n in zip(verbs, starts, lengths, strict=True)))
    expected = qemu_read(top)
    path = top
    for step in range(3):
        image_format = draw.choice(("qcow2", "raw"))
        options = ["-o", f"cluster_size={draw.choice(sizes)}"] if image_format == "qcow2" else []
        options += draw.choice(([], ["-W"], ["-m", "1"], ["-S", "512"], ["-S", "64k"], ["-c"] if options else []))
        target = tmp_path / str(step)
        source_format = "raw" if path.read_bytes()[:4] != b"QFI\xfb" else "qcow2"
        qcow2_tool_ok("convert", "-f", source_format, "-O", image_format, *options, path, target)
        assert qemu_read(target, image_format) == expected
        if image_format == "qcow2":
            assert_clean(target)
        path = target


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_killed_convert_leaves_nothing_that_opens_as_whole(
    tmp_path: Path, image_format: str, number: signal.Signals
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"x" * (8 * MIB))
    command = [TOOL, "convert", "-f", "raw", "-O", image_format, "-r", "4M", source, target]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: target.exists() and target.stat().st_size > MIB)
        process.send_signal(number)
        _, complaint = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, complaint) == (-number, "")
    if number is not signal.SIGKILL:
        assert list(tmp_path.iterdir()) == [source]
    elif image_format == "qcow2":
        with pytest.raises(qcow2.ImageError):
            qcow2.open(target)
    else:
        assert target.read_bytes()[:4096] == bytes(4096)
        assert target.stat().st_size < 8 * MIB


def test_what_was_renamed_to_the_targets_name_stays(tmp_path: Path) -> None:
    source, target, other = tmp_path / "source", tmp_path / "target", tmp_path / "other"
    source.write_bytes(b"x" * (8 * MIB))
    other.write_bytes(b"somebody's")
    command = [TOOL, "convert", "-f", "raw", "-O", "qcow2", "-r", "4M", source, target]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: target.exists() and target.stat().st_size > MIB)
        other.rename(target)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=TIMEOUT)
    assert process.returncode == -signal.SIGTERM
    assert target.read_bytes() == b"somebody's"


def wait_until(is_so: Callable[[], bool]) -> None:
    ends = time.monotonic() + TIMEOUT
    while not is_so():
        assert time.monotonic() < ends
        time.sleep(0.001)


def test_failed_convert_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x" * MIB)
    for image_format in ("raw", "qcow2"):
        command = [
            "prlimit",
            "--fsize=500000",
            TOOL,
            "convert",
            "-f",
            "raw",
            "-O",
            image_format,
            source,
            tmp_path / "a",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        assert done.returncode == 1
        assert "error while writing at byte 0: File too large" in done.stderr
        assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("words", [["-c"], ["-O", "qcow2"], ["-c", "-o", "cluster_size=4k"]], ids=" ".join)
def test_convert_that_runs_full_at_the_end_says_where(tmp_path: Path, words: list[str]) -> None:
    """What does not fit any more is no data, but a table or a refcount; the target was there and could be made."""
    (tmp_path / "noise").write_bytes(random.Random(1).randbytes(MIB))
    command = [TOOL, "convert", "-f", "raw", "-O", "qcow2", *words, tmp_path / "noise", tmp_path / "new"]
    subprocess.run(command, check=True, timeout=TIMEOUT)
    nbytes = (tmp_path / "new").stat().st_size
    (tmp_path / "new").unlink()
    limited = ["prlimit", f"--fsize={nbytes - 4096}", *command]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stderr) == (1, f"qcow2: error while writing at byte {MIB}: File too large\n")
    assert not (tmp_path / "new").exists()


def test_source_is_no_target(images: Path, tmp_path: Path) -> None:
    for name in ("data", "top"):
        (tmp_path / name).write_bytes((images / name).read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for words in (["top", "data"], ["top", "top"], ["-n", "top", "data"], ["-U", "top", "data"], ["data", "data"]):
        options, names = [word for word in words if word[0] == "-"], [word for word in words if word[0] != "-"]
        done = qcow2_tool("convert", *options, "-O", "qcow2", *(tmp_path / name for name in names))
        assert done.returncode == 1
        assert done.stderr.endswith("the target is the source, or under it\n")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "words",
    [
        ["top", "data"],
        ["-n", "top", "data"],
        ["-f", "raw", "-o", "data_file=data,data_file_use=empty", "data", "new"],
        ["-o", "data_file=data,data_file_use=empty", "top", "new"],
        ["-n", "-f", "raw", "data", "base"],
    ],
    ids=" ".join,
)
def test_data_file_of_a_source_is_no_target(tmp_path: Path, words: list[str]) -> None:
    qcow2.create(tmp_path / "base", MIB, data_file="data")
    qcow2.create(tmp_path / "top", backing="base")
    with qcow2.open(tmp_path / "base", writable=True) as disk:
        disk.write(0, b"x" * MIB)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    command = [TOOL, "convert", "-U", "-O", "qcow2", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 1
    assert done.stderr.endswith("the target is the source, or under it\n")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("words", ["-F qcow2", "-o backing_fmt=qcow2"])
def test_format_of_no_backing_file_is_refused(images: Path, tmp_path: Path, words: str) -> None:
    target = tmp_path / "target"
    done = qcow2_tool("convert", "-O", "qcow2", *words.split(), images / "data", target)
    reason = "error while converting qcow2: Backing format cannot be used without backing file"
    assert (done.returncode, done.stderr) == (1, f"qcow2: {target}: {reason}\n")
    assert not target.exists()


def test_signal_asks_how_far_it_is(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"x" * (4 * MIB))
    command = [TOOL, "convert", "-f", "raw", "-r", "8M", source, target]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: target.exists() and target.stat().st_size > MIB)
        process.send_signal(signal.SIGUSR1)
        _, complaint = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0
    assert complaint.startswith("    (")
    assert complaint.endswith("/100%)\n")


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster_size", ["4k", "64k"])
def test_compressed_streams_of_all_sizes_share_clusters(tmp_path: Path, compression: str, cluster_size: str) -> None:
    draw = random.Random(5)
    content = b"".join(
        (draw.randbytes(draw.randrange(1, 9000)) + bytes([index % 256]) * draw.randrange(9000)) for index in range(700)
    )
    source, ours, theirs = tmp_path / "source", tmp_path / "ours", tmp_path / "theirs"
    source.write_bytes(content.ljust(-(-len(content) // 512) * 512, b"\0"))
    words = ("-c", "-f", "raw", "-O", "qcow2", "-o", f"compression_type={compression},cluster_size={cluster_size}")
    qcow2_tool_ok("convert", *words, "-W", source, ours)
    qemu_img("convert", *words, source, theirs)
    assert_clean(ours)
    assert qemu_read(ours) == source.read_bytes()
    assert ours.stat().st_size <= theirs.stat().st_size * 1.02
    with qcow2.open(ours) as disk:
        assert disk.read(0, disk.size) == source.read_bytes()


@pytest.mark.parametrize("sparse", ["512", "4k", "64k"])
def test_no_cluster_of_zeros_is_compressed(tmp_path: Path, sparse: str) -> None:
    content = bytearray(64 << 10)
    for place in (0, 8 << 10, 17 << 10):
        content[place : place + 1024] = b"d" * 1024
    (tmp_path / "raw").write_bytes(content)
    options = ("-c", "-S", sparse, "-o", "cluster_size=1k")
    qcow2_tool_ok("convert", "-f", "raw", "-O", "qcow2", *options, tmp_path / "raw", tmp_path / "new")
    extents = json.loads(qcow2_tool_ok("map", "--output=json", tmp_path / "new"))
    assert [(each["start"], each["length"]) for each in extents if each["compressed"]] == [
        (0, 1024),
        (8 << 10, 1024),
        (17 << 10, 1024),
    ]
    assert qemu_read(tmp_path / "new") == content


def test_a_source_that_is_in_use_is_named_once(tmp_path: Path) -> None:
    qcow2.create(tmp_path / "used", MIB)
    with qcow2.open(tmp_path / "used", writable=True):
        done = qcow2_tool("convert", tmp_path / "used", tmp_path / "copy")
    assert (done.returncode, done.stderr.count("used'"), done.stderr.count("\n")) == (1, 1, 1)
