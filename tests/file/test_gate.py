"""What an image names is opened only where the operator lets it; what every disk can do is one protocol."""

import json
import os
import subprocess
from pathlib import Path

import pytest

import qcow2
from qcow2.driver.file import HostFile
from qcow2.engine.image import Image
from qcow2.engine.opened import OpenOptions
from qcow2.node.chain import Chain
from qcow2.node.formats import FORMATS, Format, Outline, register
from qcow2.node.node import Node
from qcow2.node.raw import RawImage
from tests.builder.recipe import Recipe
from tests.builder.writer import build
from tests.ctl import ctl
from tests.frontend import FrontEnd
from tests.program import DAEMON, TIMEOUT, Daemon, qcow2_tool_ok

MIB = 1 << 20
BACKING_FORMAT = 0xE2792ACA


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A base in a directory of its own."""
    base = tmp_path / "elsewhere" / "base.raw"
    base.parent.mkdir()
    base.write_bytes(b"b" * MIB)
    return base


def overlay(tmp_path: Path, name: str) -> Path:
    path = tmp_path / "own" / "disk.qcow2"
    path.parent.mkdir(exist_ok=True)
    build(Recipe(4 * MIB, backing=name, extensions=[(BACKING_FORMAT, b"raw")]), path)
    return path


def test_a_library_without_a_policy_opens_what_is_named(tmp_path: Path, elsewhere: Path) -> None:
    with qcow2.open(overlay(tmp_path, str(elsewhere))) as disk:
        assert disk.read(0, 4) == b"bbbb"


def test_what_lies_beneath_an_allowed_directory_is_opened(tmp_path: Path, elsewhere: Path) -> None:
    path = overlay(tmp_path, "../elsewhere/base.raw")
    for allowed in ([tmp_path / "else", elsewhere.parent], [tmp_path]):
        with qcow2.open(path, allow_files=map(str, allowed)) as disk:
            assert disk.read(0, 4) == b"bbbb"


@pytest.mark.parametrize("kind", ["absolute", "dots", "link", "linked directory", "prefix"])
def test_what_leads_elsewhere_is_refused_on_one_line(tmp_path: Path, elsewhere: Path, kind: str) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "link.raw").symlink_to(elsewhere)
    (own / "sub").symlink_to(elsewhere.parent)
    sibling = tmp_path / "own-too"  # begins as the allowed directory does
    sibling.mkdir()
    os.link(elsewhere, sibling / "base.raw")
    name = {
        "absolute": str(elsewhere),
        "dots": "../elsewhere/base.raw",
        "link": "link.raw",
        "linked directory": "sub/base.raw",
        "prefix": "../own-too/base.raw",
    }[kind]
    path = overlay(tmp_path, name)
    with pytest.raises(qcow2.UnsupportedImage, match=r"^\S+: backing file \S+ is not allowed: \S+ is not in \S+$"):
        qcow2.open(path, allow_files=[str(own)])


def test_a_file_of_the_middle_of_a_chain_is_asked_about_too(tmp_path: Path, elsewhere: Path) -> None:
    middle = overlay(tmp_path, str(elsewhere))
    top = middle.with_name("top.qcow2")
    qcow2_tool_ok("create", "-b", middle, "-F", "qcow2", top)
    with pytest.raises(qcow2.UnsupportedImage, match=r"disk\.qcow2: backing file"):
        qcow2.open(top, allow_files=[str(middle.parent)])


def test_a_json_name_that_says_no_more_than_a_file_is_that_file(tmp_path: Path, elsewhere: Path) -> None:
    file = {"driver": "file", "filename": str(elsewhere), "locking": "auto"}
    path = overlay(tmp_path, f"json:{json.dumps({'driver': 'raw', 'file': file, 'discard': 'unmap'})}")
    with qcow2.open(path) as disk:
        assert disk.read(0, 512) == b"b" * 512
    done = subprocess.run(["qemu-io", "-r", "-c", "read -P 0x62 0 512", path], capture_output=True, text=True)
    assert "read 512/512" in done.stdout, done
    with pytest.raises(qcow2.UnsupportedImage, match="not allowed"):
        qcow2.open(path, allow_files=[str(path.parent)])


@pytest.mark.parametrize(
    "name",
    [
        "json:{}",
        'json:{"filename": "a\\u0000"}',
        'json:{"filename": "\\ud800"}',
        'json:{"driver": "nbd", "filename": "a"}',
        'json:{"driver": "raw", "file": {"filename": "a"}, "offset": 512}',
        'json:["filename"]',
        'json:{"a":' + '{"a":' * 150,
        "nbd://host/disk",
        "ssh:host",
    ],
)
def test_what_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    path = overlay(tmp_path, name)
    with pytest.raises(qcow2.UnsupportedImage, match="not supported"):
        qcow2.open(path)


def test_a_file_that_is_not_there_is_not_told_apart_from_one_that_is(tmp_path: Path, elsewhere: Path) -> None:
    path = overlay(tmp_path, str(elsewhere.with_name("secret")))
    with pytest.raises(qcow2.UnsupportedImage, match="not allowed"):
        qcow2.open(path, allow_files=[str(path.parent)])


def test_a_daemon_opens_what_is_allowed(tmp_path: Path, elsewhere: Path) -> None:
    path = overlay(tmp_path, str(elsewhere))
    with (
        Daemon(path, "--sandbox", f"--allow-files={elsewhere.parent}") as daemon,
        FrontEnd(daemon.socket_path) as front_end,
    ):
        assert front_end.read(0, 512) == b"b" * 512


@pytest.mark.parametrize("options", [("--sandbox",), ("--allow-files=/nonexistent",)])
def test_a_daemon_refuses_what_is_not(tmp_path: Path, elsewhere: Path, options: tuple[str, ...]) -> None:
    path = overlay(tmp_path, str(elsewhere))
    command = [DAEMON, f"--blk-file={path}", f"--socket-path={path}.sock", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "is not allowed" in done.stderr


def test_a_backup_lies_over_no_chain_that_is_not_allowed(tmp_path: Path, elsewhere: Path) -> None:
    before = overlay(tmp_path, str(elsewhere))
    image = before.with_name("served.qcow2")
    qcow2.create(image, 4 * MIB)
    with qcow2.open(image, "r+") as disk:
        disk.bitmaps.add("nightly")
    options = (f"--control={image}.control", f"--allow-files={image.parent}")
    with Daemon(image, *options) as daemon, FrontEnd(daemon.socket_path):
        done = ctl(image, "backup", "--bitmap=nightly", f"--backing={before.name}", "copy")
        assert (done.returncode, done.stdout) == (1, "")
        assert f"{before}: backing file '{elsewhere}' is not allowed" in done.stderr
        daemon.stop()
    assert not image.with_name("copy").exists()


def test_backups_of_each_night_may_lie_over_one_another_elsewhere(tmp_path: Path) -> None:
    image, nights = tmp_path / "disks" / "served.qcow2", tmp_path / "backups"
    for path in (image.parent, nights):
        path.mkdir()
    qcow2.create(image, 4 * MIB)
    with qcow2.open(image, "r+") as disk:
        disk.bitmaps.add("nightly")
    options = (f"--control={image}.control", f"--allow-files={image.parent}")
    with Daemon(image, *options) as daemon, FrontEnd(daemon.socket_path):
        wanted: list[list[str]] = [[], *(["--bitmap=nightly", f"--backing={n}"] for n in "012")]
        for number, how in enumerate(wanted):
            assert ctl(image, "backup", *how, str(nights / str(number))).returncode == 0
            assert ctl(image, "job", "wait", str(number + 1)).returncode == 0
        daemon.stop()
    with qcow2.open(nights / "3") as disk:
        assert len(disk.files) == 4


class Ours(RawImage):
    """A disk of a format of a user's own."""


def test_a_registered_format_is_opened_and_put_under_an_overlay(tmp_path: Path) -> None:
    def begin(chain: Chain, file: HostFile, options: OpenOptions) -> Node:
        return Ours(file, MIB, read_only=not options.writable)

    (tmp_path / "base.ours").write_bytes(b"o" * MIB)
    build(Recipe(MIB, backing="base.ours", extensions=[(BACKING_FORMAT, b"ours")]), path := tmp_path / "disk.qcow2")
    with pytest.raises(qcow2.UnsupportedImage, match="format 'ours' is not supported, only qcow2 and raw"):
        qcow2.open(path)
    register(Format("ours", begin, lambda file: Outline(MIB, 0)))
    try:
        with qcow2.open(path, writable=True) as disk:
            disk.write(0, b"new")
            assert disk.read(0, 5) == b"newoo"
            assert isinstance(disk.chain.nodes[1], Ours)
        with pytest.raises(ValueError, match="already"):
            register(FORMATS["ours"])
    finally:
        del FORMATS["ours"]


def nodes() -> list[type[Node]]:
    """Accepted by the type checker, which is the test."""
    return [Image, RawImage]
