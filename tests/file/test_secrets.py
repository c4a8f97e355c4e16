"""Secrets of a command line: read once, whatever they come from; each key slot is made of one that can open it."""

import subprocess
from pathlib import Path

import pytest

import qcow2
from tests.frontend import FrontEnd
from tests.oracle import ask_qemu
from tests.program import TIMEOUT, TOOL, Daemon, qcow2_tool, qcow2_tool_ok

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


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a\0b"])
def test_a_passphrase_that_qemu_never_takes_is_told_of(tmp_path: Path, content: bytes) -> None:
    path, copy, plain = (tmp_path / name for name in ("disk", "copy", "plain"))
    (tmp_path / "key").write_bytes(content)
    (tmp_path / "other").write_bytes(KEY)
    secrets = [word for name in ("key", "other") for word in ("--object", f"secret,id={name},file={tmp_path / name}")]
    said = "qcow2: warning: the secret 'key' is not UTF-8, or has a NUL byte: QEMU will not open this image with it\n"
    wanted = LUKS.replace("s0", "key")
    for words in (
        ["create", "-q", "-o", wanted, path, "1M"],
        ["convert", "-O", "qcow2", "-o", wanted, path, copy],
        ["amend", "-o", "encrypt.state=active,encrypt.new-secret=key,encrypt.iter-time=10", copy],
    ):
        done = qcow2_tool(*words[:1], *secrets, *words[1:])
        assert (done.returncode, done.stderr) == (0, said)
    done = qcow2_tool("convert", *secrets, "-O", "raw", path, plain)
    assert (done.returncode, done.stderr) == (0, "")
    qemu_img = tmp_path / "qemu-img"
    qemu_img.symlink_to(TOOL)
    command = [qemu_img, "create", "-q", *secrets, "-f", "qcow2", "-o", wanted, tmp_path / "new", "1M"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert refused.returncode == 1
    assert refused.stderr.endswith("Data from secret key is not valid UTF-8\n")
    assert not (tmp_path / "new").exists()


# -- legacy AES: nothing in the image tells a wrong key from the right one

CONTENT = b"Z" * 1024 + bytes((1 << 20) - 1024)
SECRETS = ["--object", "secret,id=new,data=new", "--object", "secret,id=old,data=old"]
UNNAMED = "2 keys are given, and legacy AES tells no wrong one"


@pytest.fixture
def legacy(tmp_path: Path) -> Path:
    """An image of QEMU's, with the key "old"."""
    path = tmp_path / "legacy"
    how = ["--object", "secret,id=s0,data=old"]
    wanted = ["-o", "encrypt.format=aes,encrypt.key-secret=s0"]
    opts = f"driver=qcow2,file.filename={path},encrypt.format=aes,encrypt.key-secret=s0"
    for command in (
        ["qemu-img", "create", "-q", *how, "-f", "qcow2", *wanted, path, "1M"],
        ["qemu-io", *how, "-c", "write -q -P 0x5a 0 1k", "--image-opts", opts],
    ):
        assert ask_qemu(command).returncode == 0
    return path


def test_of_several_secrets_legacy_aes_takes_the_one_that_is_named(tmp_path: Path, legacy: Path) -> None:
    target, plain = tmp_path / "target", tmp_path / "plain"
    opts = f"driver=qcow2,file.filename={legacy},encrypt.key-secret=old"
    wanted = LUKS.replace("s0", "new")
    qcow2_tool_ok("convert", *SECRETS, "-O", "qcow2", "-o", wanted, "--image-opts", opts, target)
    with qcow2.open(target, key=b"new") as disk:
        assert disk.read(0, disk.size) == CONTENT
    top = tmp_path / "top"
    qcow2_tool_ok("create", "-q", *SECRETS, "-o", wanted, "-b", legacy.name, "-F", "qcow2", top)
    opts = f"driver=qcow2,file.filename={top},encrypt.key-secret=new"
    below = f"backing.driver=qcow2,backing.file.filename={legacy},backing.encrypt.key-secret=old"
    qcow2_tool_ok("convert", *SECRETS, "-O", "raw", "--image-opts", f"{opts},{below}", plain)
    assert plain.read_bytes() == CONTENT


def test_of_several_secrets_legacy_aes_takes_none_that_is_not_named(tmp_path: Path, legacy: Path) -> None:
    done = qcow2_tool("convert", *SECRETS, "-O", "raw", legacy, tmp_path / "plain")
    assert done.returncode == 1
    assert UNNAMED in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "plain").exists()
    with pytest.raises(qcow2.WrongKey, match=UNNAMED):
        qcow2.open(legacy, key=[b"new", b"old"])


def test_of_several_keys_the_daemon_takes_the_first_for_legacy_aes(tmp_path: Path, legacy: Path) -> None:
    """It has no way to name one, and a chain may need two."""
    top = tmp_path / "top"
    wanted = LUKS.replace("s0", "new")
    qcow2_tool_ok("create", "-q", *SECRETS, "-o", wanted, "-b", legacy.name, "-F", "qcow2", top)
    for name in ("old", "new"):
        (tmp_path / name).write_text(name)
    keys = [f"--key-file={tmp_path / name}" for name in ("old", "new")]
    with Daemon(top, *keys) as daemon, FrontEnd(daemon.socket_path) as guest:
        assert guest.read(0, len(CONTENT[:2048])) == CONTENT[:2048]
        daemon.stop()


def test_an_image_opens_with_the_secret_that_its_options_name_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    qcow2.create(path, 1 << 20, key=b"old", iter_time=10)
    for name, status in (("old", 0), ("new", 1), ("none", 1)):
        opts = f"driver=qcow2,file.filename={path},encrypt.key-secret={name}"
        done = qcow2_tool("convert", *SECRETS, "-O", "raw", "--image-opts", opts, tmp_path / "plain")
        assert done.returncode == status, done.stderr
