"""What a daemon that died left beside an image goes with the next start, unless it may be somebody's."""

import errno
import os
from pathlib import Path

import pytest

import qcow2
from qcow2.driver.file import HostFile
from qcow2.engine.create import Options as ImageOptions
from qcow2.lock import lock_image
from qcow2.node.pivot import NewFile, Pivot
from tests.oracle import assert_clean
from vhost.backuptarget import BackupFile
from vhost.held import HeldImage
from vhost.option import Options

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    qcow2.create(path, size=MIB)
    return path


def take(image: Path, *, read_only: bool = False) -> set[str]:
    """Hold it as a daemon does when it starts -> what is beside it then, under hidden names."""
    with HeldImage(Options(blk_file=str(image), read_only=read_only)) as held:
        held.take()
        return {path.name for path in image.parent.iterdir() if path.name.startswith(".")}


def test_a_target_that_cannot_be_made_is_gone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="limit"):
        BackupFile(str(tmp_path / "copy"), ImageOptions(1 << 62), "qcow2", exists=False, keys=None)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_was_not_stable_is_synced_again(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = [OSError(errno.EIO, "the directory")]
    fsync, synced = os.fsync, []

    def failing_once(fd: int) -> None:
        if outcomes:
            raise outcomes.pop()
        fsync(fd)
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))

    new = NewFile(str(image.with_name("copy")), str(image.parent), "qcow2")
    with HostFile.open(str(image), writable=False) as like:
        new.make(like, lambda file: None)
    monkeypatch.setattr(os, "fsync", failing_once)
    with pytest.raises(OSError):
        new.name()
    new.name()
    assert synced == [str(image.parent)]
    assert sorted(os.listdir(image.parent)) == ["copy", "disk"]


@pytest.fixture
def lying(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does what it is asked to rename, and says that it has failed."""
    rename = os.rename

    def done_and_failed(old: str, new: str) -> None:
        rename(old, new)
        raise OSError(errno.EIO, "the answer")

    monkeypatch.setattr(os, "rename", done_and_failed)


@pytest.mark.usefixtures("lying")
@pytest.mark.parametrize("what", ["overlay", "pivot"])
def test_what_is_served_keeps_a_name(image: Path, what: str) -> None:
    copy = image.with_name("copy")
    qcow2.create(copy, size=MIB)
    with HeldImage(Options(blk_file=str(image))) as held, HostFile.open(str(copy), writable=False) as file:
        held.take()
        assert held.disk is not None
        served = held.disk.files[0]
        if what == "overlay":
            overlay = held.prepare_overlay("frozen", {})
            overlay.name_frozen()
            with pytest.raises(OSError):
                overlay.switch()
            held.discard_overlay(overlay)
        else:
            pivot = Pivot(str(image), served, str(copy), file)
            pivot.prepare()
            pivot.switch()  # looks, and finds that it was done
            pivot.sync()
            assert os.path.samestat(image.stat(), os.fstat(file.fd))
        assert [path for path in image.parent.iterdir() if path.stat().st_ino == os.fstat(served.fd).st_ino]


def test_a_base_that_failed_leaves_the_image_clean_and_free(image: Path) -> None:
    top = image.with_name("top")
    qcow2.create(top, backing="disk")
    with HeldImage(Options(blk_file=str(top))) as held:
        held.take()
        assert held.disk is not None
        opened = held.prepare_writer(held.disk.chain.nodes[1], MIB)
        for close in held.adopt_writer(opened):
            close()
        held.disk.write(0, b"kept")
        opened.node.fail(OSError(errno.EIO, "a sync"))
        held.let_go()
        assert held.disk is None
    assert_clean(top)
    with qcow2.open(top, "r+") as disk:
        assert disk.read(0, 4) == b"kept"


@pytest.mark.parametrize("is_link", [False, True])
def test_names_that_a_death_left_are_gone(image: Path, is_link: bool) -> None:
    qcow2.create(image.with_name(".disk.overlay"), size=MIB, backing=image)
    copy, pivot = image.with_name("copy"), image.with_name(".disk.pivot")
    qcow2.create(copy, size=MIB)
    pivot.symlink_to(copy) if is_link else pivot.hardlink_to(copy)
    assert take(image, read_only=True) == {".disk.overlay", ".disk.pivot"}
    assert take(image) == set()
    assert copy.exists()


def test_name_of_what_is_served_goes_and_its_log_stays(image: Path) -> None:
    """As a death in the middle of calling off a snapshot leaves it."""
    image.with_name(".disk.overlay").hardlink_to(image)
    assert take(image) == set()
    assert image.stat().st_nlink == 1


def test_what_may_be_somebodys_stays(image: Path) -> None:
    image.with_name(".disk.pivot").write_bytes(b"the only name of this file")
    image.with_name(".disk.overlay").mkdir()
    assert take(image) == {".disk.overlay", ".disk.pivot"}
    with HeldImage(Options(blk_file=str(image))) as held:
        held.take()
        with pytest.raises(FileExistsError, match="in the way"):
            held.prepare_overlay("frozen", {})


SOMEBODYS = [b"notes of mine\n", b"\x7fELF", b"QFI\xfb but no more", b"\xebx\x90MSDOS"]


@pytest.mark.parametrize("content", SOMEBODYS, ids=["text", "program", "magic alone", "sector"])
def test_file_of_somebody_stays_whatever_its_name(image: Path, content: bytes) -> None:
    names = [".disk.overlay", ".copy.mirror", ".copy.backup"]
    for name in names:
        image.with_name(name).write_bytes(content)
    assert take(image) == set(names)
    target = str(image.with_name("copy"))
    with HeldImage(Options(blk_file=str(image))) as held:
        held.take()
        with pytest.raises(FileExistsError, match="in the way"):
            held.prepare_overlay("frozen", {})
    with HostFile.open(str(image)) as like, pytest.raises(FileExistsError, match="may be a copy of ours"):
        NewFile(target, str(image.parent), "qcow2").make(like, lambda file: None)
    with pytest.raises(FileExistsError, match="in the way, and may be a copy of ours: move or remove it"):
        BackupFile(target, ImageOptions(MIB), "qcow2", exists=False, keys=None)
    assert [image.with_name(name).read_bytes() for name in names] == [content] * 3


def test_disk_of_its_own_is_no_overlay_that_a_death_left(image: Path) -> None:
    qcow2.create(image.with_name(".disk.overlay"), size=MIB)
    assert take(image) == {".disk.overlay"}


@pytest.mark.parametrize("nbytes", [0, 4, 512])
def test_image_that_a_death_left_before_its_first_sector_goes(image: Path, nbytes: int) -> None:
    """It has none yet, or, being encrypted, all but the magic."""
    for name in (".disk.overlay", ".copy.mirror", ".copy.backup"):
        path = image.with_name(name)
        qcow2.create(path, size=MIB, backing=image)
        path.write_bytes((bytes(nbytes) + path.read_bytes()[nbytes:]) if nbytes else b"")
    assert take(image) == {".copy.mirror", ".copy.backup"}
    target = str(image.with_name("copy"))
    with HostFile.open(str(image)) as like:
        new = NewFile(target, str(image.parent), "qcow2")
        new.make(like, lambda file: None)
        new.discard()
    BackupFile(target, ImageOptions(MIB), "qcow2", exists=False, keys=None).close()
    assert sorted(os.listdir(image.parent)) == ["disk"]


def test_file_of_somebody_is_no_pivot_that_a_death_left(image: Path) -> None:
    copy, pivot = image.with_name("copy"), image.with_name(".disk.pivot")
    qcow2.create(copy, size=MIB)
    pivot.write_bytes(b"the only name of this file")
    with HeldImage(Options(blk_file=str(image))) as held, HostFile.open(str(copy)) as file:
        held.take()
        assert held.disk is not None
        with pytest.raises(FileExistsError, match="in the way"):
            Pivot(str(image), held.disk.files[0], str(copy), file).prepare()
    assert pivot.exists()


def test_overlay_that_is_in_use_stays(image: Path) -> None:
    overlay = image.with_name(".disk.overlay")
    qcow2.create(overlay, size=MIB)
    with qcow2.open(overlay, "r+"):
        assert take(image) == {overlay.name}


def test_copies_that_a_death_left_are_named_once(image: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in (".one.backup", ".two.mirror", ".three.backup", "four.backup"):
        (image.parent / name).write_bytes(b"")
    (image.parent / ".five.backup").mkdir()
    with HostFile.open(str(image.parent / ".three.backup"), writable=True) as used:
        lock_image(used.fd, used.path, writable=True)  # by a backup that is under way
        with HeldImage(Options(blk_file=str(image))) as held:
            for _ in range(2):
                held.take()
                held.end()
    named = [record.getMessage().partition(":")[0] for record in caplog.records]
    assert named == [str(image.parent / name) for name in (".one.backup", ".two.mirror")]


def test_link_of_a_copy_names_what_is_there(tmp_path: Path) -> None:
    from vhost.problem import describe

    (tmp_path / "one").touch()
    (tmp_path / "two").touch()
    with pytest.raises(FileExistsError) as caught:
        os.link(tmp_path / "one", tmp_path / "two")
    assert describe(caught.value) == f"{tmp_path / 'two'}: File exists"


@pytest.mark.parametrize("name", [".disk.overlay", ".copy.mirror", ".copy.backup", ".disk.pivot"])
def test_nothing_that_shall_stay_gets_such_a_name(image: Path, name: str) -> None:
    target = str(image.with_name(name))
    with HeldImage(Options(blk_file=str(image))) as held:
        held.take()
        with pytest.raises(ValueError, match="taken for what a death left"):
            held.prepare_overlay(name, {})
    with pytest.raises(ValueError, match="taken for what a death left"):
        NewFile(target, str(image.parent), "qcow2")
    with pytest.raises(ValueError, match="taken for what a death left"):
        BackupFile(target, ImageOptions(MIB), "qcow2", exists=False, keys=None)
    assert not os.path.lexists(target)
