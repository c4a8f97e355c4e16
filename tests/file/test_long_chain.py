"""A chain as long as the next open allows: nothing that is asked of a daemon makes it longer, or too much to serve."""

from collections.abc import Callable
from pathlib import Path

import pytest

import qcow2
from qcow2.node.gate import MAX_DEPTH
from tests.ctl import ctl, told
from tests.frontend import FrontEnd
from tests.program import Daemon, qcow2_tool

SIZE = 1 << 20
FULL = f"a chain of {MAX_DEPTH} files, and more than {MAX_DEPTH} do not open: commit or stream first"


def make_chain(directory: Path, nfiles: int, *, with_data_files: Callable[[int], bool]) -> Path:
    """-> the top of *nfiles*, number 0 at the bottom."""
    for number in range(nfiles):
        data_file = f"{number}.data" if with_data_files(number) else None
        backing = f"{number - 1}" if number else None
        qcow2.create(directory / f"{number}", None if number else SIZE, backing=backing, data_file=data_file)
    return directory / f"{nfiles - 1}"


@pytest.fixture
def full(tmp_path: Path) -> Path:
    return make_chain(tmp_path, MAX_DEPTH, with_data_files=lambda number: not number)


def serve(image: Path) -> Daemon:
    return Daemon(image, f"--control={image}.control")


def test_a_data_file_is_no_file_of_the_chain(full: Path) -> None:
    with qcow2.open(full) as disk:
        assert len(disk.files) == MAX_DEPTH + 1


@pytest.mark.parametrize("command", [("snapshot", "frozen"), ("commit", "--active", "--base=1")])
def test_what_would_make_it_longer_is_refused_and_the_guest_goes_on(full: Path, command: tuple[str, ...]) -> None:
    with serve(full) as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            done = ctl(full, *command)
            assert (done.returncode, done.stdout) == (1, "")
            assert done.stderr.rstrip("\n").endswith(FULL)
            guest.write(0, b"1" * 512)
        with FrontEnd(daemon.socket_path) as guest:  # nobody held the image in between
            told(full, "commit", "--base=90", "--wait")
            told(full, "snapshot", "frozen")
            assert guest.read(0, 512) == b"1" * 512
        daemon.stop()
    assert full.with_name("frozen").exists()


def test_a_backup_over_it_is_refused(full: Path, tmp_path: Path) -> None:
    image = tmp_path / "disk"
    qcow2.create(image, SIZE)
    with qcow2.open(image, "r+") as disk:
        disk.bitmaps.add("nightly")
    with serve(image) as daemon, FrontEnd(daemon.socket_path):
        done = ctl(image, "backup", "--bitmap=nightly", f"--backing={full.name}", "copy")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.rstrip("\n").endswith(FULL)
        daemon.stop()
    assert not (tmp_path / "copy").exists()


def test_a_mirror_that_takes_more_files_than_a_worker_has_is_refused(tmp_path: Path) -> None:
    image = make_chain(tmp_path, 65, with_data_files=lambda number: number < 64)
    with serve(image) as daemon, FrontEnd(daemon.socket_path) as guest:
        done = ctl(image, "mirror", "--top", "copy")
        assert (done.returncode, done.stdout) == (1, "")
        assert "256 files" in done.stderr
        guest.write(0, b"1" * 512)
        told(image, "snapshot", "frozen")
        daemon.stop()
    assert not [path for path in tmp_path.iterdir() if "copy" in path.name]


@pytest.fixture
def disk(full: Path) -> Path:
    (full.parent / "disk").write_bytes(bytes(SIZE))
    return full.parent / "disk"


@pytest.mark.parametrize("command", ["create -f qcow2", "convert -f raw -O qcow2 {disk}"])
def test_no_new_image_lies_over_it(disk: Path, full: Path, command: str) -> None:
    verb, *words = command.format(disk=disk).split()
    done = qcow2_tool(verb, "-b" if verb == "create" else "-B", full, "-F", "qcow2", *words, disk.with_name("new"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.rstrip("\n").endswith(FULL)
    assert not disk.with_name("new").exists()


def test_what_is_there_is_left_where_a_new_image_would_not_open(disk: Path, full: Path) -> None:
    disk.write_bytes(b"precious")
    with pytest.raises(qcow2.UnsupportedImage, match=FULL):
        qcow2.create(disk, backing=full)
    assert disk.read_bytes() == b"precious"


def test_no_image_is_put_over_it(full: Path) -> None:
    image = full.with_name("new")
    qcow2.create(image, backing="98")
    before = image.read_bytes()
    done = qcow2_tool("rebase", "-f", "qcow2", "-b", full, "-F", "qcow2", image)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.rstrip("\n").endswith(FULL)
    with pytest.raises(qcow2.UnsupportedImage, match=FULL):
        qcow2.rebase(image, full)
    assert image.read_bytes() == before


def test_a_chain_of_one_file_less_takes_one_more(full: Path) -> None:
    image = full.with_name("new")
    qcow2.create(image, backing="98")
    qcow2.rebase(image, "97")
    qcow2.rebase(image, "98")
    with qcow2.open(image) as disk:
        assert len(disk.files) == MAX_DEPTH + 1
