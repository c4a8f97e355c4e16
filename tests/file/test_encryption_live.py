"""What is made of an encrypted disk while it is served: encrypted as that is, opened by the same key, with its own."""

import resource
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import qcow2
from tests.file.test_encryption_daemon import KEY, LUKS, PATTERN, SIZE, holds_pattern, image, key, logs, use
from tests.file.test_mirror import until
from tests.frontend import FrontEnd
from tests.program import Daemon, qcow2_tool_ok
from vhost import Control, ControlError
from vhost.client import Job

__all__ = ["image", "key", "logs"]  # fixtures
BASE = (PATTERN[::-1] * (2 << 14))[: 2 << 20]  # as under the image
OTHER = b"another key, which opens nothing here"


class Guest:
    """Writes to the disk at *path* and knows what it holds; a daemon of those *options* serves it."""

    def __init__(self, path: Path, key: Path, logs: Path, *options: str) -> None:
        other = path.parent / "other"
        other.write_bytes(OTHER)
        keys = f"--key-file={other}", f"--key-file={key}"  # the second is the one that opens it
        self._path, self._options = path, (*keys, f"--link-log={logs}", f"--control={path}.control", *options)
        self._logs = logs
        self.model = bytearray(BASE.ljust(SIZE, bytes(1)))

    def __enter__(self) -> "Guest":
        with ExitStack() as stack:
            self._daemon = stack.enter_context(Daemon(self._path, *self._options))
            self._front_end = stack.enter_context(FrontEnd(self._daemon.socket_path))
            self.control = stack.enter_context(Control(f"{self._path}.control"))
            self._closing = stack.pop_all()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._closing.__exit__(*exc_info)

    def end(self) -> None:
        """Of the daemon, a clean one."""
        self._daemon.stop()

    def finish(self, job: Job) -> None:
        """Wait until it has."""
        ended = self.control.wait(job.job)
        assert ended.state == "completed", ended

    @contextmanager
    def without_room(self) -> Iterator[None]:
        """No file takes anything from the daemon meanwhile."""
        pid = self._daemon.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, before[1]))
        try:
            yield
        finally:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, before)

    def work(self, seed: int) -> bytes:
        """Write anywhere -> what the disk holds. Nothing of it is in a file as it is."""
        use(self._front_end, self.model, seed)
        files = [*self._path.parent.iterdir(), *self._logs.rglob("*")]
        assert [path.name for path in files if path.is_file() and holds_pattern(path)] == []
        return bytes(self.model)


def content(path: Path) -> bytes:
    with qcow2.open(path, key=KEY) as disk:
        return disk.read(0, disk.size)


def master_key_of(path: Path) -> str:
    """What tells it from another: the salt of its digest goes with it."""
    with qcow2.open(path, key=KEY) as disk:
        return str(disk.info["format-specific"]["data"]["encrypt"]["uuid"])


@pytest.fixture
def guest(request: pytest.FixtureRequest, image: Path, key: Path, logs: Path) -> Iterator[Guest]:
    with Guest(image, key, logs, *request.param) as guest:
        yield guest


@pytest.mark.parametrize("guest", [("--sandbox", "--cache=writethrough")], indirect=True, ids=" ".join)
def test_snapshots_are_streamed_and_committed(image: Path, guest: Guest) -> None:
    frozen = []
    for number in range(3):
        frozen.append(guest.work(number))
        guest.control.snapshot(f"then{number}")
    now = guest.work(3)
    for number, then in enumerate(frozen):
        assert content(image.parent / f"then{number}") == then
    guest.finish(guest.control.commit("then1"))
    guest.finish(guest.control.stream())
    assert guest.work(4) != now
    assert content(image.parent / "then0") == frozen[0]
    assert len({master_key_of(image.parent / name) for name in ("then0", "then1", "then2")}) == 3
    guest.end()
    assert content(image) == guest.model


@pytest.mark.parametrize("base", [None, "plain"])
def test_nothing_is_committed_to_a_base_in_plain(tmp_path: Path, key: Path, logs: Path, base: str | None) -> None:
    plain, image = tmp_path / "plain", tmp_path / "disk.qcow2"
    qcow2.create(plain, SIZE)
    qcow2_tool_ok("create", "-q", "--object", f"secret,id=s0,file={key}", "-o", LUKS, "-b", plain, "-F", "qcow2", image)
    before = plain.read_bytes()
    with Guest(image, key, logs) as guest:
        for is_frozen in (False, True):
            if is_frozen:
                guest.control.snapshot("frozen")
            with pytest.raises(ControlError, match="plain: is not encrypted: it would hold in plain"):
                guest.control.commit(base, active=not is_frozen)
        guest.end()
    assert plain.read_bytes() == before
    assert not image.with_name(f"{image.name}.committing").exists()


@pytest.mark.parametrize("guest", [(), ("--sandbox",)], indirect=True, ids=" ".join)
def test_backups_are_full_and_by_bitmap(image: Path, guest: Guest) -> None:
    guest.control.bitmaps.add("nightly")
    full = guest.work(1)
    guest.finish(guest.control.backup("night0"))
    guest.control.bitmaps.clear("nightly")
    changed = guest.work(2)
    guest.finish(guest.control.backup("night1", bitmap="nightly", backing="night0"))
    guest.work(3)
    assert content(image.parent / "night0") == full
    assert content(image.parent / "night1") == changed
    with pytest.raises(ControlError, match="encrypted: a raw backup would hold it in plain"):
        guest.control.backup("plain", format="raw")
    assert not (image.parent / "plain").exists()


@pytest.mark.parametrize("guest", [()], indirect=True)
def test_a_backup_that_cannot_be_begun_is_refused_and_the_guest_goes_on(image: Path, guest: Guest) -> None:
    there = image.parent / "there"
    there.write_bytes(bytes(SIZE))
    with guest.without_room(), pytest.raises(ControlError, match="File too large"):
        guest.control.backup("there", existing=True)
    then = guest.work(1)
    guest.finish(guest.control.backup("there", existing=True))
    guest.work(2)
    assert content(there) == then


@pytest.mark.parametrize("guest", [("--cache=none",)], indirect=True, ids=" ".join)
def test_a_mirror_takes_its_place(image: Path, guest: Guest) -> None:
    guest.work(1)
    with pytest.raises(ControlError, match="encrypted: a raw copy would hold it in plain"):
        guest.control.mirror("copy", "raw")
    qcow2_tool_ok("create", "-q", image.parent / "plain", str(SIZE))
    with pytest.raises(ControlError, match="not encrypted, as the disk is"):
        guest.control.mirror("plain", existing=True)
    job = guest.control.mirror("copy").job
    until(guest.control, job, "ready")
    guest.work(2)
    guest.finish(guest.control.complete(job))
    guest.work(3)
    guest.end()
    assert content(image.parent / "copy") == content(image) == guest.model


def test_a_raw_luks_disk_is_backed_up_encrypted(tmp_path: Path, key: Path, logs: Path) -> None:
    disk = tmp_path / "disk.luks"
    words = ["--object", f"secret,id=s0,file={key}", "-o", LUKS.replace("encrypt.", "").removeprefix("format=luks,")]
    qcow2_tool_ok("create", "-q", "-f", "luks", *words, disk, str(SIZE))
    with qcow2.open(disk, key=KEY, format="luks", writable=True) as new:
        new.write(0, BASE.ljust(SIZE, bytes(1)))
    with Guest(disk, key, logs, "--format=luks") as guest:
        then = guest.work(1)
        guest.finish(guest.control.backup("copy"))
        guest.work(2)
    assert content(tmp_path / "copy") == then


@pytest.fixture
def overlay(image: Path) -> Path:
    """One in plain, which has nothing of its own, over the encrypted image."""
    path = image.parent / "overlay.qcow2"
    qcow2.create(path, SIZE, backing=image.name, backing_format="qcow2")
    return path


def test_what_shows_through_a_plain_overlay_is_copied_encrypted(overlay: Path, key: Path, logs: Path) -> None:
    then = BASE.ljust(SIZE, b"\0")
    with Guest(overlay, key, logs) as guest:
        guest.finish(guest.control.backup("backup"))
        job = guest.control.mirror("copy").job
        until(guest.control, job, "ready")
        guest.finish(guest.control.complete(job))
        guest.end()
    for name in ("backup", "copy"):
        assert not holds_pattern(overlay.parent / name)
        assert content(overlay.parent / name) == then
    assert master_key_of(overlay) == master_key_of(overlay.parent / "copy")


def test_what_shows_through_a_plain_overlay_is_not_copied_in_plain(overlay: Path, key: Path, logs: Path) -> None:
    qcow2_tool_ok("create", "-q", overlay.parent / "plain", str(SIZE))
    nobody = f"nbd+unix:///?socket={overlay.parent}/nobody"
    with Guest(overlay, key, logs) as guest:
        with pytest.raises(ControlError, match=r"disk\.qcow2: encrypted: a raw backup would hold it in plain"):
            guest.control.backup("raw", format="raw")
        with pytest.raises(ControlError, match="encrypted: a raw backup would hold it in plain"):
            guest.control.backup(nobody, existing=True)
        with pytest.raises(ControlError, match="encrypted: a raw copy would hold it in plain"):
            guest.control.mirror("raw", "raw")
        with pytest.raises(ControlError, match="encrypted: a raw copy would hold it in plain"):
            guest.control.mirror(nobody, "raw", existing=True)
        with pytest.raises(ControlError, match="not encrypted, as the disk is"):
            guest.control.mirror("plain", existing=True)
        guest.end()
    assert not (overlay.parent / "raw").exists()


def test_the_top_over_an_encrypted_base_is_its_own(overlay: Path, key: Path, logs: Path) -> None:
    with Guest(overlay, key, logs) as guest:
        job = guest.control.mirror("copy", top=True).job
        until(guest.control, job, "ready")
        guest.finish(guest.control.complete(job))
        guest.end()
    assert not holds_pattern(overlay.parent / "copy")
    assert content(overlay.parent / "copy") == BASE.ljust(SIZE, b"\0")


@pytest.mark.parametrize("kind", ["luks", "qcow2"])
def test_a_guest_goes_on_while_what_is_new_is_written(tmp_path: Path, key: Path, kind: str) -> None:
    """Its zeros are as any data there: the first pieces of them are in the file, the last are not."""
    path, size, larger = tmp_path / "disk", 8 << 20, 512 << 20
    words = ["--object", f"secret,id=s0,file={key}"]
    if kind == "luks":
        written = path
        qcow2_tool_ok("create", "-q", "-f", "luks", *words, "-o", "key-secret=s0,iter-time=10", path, str(size))
    else:
        written = tmp_path / "data"
        qcow2_tool_ok("create", "-q", *words, "-o", f"{LUKS},data_file={written},data_file_raw=on", path, str(size))
    before = written.stat().st_size
    with (
        Daemon(path, f"--format={kind}", f"--key-file={key}", f"--control={path}.control") as daemon,
        FrontEnd(daemon.socket_path) as guest,
        Control(f"{path}.control") as control,
    ):
        resizing = threading.Thread(target=control.resize, args=(larger,))
        resizing.start()
        while written.stat().st_size == before:
            assert resizing.is_alive()
        guest.read(0, 512)
        reached = written.stat().st_size
        resizing.join()
        assert before < reached < written.stat().st_size
        assert guest.size == larger
        assert guest.read(larger - 4096, 4096) == bytes(4096)
