"""docs/recipes.md as it stands, in a directory that has what it speaks of."""

import fcntl
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

import qcow2
from tests.frontend import FrontEnd
from tests.libnbd import binding, needs_binding
from tests.oracle import assert_clean, qemu_img
from tests.program import TIMEOUT, TOOL, Daemon
from vhost import Control

__all__ = ["binding"]  # a fixture

TEXT = (Path(__file__).parents[2] / "docs/recipes.md").read_text()
RECIPES = {
    title: re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)
    for title, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)
}
MIB = 1 << 20


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A disk with a partition from 1 MiB on, in which there is text."""
    qcow2.create(tmp_path / "disk.qcow2", 16 * MIB)
    with qcow2.open(tmp_path / "disk.qcow2", "r+") as disk:
        disk.write(446, struct.pack("<8xII", 2048, 4096))
        disk.write(MIB, b"hello" * 1000)
        disk.write(16 * MIB - 512, b"last" * 128)
    qemu_img("convert", "-O", "raw", tmp_path / "disk.qcow2", tmp_path / "copy.raw")
    return tmp_path


def play(
    title: str,
    place: Path,
    between: Callable[[], None] = lambda: None,
    *,
    hurries: bool = False,
    steps: Sequence[int] = (),
) -> str:
    """Follow the recipe, or those of its *steps*; what it prints. Between two of its pieces something else happens.

    *hurries*: a key takes no seconds to find.
    """
    said = ""
    for number, (language, text) in enumerate([RECIPES[title][step] for step in steps] or RECIPES[title]):
        if number:
            between()
        if hurries:
            text = re.sub(r"encrypt\.(key|new)-secret=", r"encrypt.iter-time=10,\g<0>", text)
        command = [sys.executable, "-W", "error", "-c", text] if language == "python" else ["sh", "-e", "-c", text]
        environment = {"PATH": f"{TOOL.parent}:/usr/bin:/bin:/usr/sbin:/sbin"}
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
        assert (done.returncode, done.stderr if language == "python" else "") == (0, ""), done.stderr
        said += done.stdout
    return said


def test_partition(place: Path) -> None:
    play("Read a partition out of an image", place)
    content = (place / "partition.raw").read_bytes()
    assert content == (b"hello" * 1000).ljust(4096 * 512, b"\0")


@pytest.mark.skipif(shutil.which("debugfs", path="/usr/sbin:/sbin:/usr/bin") is None, reason="no debugfs here")
def test_file_of_a_file_system(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "hello.txt").write_text("hello\n")
    subprocess.run(["/sbin/mke2fs", "-q", "-d", "tree", "raw", "8M"], cwd=tmp_path, check=True, timeout=TIMEOUT)
    qcow2.convert(tmp_path / "raw", tmp_path / "disk.qcow2", source_format="raw")
    play("Copy a file out of a file system, without a mount", tmp_path)
    assert (tmp_path / "hello.txt").read_text() == "hello\n"


def test_clone(place: Path) -> None:
    play("A thin clone", place)
    with qcow2.open(place / "clone.qcow2") as clone:
        assert clone.read(0, 7) == b"another"
        assert clone.read(MIB, 5) == b"hello"
        assert clone.info["backing-filename"] == "disk.qcow2"
    assert (place / "clone.qcow2").stat().st_size < MIB
    qcow2.commit(place / "clone.qcow2")
    with qcow2.open(place / "disk.qcow2") as disk:
        assert disk.read(0, 7) == b"another"
    qcow2.rebase(place / "clone.qcow2", None)
    with qcow2.open(place / "clone.qcow2") as clone:
        assert "backing-filename" not in clone.info
        assert clone.read(MIB, 5) == b"hello"


@pytest.mark.parametrize("growth", [0, MIB + 512, 512 - MIB])
def test_incremental_backup(place: Path, growth: int) -> None:
    def change() -> None:
        with qcow2.open(place / "disk.qcow2", "r+") as disk:
            disk.resize(disk.size + growth, shrink=True)
            disk.write(5 * MIB, b"new" * 100_000)

    play("Incremental backup with a bitmap", place, change)
    assert qcow2.compare(place / "disk.qcow2", place / "monday.qcow2") is None
    assert growth > 0 or (place / "monday.qcow2").stat().st_size < MIB
    with qcow2.open(place / "disk.qcow2") as disk, qcow2.open(place / "monday.qcow2") as copy:
        assert copy.size == disk.size
        assert list(disk.bitmaps.dirty("backup")) == []


def test_encryption(place: Path) -> None:
    for name in ("old", "new"):
        (place / f"{name}.key").write_text(f"{name} passphrase")
    play("Encrypt a disk, and encrypt it anew", place, hurries=True)
    for name in ("encrypted.qcow2", "anew.qcow2"):
        with qcow2.open(place / name, key=b"new passphrase") as disk:
            assert disk.read(0, disk.size) == (place / "copy.raw").read_bytes()
        with pytest.raises(qcow2.WrongKey):
            qcow2.open(place / name, key=b"old passphrase")


def test_shrink(place: Path) -> None:
    with qcow2.open(place / "disk.qcow2", "r+") as disk:
        disk.resize(20 << 30)
    play("Shrink an image", place)
    with qcow2.open(place / "smaller.qcow2") as disk:
        assert disk.size == 10 << 30


def test_compare(place: Path) -> None:
    qcow2.create(place / "clone.qcow2", backing="disk.qcow2")
    with qcow2.open(place / "clone.qcow2", "r+") as clone:
        clone.write(5 * MIB, b"x")
    said = play("Compare two disks", place)
    assert re.fullmatch(r"the same\n\[\(\d+, \d+\)\]\n", said)


def test_event_loop(place: Path) -> None:
    play("Let an event loop go on", place)
    with qcow2.open(place / "disk.qcow2") as disk:
        assert disk.read(512, 4) == b"last"


def test_fsspec(place: Path) -> None:
    assert play("A file system image in pandas, pyarrow or dask", place) == "b'hello'\n"


@pytest.mark.skipif(shutil.which("nbdcopy") is None, reason="no libnbd-bin here")
def test_pull(place: Path) -> None:
    play("Pull a disk over NBD", place)
    assert (place / "pulled.raw").read_bytes() == (place / "copy.raw").read_bytes()


def test_backup_of_a_disk_in_use(place: Path) -> None:
    control = f"--control={place / 'disk.control'}"
    with Daemon(place / "disk.qcow2", control) as daemon, FrontEnd(daemon.socket_path) as guest:
        play("Back up a disk that is in use", place)
        guest.write(0, b"w" * 4096)
    assert (place / "monday.raw").read_bytes() == (place / "copy.raw").read_bytes()


def test_a_backup_each_night(place: Path) -> None:
    with ExitStack() as stack:
        guests: list[FrontEnd] = []

        def pass_a_day() -> None:
            if not guests:
                daemon = stack.enter_context(Daemon(place / "disk.qcow2", f"--control={place / 'disk.control'}"))
                guests.append(stack.enter_context(FrontEnd(daemon.socket_path)))
            else:
                guests[0].write(0, b"w" * 4096)

        play("A backup each night, of what has changed", place, pass_a_day)
    with qcow2.open(place / "night1.qcow2") as disk:
        assert disk.read(0, disk.size) == b"w" * 4096 + (place / "copy.raw").read_bytes()[4096:]
        assert "backing-filename" not in disk.info
    assert not (place / "night0.qcow2").exists()


def test_what_was_tried_is_kept(place: Path) -> None:
    control = f"--control={place / 'disk.control'}"
    with Daemon(place / "disk.qcow2", control) as daemon, FrontEnd(daemon.socket_path) as guest:
        play("Try something, and keep it", place)
        guest.write(0, b"w" * 4096)
        daemon.stop()
    with qcow2.open(place / "disk.qcow2") as disk:
        assert disk.read(0, disk.size) == b"w" * 4096 + (place / "copy.raw").read_bytes()[4096:]


def await_leaving(place: Path) -> None:
    with Control(place / "disk.control") as control:
        while control.status()["connected"]:
            pass


@pytest.mark.parametrize("it_fails", [True, False])
def test_upgrade(place: Path, it_fails: bool) -> None:
    title = "Upgrade a guest, and go back if it fails"
    with Daemon(place / "disk.qcow2", f"--control={place / 'disk.control'}") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            play("Upgrade a guest, and go back if it fails", place, steps=[0])
            guest.write(0, b"w" * 4096)
            if not it_fails:
                play(title, place, steps=[2])
        if it_fails:
            await_leaving(place)
            play(title, place, steps=[1])
        with FrontEnd(daemon.socket_path) as guest:
            was = (place / "copy.raw").read_bytes()[:4096]
            assert guest.read(0, 4096) == (was if it_fails else b"w" * 4096)
        daemon.stop()
    with qcow2.open(place / "disk.qcow2") as disk:
        assert not disk.snapshots
    assert_clean(place / "disk.qcow2")


def test_clone_of_a_disk_in_use(place: Path) -> None:
    control = f"--control={place / 'disk.control'}"
    with Daemon(place / "disk.qcow2", control) as daemon, FrontEnd(daemon.socket_path) as guest:
        play("Clone a disk that is in use", place)
        guest.write(0, b"w" * 4096)
        with qcow2.open(place / "clone.qcow2", "r+") as clone:
            clone.write(MIB, b"clone")
        assert guest.read(MIB, 4096)[:5] == b"hello"
        daemon.stop()
    was = (place / "copy.raw").read_bytes()
    for name, wanted in (("clone.qcow2", was[:MIB] + b"clone" + was[MIB + 5 :]), ("copy.qcow2", was)):
        with qcow2.open(place / name) as disk:
            assert disk.read(0, disk.size) == wanted


@needs_binding
def test_backup_to_another_host(place: Path, binding: None) -> None:
    title = "Back up a running disk to another host"
    with qcow2.open(place / "disk.qcow2", "r+") as disk:
        disk.bitmaps.add("nightly")
    with Daemon(place / "disk.qcow2", f"--control={place / 'disk.control'}") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            play("Back up a running disk to another host", place, steps=[0])
            guest.write(MIB, b"w" * 4096)
            await_server(place / "night0.qcow2")
            play(title, place, steps=[1])
            await_server(place / "night1.qcow2")
            guest.write(0, b"w" * 4096)
        daemon.stop()
    was = (place / "copy.raw").read_bytes()
    for name, wanted in (("night0.qcow2", was), ("night1.qcow2", was[:MIB] + b"w" * 4096 + was[MIB + 4096 :])):
        with qcow2.open(place / name) as disk:
            assert disk.read(0, disk.size) == wanted


def await_server(image: Path) -> None:
    """Until nobody writes to *image*."""
    with image.open("r+b") as file:
        fcntl.fcntl(file, fcntl.F_OFD_SETLKW, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))


def test_what_has_changed_since(place: Path) -> None:
    control = f"--control={place / 'disk.control'}"
    with Daemon(place / "disk.qcow2", control) as daemon, FrontEnd(daemon.socket_path) as guest:
        play("Know what has changed since", place, steps=[0])
        guest.write(MIB, b"w" * 4096)
        assert play("Know what has changed since", place, steps=[1]) == "{'monday': 0, 'tuesday': 65536}\n"


def test_a_disk_moves(place: Path) -> None:
    (place / "elsewhere").mkdir()
    control = f"--control={place / 'disk.control'}"
    with Daemon(place / "disk.qcow2", control) as daemon, FrontEnd(daemon.socket_path) as guest:
        play("Move a disk to another file system", place)
        guest.write(0, b"w" * 4096)
        daemon.stop()
    assert (place / "disk.qcow2").readlink() == place / "elsewhere" / "disk.qcow2"
    with qcow2.open(place / "disk.qcow2") as disk:
        assert disk.read(0, disk.size) == b"w" * 4096 + (place / "copy.raw").read_bytes()[4096:]


def test_every_recipe_has_its_test() -> None:
    tests = (Path(__file__), Path(__file__).parents[1] / "vm" / "test_agent.py")
    played = {title for test in tests for title in re.findall(r'play\("(.*?)"', test.read_text())}
    assert played == set(RECIPES)
