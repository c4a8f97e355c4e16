"""Command lines side by side with qemu-img's: the same status, the same output, and where scripts look at it the same
complaint. QEMU_BIN names the directory of another QEMU than this host's.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.oracle import assert_clean, peers, qemu_img, qemu_io
from tests.program import TIMEOUT, TOOL, qcow2_tool_ok, run

pytestmark = pytest.mark.xdist_group("tool like qemu")  # its images are made once

MIB = 1 << 20


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the rows name; nobody writes to it."""
    place = tmp_path_factory.mktemp("images")
    for name, size in (("empty", "1M"), ("data", "1M"), ("other", "1M"), ("long", "3M"), ("zeros", "1M")):
        qemu_img("create", "-q", "-f", "qcow2", place / name, size)
    for name in ("data", "other", "long"):
        qemu_io(place / name, "write -P 3 64k 256k")
    qemu_io(place / "other", "write -P 4 200000 1")
    qemu_io(place / "zeros", "write -z 0 512k", "write -P 0 512k 64k")
    qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", place / "old", "1M")
    qemu_img("create", "-q", "-f", "qcow2", place / "nothing", "0")
    qemu_img("create", "-q", "-f", "qcow2", place / "noted", "5G")
    for name in ("one", "another"):
        qemu_img("bitmap", "--add", "-g", "512", place / "noted", name)
    qemu_img("create", "-q", "-f", "qcow2", place / "named", "1M")
    qemu_img("snapshot", "-c", "a-name-that-is-wider-than-its-column", place / "named")
    qemu_img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", place / "reserved", "4M")
    qemu_io(place / "reserved", "write -P 3 64k 256k", "write -z 1M 64k")
    qemu_img("create", "-q", "-f", "qcow2", place / "kept", "1M")
    for name, command in (("first", "write -P 7 0 64k"), ("second", "write -P 8 32k 256k")):
        qemu_io(place / "kept", command)
        qemu_img("snapshot", "-c", name, place / "kept")
    qemu_io(place / "kept", "write -P 9 0 1M")
    with (place / "raw").open("wb") as raw:
        raw.seek(65536)
        raw.write(b"\3" * (256 << 10))
        raw.truncate(MIB)
    qemu_img("create", "-q", "-f", "qcow2", "-b", "data", "-F", "qcow2", place / "top", "2M")
    qemu_io(place / "top", "write -P 5 320k 64k", "write -z 64k 64k", "write -c -P 6 512k 64k")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "top", "-F", "qcow2", place / "summit", "2M")
    return place


def said(program: str | Path, place: Path, words: str) -> tuple[int, str]:
    if Path(program).is_absolute() and Path(program).resolve() == TOOL.resolve():
        done = run(program, *words.split(), cwd=place)
    else:
        done = subprocess.run([program, *words.split()], cwd=place, capture_output=True, text=True, timeout=TIMEOUT)
    printed = re.sub(r"(    \(0\.00/100%\)\n)(    \([\d.]+/100%\)\n)*", r"\1", done.stdout)  # how many, nobody promises
    return done.returncode, printed + "".join(f"{line}\n" for line in complaint(done.stderr))


def complaint(text: str) -> list[str]:
    """The lines that tell what is wrong: without the program's name and where to find help."""
    lines = [re.sub(r"^[\w-]+: ", "", line) for line in text.splitlines()]
    return [line for line in lines if not line.startswith("Try '")]


def adapted(text: str, peer: str) -> str:
    """What *peer* would say if it were as new as we are: before 8.2 its maps do not tell what is compressed."""
    for new, old in OLDER if version_of(peer) < 9 else ():
        text = re.sub(new, old, text)
    return text


NEWER = (  # what 10.0 and later say in other words: docs/qemu-img.md
    "info",
    "snapshot -l",
    "create -f qcow2 new 1x",
    "resize base",
    "resize",
    "bench --pattern=300 -w base",
    "bitmap noted b0",
    "convert -m 17 base new",
    "convert -m 17 data new",
    "convert -m 0 data new",
)


def has_other_words(peer: str, words: str) -> bool:
    """Whether *peer* is so new that only the status can be compared."""
    is_known = words in NEWER or words.startswith(tuple(f"{start} " for start in NEWER[:2]))
    is_known |= re.search(r"( |=)x( |$)", words) is not None  # a size that is none
    return is_known and version_of(peer) >= 9


def version_of(peer: str) -> int:
    found = re.search(r"version (\d+)", subprocess.check_output([peer, "--version"], text=True))
    assert found is not None
    return int(found[1])


OLDER = [
    ("--remove, --remove-all", "--remove"),
    (r', "compressed": (true|false)', ""),
    (
        r"coroutines specified. Must be between 1 and 16\.",
        "coroutines. Allowed number of coroutines is between 1 and 16",
    ),
]


def test_compare_tells_what_it_cannot_read(tmp_path: Path) -> None:
    make_unreadable(tmp_path / "a", "1M", "512k")
    status, text = said(TOOL, tmp_path, "compare a a")
    assert (status, "Error while reading offset 524288 of a: " in text) == (4, True)


def make_unreadable(path: Path, size: str, where: str, *commands: str) -> None:
    """An image with a compressed cluster that nobody can expand."""
    qemu_img("create", "-q", "-f", "qcow2", path, size)
    qemu_io(path, *commands, f"write -c -P 6 {where} 64k")
    place = path.stat().st_size // 65536 * 65536
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"\xff" * 40)


@pytest.mark.parametrize("peer", peers())
def test_compare_finds_what_differs_before_what_it_cannot_read(tmp_path: Path, peer: str) -> None:
    make_unreadable(tmp_path / "a", "8M", "2M", "write -P 5 0 2M")
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "b", "8M")
    qemu_io(tmp_path / "b", "write -P 7 0 8M")
    assert said(TOOL, tmp_path, "compare a b") == said(peer, tmp_path, "compare a b")


def test_compare_finds_what_differs_before_a_broken_table(tmp_path: Path) -> None:
    for name, pattern in (("a", 5), ("b", 7)):
        qemu_img("create", "-q", "-f", "qcow2", tmp_path / name, "1G")
        qemu_io(tmp_path / name, f"write -P {pattern} 511M 1M", "write -P 5 512M 64k")
    with (tmp_path / "a").open("r+b") as file:
        file.seek(int.from_bytes(os.pread(file.fileno(), 8, 40), "big") + 8)
        file.write((1 << 63 | 1 << 40).to_bytes(8, "big"))
    assert said(TOOL, tmp_path, "compare a b") == (1, f"Content mismatch at offset {511 * MIB}!\n")


ROWS = [
    "compare -f qcow2 -F qcow2 data long",
    "compare data data",
    "compare -p data data",
    "compare -p data other",
    "compare -q data other",
    "compare data other",
    "compare empty zeros",
    "compare empty data",
    "compare -s data data",
    "compare -s data long",
    "compare -s data top",
    "compare -f qcow2 -F raw data raw",
    "compare -f raw -F qcow2 raw other",
    "compare -f raw raw data",
    "compare -U top summit",
    "compare -s top summit",
    "compare -s summit summit",
    "compare summit long",
    "compare data nosuch",
    "compare nosuch data",
    "compare data",
    "compare",
    "compare data data data",
    "measure --size 1G",
    "measure --size 1000",
    "measure -O qcow2 --size 1G",
    "measure -O qcow2 --size 0",
    "measure -O qcow2 --size 1000 --output=json",
    "measure -O qcow2 --size 1000G -o cluster_size=4k,refcount_bits=64",
    "measure -O qcow2 --size 1G -o preallocation=metadata,cluster_size=512",
    "measure -O qcow2 --size 1G -o preallocation=falloc",
    "measure -O qcow2 --size 1G -o backing_file=foo,backing_fmt=raw",
    "measure -O qcow2 data",
    "measure -O qcow2 summit --output json",
    "measure -O qcow2 -o cluster_size=4k top",
    "measure -O qcow2 -o compat=0.10 top",
    "measure -O qcow2 -o preallocation=full top",
    "measure -O qcow2 -o backing_file=data,backing_fmt=qcow2 top",
    "measure -O qcow2 -f raw raw --output=json",
    "measure -O qcow2 noted",
    "measure -O qcow2 old",
    "measure -O qcow2 -l first kept",
    "measure -O raw summit",
    "measure -O vmdk --size 1G",
    "measure --size 1G data",
    "measure",
    "map --output=json summit",
    "map --output=json top",
    "map --output=json -f raw raw",
    "map -s 100k -l 300k --output=json summit",
    "map -l 0 --output=json data",
    "map -l 0 -s 64k --output=json top",
    "map -s 2M --output=json top",
    "map -s 3M -l 1M --output=json summit",
    "map -s 3M --output=json -f raw raw",
    "map --output=json nothing",
    "map nothing",
    "map data",
    "map reserved",
    "map --output=json reserved",
    "measure -O qcow2 reserved",
    "compare reserved long",
    "info noted",
    "info named",
    "snapshot -l named",
]


@pytest.mark.parametrize("words", ROWS)
@pytest.mark.parametrize("peer", peers(), ids=os.path.basename)
def test_same_words_have_the_same_effect(images: Path, peer: str, words: str) -> None:
    status, text = said(TOOL, images, words)
    their_status, their_text = said(peer, images, words)
    assert status == their_status
    assert adapted(text, peer) == their_text or has_other_words(peer, words)


CREATIONS = [
    "create -f qcow2 new 1M",
    "create -f qcow2 new 1000",
    "create -f qcow2 new 1.5M",
    "create -f qcow2 -o size=1M new",
    "create -f qcow2 -o preallocation=metadata new 3M",
    "create -f qcow2 -o preallocation=falloc,cluster_size=4k new 3M",
    "create -f qcow2 -o preallocation=full new 1M",
    "create -f qcow2 -o preallocation=off,compat=0.10 new 1M",
    "create -f qcow2 -b data -F qcow2 new",
    "create -f qcow2 -b data -F qcow2 -o lazy_refcounts=on new 1000",
    "create -u -f qcow2 -b ./data -F qcow2 new 1M",
    "create -q -f qcow2 new 0",
    "create -f raw new 1000",
    "create -f raw -o preallocation=falloc new 1M",
    "create -f raw -o preallocation=full new 1M",
]


@pytest.mark.sample(8)
@pytest.mark.parametrize("words", CREATIONS)
def test_same_words_create_the_same(images: Path, tmp_path: Path, words: str) -> None:
    results = []
    image_format = "raw" if "-f raw" in words else "qcow2"
    for program in (TOOL, "qemu-img"):
        place = tmp_path / Path(program).name
        place.mkdir()
        (place / "data").symlink_to(images / "data")
        results.append((said(program, place, words), about(place / "new", image_format)))
        if image_format == "qcow2":
            assert_clean(place / "new")
        if "falloc" in words or "full" in words:
            assert (place / "new").stat().st_blocks * 512 >= MIB
    assert results[0] == results[1]


def about(path: Path, image_format: str) -> tuple[dict[str, object], list[dict[str, object]]]:
    """What qemu-img tells of an image, but for where things are."""
    info = json.loads(qemu_img("info", "-U", "-f", image_format, "--output=json", path).stdout)
    for word in ("filename", "full-backing-filename", "actual-size"):
        info.pop(word, None)
    extents = json.loads(qemu_img("map", "-U", "-f", image_format, "--output=json", path).stdout)
    for extent in extents:
        extent.pop("offset", None)
    return info, extents if image_format == "qcow2" else []  # a raw file has a first block for no reason


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_options_that_are_asked_for_are_those_that_qemu_knows(image_format: str) -> None:
    ours = qcow2_tool_ok("create", "-f", image_format, "-o", "help").splitlines()
    assert ours[0] == f"Supported {image_format} options:"
    theirs = qemu_img("create", "-f", image_format, "-o", "help", "new").stdout.splitlines()
    own = ("  data_file_use=", "  keep_data_file=")  # 7.2 empties a file unasked, 11.1 unless it has the second one
    assert {line for line in ours[1:] if not line.startswith(own)} <= {*theirs}
    assert ours == qcow2_tool_ok("create", "-f", image_format, "-o", "?", "new").splitlines()
