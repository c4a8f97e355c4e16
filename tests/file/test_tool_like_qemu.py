"""Command lines side by side with qemu-img's: the same status, the same output, and where scripts look at it the same
complaint. QEMU_BIN names the directory of another QEMU than this host's.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.oracle import peers, qemu_img, qemu_io
from tests.program import TIMEOUT, TOOL

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
    with (place / "raw").open("wb") as raw:
        raw.seek(65536)
        raw.write(b"\3" * (256 << 10))
        raw.truncate(MIB)
    qemu_img("create", "-q", "-f", "qcow2", "-b", "data", "-F", "qcow2", place / "top", "2M")
    qemu_io(place / "top", "write -P 5 320k 64k", "write -z 64k 64k", "write -c -P 6 512k 64k")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "top", "-F", "qcow2", place / "summit", "2M")
    return place


def said(program: str | Path, place: Path, words: str) -> tuple[int, str]:
    done = subprocess.run([program, *words.split()], cwd=place, capture_output=True, text=True, timeout=TIMEOUT)
    printed = re.sub(r"(    \(0\.00/100%\)\n)(    \([\d.]+/100%\)\n)*", r"\1", done.stdout)  # how many, nobody promises
    return done.returncode, printed + "".join(f"{line}\n" for line in complaint(done.stderr))


def complaint(text: str) -> list[str]:
    """The lines that tell what is wrong: without the program's name and where to find help."""
    lines = [re.sub(r"^[\w-]+: ", "", line) for line in text.splitlines()]
    return [line for line in lines if not line.startswith("Try '")]


def adapted(text: str, peer: str) -> str:
    """What *peer* would say if it were as new as we are: before 8.2 its maps do not tell what is compressed."""
    major = int(re.search(r"version (\d+)", subprocess.check_output([peer, "--version"], text=True))[1])  # type: ignore[index]
    return text if major >= 9 else re.sub(r', "compressed": (true|false)', "", text)


def test_compare_tells_what_it_cannot_read(tmp_path: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "a", "1M")
    qemu_io(tmp_path / "a", "write -c -P 6 512k 64k")
    place = (tmp_path / "a").stat().st_size // 65536 * 65536
    with (tmp_path / "a").open("r+b") as file:
        file.seek(place)
        file.write(b"\xff" * 40)
    status, text = said(TOOL, tmp_path, "compare a a")
    assert (status, "Error while reading offset 524288 of a: " in text) == (4, True)


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
    "map --output=json summit",
    "map --output=json top",
    "map --output=json -f raw raw",
    "map -s 100k -l 300k --output=json summit",
    "map data",
]


@pytest.mark.parametrize("words", ROWS)
@pytest.mark.parametrize("peer", peers(), ids=os.path.basename)
def test_same_words_have_the_same_effect(images: Path, peer: str, words: str) -> None:
    status, text = said(TOOL, images, words)
    theirs = said(peer, images, words)
    assert (status, adapted(text, peer)) == theirs
