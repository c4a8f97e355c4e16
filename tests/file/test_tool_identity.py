"""The tool under the name of qemu-img, and images named by all their options."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.oracle import qemu_img, qemu_io
from tests.program import TIMEOUT, TOOL, qcow2_tool, qcow2_tool_ok

MIB = 1 << 20


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """Our tool, under another's name."""
    path = tmp_path / "bin" / "qemu-img"
    path.parent.mkdir()
    path.symlink_to(TOOL)
    return path


def run(program: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *map(str, words)], capture_output=True, text=True, timeout=TIMEOUT)


def test_as_qemu_img_formats_are_guessed_and_raw_images_made(linked: Path, tmp_path: Path) -> None:
    raw, image = tmp_path / "raw", tmp_path / "image"
    assert "fmt=raw" in run(linked, "create", raw, "1M").stdout
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    for path in (raw, image):
        assert run(linked, "info", path).stdout.splitlines()[1] == qemu_img("info", path).stdout.splitlines()[1]
    assert run(linked, "compare", raw, image).returncode == 0
    grown = run(linked, "resize", raw, "2M")
    assert (grown.returncode, grown.stdout) == (0, "Image resized.\n")
    theirs = qemu_img("resize", raw, "3M").stderr
    assert grown.stderr == theirs


@pytest.mark.parametrize("words", [["info"], ["check"], ["map"], ["snapshot", "-l"], ["resize"]])
def test_as_qemu_img_complaints_are_its_own(linked: Path, words: list[str]) -> None:
    rest = ["nosuch", *(["1M"] if words == ["resize"] else [])]
    ours, theirs = run(linked, *words, *rest), run(Path("qemu-img"), *words, *rest)
    assert (ours.returncode, ours.stdout, ours.stderr) == (theirs.returncode, theirs.stdout, theirs.stderr)


def test_as_qemu_img_what_cannot_be_opened_is_told_in_its_words(linked: Path, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(MIB))
    told = set()
    for size in (None, 1 << 60, 8 << 40):
        if size is not None:
            qemu_img("create", "-q", "-f", "qcow2", path, "4G")
            with path.open("r+b") as file:
                file.seek(24)
                file.write(size.to_bytes(8, "big"))
        ours, theirs = (run(program, "check", "-f", "qcow2", path) for program in (linked, Path("qemu-img")))
        assert (ours.returncode, ours.stderr) == (theirs.returncode, theirs.stderr)
        told.add(ours.stderr)
    assert len(told) == 3


@pytest.mark.parametrize(
    "words",
    [
        ["--image-opts", "driver=qcow2,file.filename=a,,b"],
        [
            "--image-opts",
            "driver=qcow2,l2-cache-entry-size=4k,cache.direct=on,file.filename=a,,b,file.cache.no-flush=on",
        ],
        ["--image-opts", "driver=qcow2,file.driver=file,file.filename=a,,b"],
        ['json:{"driver": "qcow2", "file": {"driver": "file", "filename": "a,b"}}'],
        ["-f", "qcow2", "file:a,b"],
    ],
)
def test_images_are_named_by_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    qemu_img("create", "-q", "-f", "qcow2", "a,b", "1M")
    qemu_io(Path("a,b"), "write -P 1 0 64k")
    assert json.loads(qcow2_tool_ok("info", "--output=json", *words))["virtual-size"] == MIB
    assert json.loads(qcow2_tool_ok("map", "--output=json", *words))[0]["length"] == 65536
    assert "No errors" in qcow2_tool_ok("check", *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--image-opts", "-f", "raw", "a"], "--image-opts and --format are mutually exclusive"),
        (["--image-opts", "driver=qcow2"], 'A block device must be specified for "file"'),
        (["--image-opts", "driver=nbd,file.filename=a"], "Unknown driver 'nbd'"),
        (["--image-opts", "driver=raw,file.filename=a,size=3"], "does not support the option 'size'"),
        (["json:{"], "Could not parse"),
        (["--image-opts", "driver=raw,file.filename=a,encrypt.format=luks"], "does not support the option 'encrypt"),
        (["--image-opts", "driver=raw,file.filename=a,file.driver=qcow2"], "Unknown protocol 'qcow2'"),
        (["-f", "raw", "json:{'driver': 'qcow2', 'file.filename': 'a', 'backing': {'file.filename': 'b'}}"], "backing"),
    ],
)
def test_what_no_options_name_is_refused(words: list[str], said: str) -> None:
    done = qcow2_tool("info", *words)
    assert (done.returncode, said in done.stderr) == (1, True), done.stderr


@pytest.fixture
def guests(tmp_path: Path) -> Path:
    """A guest's raw disk that begins as a qcow2 image over a file of the host's does."""
    secret, guests = tmp_path / "secret", tmp_path / "guests"
    secret.write_bytes(b"secret!!" * 8192)
    qemu_img("create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", guests)
    return guests


@pytest.mark.parametrize("driver", [{}, {"driver": "raw"}, {"driver": "qcow2"}, {"driver": "foo"}], ids=str)
@pytest.mark.parametrize("said", [[], ["-f", "raw"], ["-f", "qcow2"], ["-f", "foo"]], ids=str)
def test_a_format_that_is_given_goes_before_one_that_is_named(
    tmp_path: Path, guests: Path, said: list[str], driver: dict[str, str]
) -> None:
    name, read = "json:" + json.dumps({**driver, "file": {"filename": str(guests)}}), []
    for program, out in ((TOOL, tmp_path / "ours"), (Path("qemu-img"), tmp_path / "theirs")):
        done = run(program, "convert", *said, "-O", "raw", name, out)
        read.append((done.returncode, out.read_bytes() if out.exists() else b""))
    assert read[0] == read[1]


@pytest.mark.parametrize("words", ["resize -f raw NAME +1M", "compare -f raw -F raw NAME PATH", "measure -f raw NAME"])
def test_a_guests_header_is_data_whatever_names_it(guests: Path, words: str) -> None:
    before = guests.read_bytes()
    said = []
    for name in (str(guests), "json:" + json.dumps({"file.filename": str(guests)})):
        places = {"NAME": name, "PATH": str(guests)}
        said.append(qcow2_tool_ok(*(places.get(word, word) for word in words.split())))
        assert guests.read_bytes()[: len(before)] == before
        guests.write_bytes(before)
    assert said[0] == said[1]


def test_the_format_of_a_backing_file_must_be_the_one_that_the_image_names(tmp_path: Path, guests: Path) -> None:
    top = tmp_path / "top"
    qemu_img("create", "-q", "-f", "qcow2", "-b", guests, "-F", "qcow2", top)
    options = f"driver=qcow2,file.filename={top},backing.driver=raw,backing.file.filename={guests}"
    done = qcow2_tool("convert", "-O", "raw", "--image-opts", options, tmp_path / "out")
    assert (done.returncode, "its backing file is qcow2, not raw" in done.stderr) == (1, True), done.stderr


def test_options_of_a_backing_file_must_be_of_the_one_that_the_image_names(tmp_path: Path) -> None:
    for name in ("base", "other"):
        qemu_img("create", "-q", "-f", "qcow2", tmp_path / name, "1M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", tmp_path / "top")

    def said(name: str) -> str:
        options = f"driver=qcow2,file.filename={tmp_path / 'top'},backing.file.filename={tmp_path / name}"
        return qcow2_tool("commit", "--image-opts", options).stderr

    assert "is not its backing file" in said("other")
    assert "is not its backing file" in said("nosuch")
    assert said("base") == ""


def test_the_key_of_an_encrypted_backing_file_is_named_among_the_options(tmp_path: Path) -> None:
    secrets = ["--object", "secret,id=s0,data=zero", "--object", "secret,id=s1,data=one"]
    base, top = tmp_path / "base", tmp_path / "top"
    luks = "encrypt.format=luks,encrypt.iter-time=10,encrypt.key-secret"
    qcow2_tool_ok("create", "-q", *secrets, "-o", f"{luks}=s0", base, "1M")
    qcow2_tool_ok("create", "-q", *secrets, "-o", f"{luks}=s1", "-b", base, "-F", "qcow2", top)
    lower = f"backing.driver=qcow2,backing.file.filename={base},backing.encrypt.key-secret=s0"
    options = f"driver=qcow2,file.filename={top},encrypt.key-secret=s1,{lower}"
    assert qcow2_tool_ok("commit", *secrets, "--image-opts", options) == "Image committed.\n"
