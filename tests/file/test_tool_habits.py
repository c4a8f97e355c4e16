"""What hands that know qemu-img do with the tool, and what a terminal does to it."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import termios
import time
from array import array
from contextlib import suppress
from pathlib import Path

import pytest

import qcow2
from tests.oracle import qemu_img, qemu_io, read_header
from tests.program import DAEMON, TIMEOUT, TOOL, qcow2_tool, qcow2_tool_ok

FEATURE_NAMES = 0x6803F857


def test_options_may_stand_between_the_names(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    qcow2_tool_ok("create", path, "-o", "cluster_size=4k", "1M", "-q")
    assert read_header(path).fields["cluster_bits"] == 12
    qcow2_tool_ok("resize", path, "-q", "2M")
    assert json.loads(qcow2_tool_ok("info", path, "--output", "json"))["virtual-size"] == 2 << 20
    assert "No errors" in qcow2_tool_ok("check", path, "-r", "all")
    assert qcow2_tool("create", path, "1M", "2M").returncode == 1


@pytest.mark.parametrize(
    ("program", "option"), [(TOOL, "--version"), (TOOL, "-V"), (DAEMON, "--version")], ids=["qcow2", "-V", "daemon"]
)
def test_version_is_said(program: Path, option: str) -> None:
    said = subprocess.run([program, option], capture_output=True, text=True, timeout=TIMEOUT)
    assert (said.returncode, said.stdout, said.stderr) == (0, f"{program.name} version {qcow2.__version__}\n", "")


def test_another_module_of_its_name_is_not_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "qcow2.py").write_text("raise SystemExit('not this one')\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}/:{tmp_path}"}
    done = subprocess.run([TOOL, "--version"], env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stdout.partition(" version ")[0]) == (0, "qcow2"), done.stderr


def test_rebase_without_a_look_records_the_format_it_is_given(tmp_path: Path) -> None:
    """QEMU's iotest 031 does so."""
    path = tmp_path / "disk"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    qcow2_tool_ok("rebase", "-u", "-b", "/some/backing/file/path", "-F", "host_device", path)
    info = json.loads(qemu_img("info", "--output=json", path).stdout)
    assert (info["backing-filename"], info["backing-filename-format"]) == ("/some/backing/file/path", "host_device")
    before = path.read_bytes()
    for word in ("", "x" * 16, "a b", "ä", "qcow22"):
        for name in ("b", ""):
            done = qcow2_tool("rebase", "-u", "-b", name, "-F", word, path)
            assert (done.returncode, done.stderr) == (1, f"qcow2: Invalid format name: '{word}'\n")
    assert path.read_bytes() == before


def test_short_last_entry_of_the_feature_names_counts(tmp_path: Path) -> None:
    """QEMU's iotest 036 writes one, for a bit that nobody knows."""
    path = tmp_path / "disk"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    with path.open("r+b") as file:
        head = bytearray(file.read(512))
        head[72] |= 0x80  # incompatible feature bit 63
        entry = b"\0\x3fTest feature"
        head[112:136] = FEATURE_NAMES.to_bytes(4, "big") + len(entry).to_bytes(4, "big") + entry.ljust(16, b"\0")
        head[136:512] = bytes(376)
        file.seek(0)
        file.write(head)
    assert "Test feature" in qcow2_tool("info", path).stderr
    assert "Test feature" in qcow2_tool_ok("dump-header", path)


def test_name_after_two_dashes_is_no_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (
        ("create", "-q", "-f", "qcow2", "--", "-f", "1M"),
        ("resize", "-q", "-f", "qcow2", "--", "-f", "+1M"),
        ("convert", "-O", "raw", "--", "-f", "--quiet"),
        ("compare", "-F", "raw", "-q", "--", "-f", "--quiet"),
        ("bitmap", "--add", "--", "-f", "--"),
        ("info", "--", "-f"),
    ):
        qcow2_tool_ok(*words)
    assert {path.name for path in tmp_path.iterdir()} == {"-f", "--quiet"}
    facts = json.loads(qcow2_tool_ok("info", "--output=json", "--", "-f"))
    assert [each["name"] for each in facts["format-specific"]["data"]["bitmaps"]] == ["--"]
    assert "unrecognized arguments: -b" in qcow2_tool("info", "--", "-f", "-b").stderr


@pytest.mark.parametrize("name", [b"Datentr\xe4ger", "Datenträger".encode(), b"a\nb", b"\xff"])
def test_name_is_printed_as_the_bytes_it_is(tmp_path: Path, name: bytes) -> None:
    base, top = os.fsencode(tmp_path) + b"/" + name, os.fsencode(tmp_path) + b"/top"
    for words in ([b"-f", b"qcow2", base, b"1M"], [b"-f", b"qcow2", b"-b", base, b"-F", b"qcow2", top]):
        subprocess.run([b"qemu-img", b"create", b"-q", *words], check=True)
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "utf-8:strict"}
    for words in ([b"info", base], [b"info", top], [b"map", top], [b"check", base]):
        ours = subprocess.run([os.fsencode(TOOL), *words], capture_output=True, env=environment)
        theirs = subprocess.run([b"qemu-img", *words], capture_output=True)
        assert (ours.returncode, ours.stdout, ours.stderr) == (theirs.returncode, theirs.stdout, b"")
    said = subprocess.run([os.fsencode(TOOL), b"info", b"--output=json", top], capture_output=True, env=environment)
    assert json.loads(said.stdout)["backing-filename"] == base.decode(errors="replace")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_interrupted_create_dies_of_the_signal_and_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    """It waits for a reader of its one line of output, with the file made and not whole."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(writer, True)
    path = tmp_path / "disk"
    with subprocess.Popen([TOOL, "create", path, "1M"], stdout=writer, stderr=subprocess.PIPE, text=True) as process:
        while not path.exists():
            time.sleep(0.001)
        ended = False
        while not ended:  # Python does not see one that comes just before it waits for the pipe
            process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                ended = process.wait(0.1) is not None
        _, said = process.communicate(timeout=TIMEOUT)
    os.close(reader)
    os.close(writer)
    assert (process.returncode, said) == (-number, "")
    assert not path.exists()


ENTERED = """
import os, signal, sys
from qcow2.library.hostfile import created
from qcow2.tool.interruption import run_to_end

def main():
    new = created(sys.argv[1])
    new.__enter__()
    os.kill(os.getpid(), signal.SIGTERM)

run_to_end(main)
"""


def test_a_signal_right_as_a_file_was_made_leaves_nothing(tmp_path: Path) -> None:
    """Nobody has heard yet that it is to be removed: Python hears signals between any two steps."""
    done = subprocess.run([sys.executable, "-c", ENTERED, tmp_path / "disk"], capture_output=True, timeout=TIMEOUT)
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, b"")
    assert not (tmp_path / "disk").exists()


def test_file_names_with_their_protocol_start_where_the_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As QEMU has it; a plain name starts at the image's directory."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for place, fill in ((tmp_path, 0x42), (elsewhere, 0x43)):
        qemu_img("create", "-q", "-f", "qcow2", place / "base", "1M")
        qemu_io(place / "base", f"write -P {fill} 0 1M")
    for name, seen in (("base", b"\x42"), ("file:base", b"\x43")):
        qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "qcow2", tmp_path / "top", "1M")
        monkeypatch.chdir(elsewhere)
        with qcow2.open(tmp_path / "top") as disk:
            assert disk.read(0, 1) == seen


@pytest.mark.parametrize("words", ["create -f raw NAME 1M", "convert source NAME", "dd -f qcow2 if=source of=NAME"])
@pytest.mark.parametrize(
    "name",
    [
        "rbd:img",
        "ssh:img",
        "nbd:localhost:10809",
        "iscsi:img",
        "http:img",
        "gluster+tcp:img",
        "blkdebug::img",
        "json:{}",
    ],
)
def test_name_of_a_protocol_makes_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    qcow2.create("source", 1 << 20)
    done = qcow2_tool(*words.replace("NAME", name).split())
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.endswith(f"does not support image creation; a file is ./{name} or file:{name}\n")
    assert os.listdir() == ["source"]
    for way in (f"./{name}", f"file:{name}"):
        qcow2_tool_ok(*words.replace("NAME", way).split())
        assert sorted(os.listdir()) == sorted(["source", name])
        os.unlink(name)


@pytest.mark.parametrize("words", ["info -f raw NAME", "convert -n source NAME", "convert -f raw NAME copy"])
def test_name_of_a_protocol_opens_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    qcow2.create("source", 1 << 20)
    Path("rbd:img").write_bytes(bytes(1 << 20))
    reason = "Could not open 'rbd:img': Unknown protocol 'rbd'; a file is ./rbd:img or file:rbd:img"
    done = qcow2_tool(*words.replace("NAME", "rbd:img").split())
    assert (done.returncode, done.stderr) == (1, f"qcow2: {reason}\n")
    for way in ("./rbd:img", "file:rbd:img"):
        qcow2_tool_ok(*words.replace("NAME", way).split())


@pytest.mark.parametrize("words", [("info",), ("map",), ("check",), ("info", "--output=json"), ("--help",)])
def test_output_that_goes_nowhere_is_an_error_of_one_line(tmp_path: Path, words: tuple[str, ...]) -> None:
    path = tmp_path / "disk"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    with open("/dev/full", "w") as full:
        done = subprocess.run([TOOL, *words, path], stdout=full, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stderr) == (1, "qcow2: standard output: No space left on device\n")


@pytest.mark.parametrize("words", [("map", "--output=json"), ("info",), ("check", "--help")])
def test_tool_whose_output_nobody_reads_dies_of_it_without_a_word(tmp_path: Path, words: tuple[str, ...]) -> None:
    path = tmp_path / "disk"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([TOOL, *words, path], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")


SHOWING = {  # what shows how far it is, and its exit status for an output that fails
    "compare -p base copy": 3,
    "commit -p top": 1,
    "convert -p top new": 1,
    "rebase -p -b  top": 1,
}
FIRST_LINE = len("    (0.00/100%)\r")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name, more in (("base", ()), ("copy", ()), ("top", ("-b", "base", "-F", "qcow2"))):
        qemu_img("create", "-q", "-f", "qcow2", *more, tmp_path / name, "1M")
        qemu_io(tmp_path / name, "write -P 1 0 1M")
    return tmp_path


@pytest.mark.parametrize("words", SHOWING)
def test_output_that_is_full_on_the_way_is_an_error_of_one_line(images: Path, words: str) -> None:
    limit = 16 << 20
    with (images / "log").open("wb") as log:
        log.seek(limit - FIRST_LINE)
        program = ["prlimit", f"--fsize={limit}", TOOL, *words.split(" ")]
        done = subprocess.run(
            program, stdout=log, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT, cwd=images, check=False
        )
    assert (done.returncode, done.stderr) == (SHOWING[words], "qcow2: standard output: File too large\n")


@pytest.mark.parametrize("words", SHOWING)
def test_tool_whose_reader_leaves_on_the_way_dies_of_it_without_a_word(images: Path, words: str) -> None:
    reader, writer = os.pipe()
    size = fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1)  # as small as it can be
    os.write(writer, bytes(size - FIRST_LINE))
    program = subprocess.Popen([TOOL, *words.split(" ")], stdout=writer, stderr=subprocess.PIPE, text=True, cwd=images)
    os.close(writer)
    held = array("i", [0])
    while held[0] < size and program.poll() is None:  # then it waits for room
        fcntl.ioctl(reader, termios.FIONREAD, held)
    os.close(reader)
    _, said = program.communicate(timeout=TIMEOUT)
    assert (program.returncode, said) == (-signal.SIGPIPE, "")


@pytest.mark.parametrize(
    "words",
    [("info",), ("map",), ("check",), ("dump-header",), ("create", "1M"), ("rebase", "-u", "-b", "b", "-F", "raw")],
)
def test_name_that_is_empty_is_said_as_such(words: tuple[str, ...]) -> None:
    done = qcow2_tool(*words[:1], "", *words[1:])
    assert (done.returncode, done.stderr) == (1, "qcow2: '': No such file or directory\n")


def test_directory_is_said_to_be_one(tmp_path: Path) -> None:
    for words in (("info",), ("map",), ("create", "-q", "-f", "qcow2"), ("check", "-r", "all")):
        assert qcow2_tool(*words, tmp_path, *["1M"] * (words[0] == "create")).stderr == (
            f"qcow2: {tmp_path}: Is a directory\n"
        )
    for writable in (False, True):
        with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
            qcow2.open(tmp_path, writable=writable)


@pytest.mark.parametrize("name", ["a  b", "\x1b[31m", "a\nb\x7f"])
def test_complaint_is_one_line_without_commands_to_the_terminal(name: str) -> None:
    done = qcow2_tool("info", name)
    assert done.stderr == f"qcow2: {re.sub('[^ -~]+', ' ', name)}: No such file or directory\n"


def test_full_disk_is_named(tmp_path: Path) -> None:
    """By the file that does not fit, here by the limit of its size."""
    program = ["prlimit", "--fsize=100000", TOOL, "create", "-q", "-o", "preallocation=full", tmp_path / "disk", "1M"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stderr) == (1, f"qcow2: {tmp_path / 'disk'}: File too large\n")
    assert list(tmp_path.iterdir()) == []
