"""Secrets of a command line: read once, whatever they come from; each key slot is made of one that can open it."""

import subprocess
from pathlib import Path

import pytest

import qcow2
from tests.program import TIMEOUT, TOOL, qcow2_tool

KEY = b"correct horse"
PIPE = ["--object", "secret,id=s0,file=/dev/stdin"]
LUKS = "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10"


def piped(content: bytes, *words: str | Path) -> tuple[int, str]:
    """How the tool ends, and what it complains of, with *content* in a pipe as its standard input."""
    done = subprocess.run([TOOL, *words], input=content, capture_output=True, timeout=TIMEOUT)
    return done.returncode, done.stderr.decode()


def test_a_secret_from_a_pipe_opens_the_source_and_the_target(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    qcow2.create(source, 1 << 20, key=KEY, iter_time=10)
    with qcow2.open(source, key=KEY, writable=True) as disk:
        disk.write(0, b"x" * 512)
    words = ["convert", *PIPE, "-O", "qcow2", "-o", LUKS, source, target]
    assert piped(KEY, *words) == (0, "")
    with qcow2.open(target, key=KEY) as disk:
        assert disk.read(0, 512) == b"x" * 512


def test_a_secret_from_a_pipe_opens_a_chain(tmp_path: Path) -> None:
    base, path = tmp_path / "base", tmp_path / "disk"
    qcow2.create(base, 1 << 20, key=KEY, iter_time=10)
    qcow2.create(path, backing=base, backing_format="qcow2", key=KEY, iter_time=10)
    assert piped(KEY, "convert", *PIPE, "-O", "raw", path, tmp_path / "plain") == (0, "")
    assert (tmp_path / "plain").read_bytes() == bytes(1 << 20)


@pytest.mark.parametrize("words", [["create"], ["convert", "-O", "qcow2"]], ids=lambda words: words[0])
def test_an_empty_secret_makes_no_image(tmp_path: Path, words: list[str]) -> None:
    path = tmp_path / "disk"
    qcow2.create(tmp_path / "source", 1 << 20)
    what = [path, "1M"] if words == ["create"] else [tmp_path / "source", path]
    done = qcow2_tool(*words, "--object", "secret,id=s0,file=/dev/null", "-o", LUKS, *what)
    assert done.returncode == 1
    assert "the passphrase is empty" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not path.exists()


def test_an_empty_secret_opens_no_further_slot(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    qcow2.create(path, 1 << 20, key=KEY, iter_time=10)
    before = path.read_bytes()
    words = ["--object", f"secret,id=s0,data={KEY.decode()}", "--object", "secret,id=new,file=/dev/null"]
    done = qcow2_tool("amend", *words, "-o", "encrypt.state=active,encrypt.new-secret=new", path)
    assert (done.returncode, done.stderr) == (1, "qcow2: the passphrase is empty: anybody could open the key slot\n")
    assert path.read_bytes() == before
