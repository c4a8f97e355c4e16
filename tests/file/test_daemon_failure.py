"""When the host fails under the daemon: one request, or every change from then on, and never a lie."""

import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import qcow2
from tests.frontend import DISCARD, FLUSH, IN, IOERR, OK, OUT, WRITE_ZEROES, FrontEnd
from tests.oracle import assert_clean
from tests.program import TIMEOUT, Daemon, qcow2_tool_ok
from vhost import Control

CLUSTER = 65536
SEGMENT = bytes(8) + (CLUSTER // 512).to_bytes(4, "little") + bytes(4)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "4G"], check=True, timeout=TIMEOUT)
    return path


@pytest.fixture
def guest(image: Path) -> Iterator[tuple[Daemon, FrontEnd]]:
    """A guest whose first cluster is allocated and stable."""
    with Daemon(image) as daemon, FrontEnd(daemon.socket_path) as front_end:
        daemon.forbid_mappings()
        front_end.write(0, b"a" * CLUSTER)
        front_end.flush()
        yield daemon, front_end


def limit(daemon: Daemon, nbytes: int) -> None:
    """Let every write of the daemon past *nbytes* of a file fail with EFBIG."""
    resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (nbytes, resource.RLIM_INFINITY))


def fail_a_metadata_write(daemon: Daemon, guest: FrontEnd) -> None:
    """A discard changes metadata only; with the header's sector writable and nothing else, that fails."""
    limit(daemon, 512)
    assert guest.do(DISCARD, 0, SEGMENT).status == IOERR
    limit(daemon, resource.RLIM_INFINITY)


def test_failed_data_write_fails_that_request_alone(guest: tuple[Daemon, FrontEnd], image: Path) -> None:
    daemon, front_end = guest
    limit(daemon, 512)
    assert front_end.do(OUT, 0, b"b" * CLUSTER).status == IOERR
    limit(daemon, resource.RLIM_INFINITY)
    front_end.write(0, b"c" * CLUSTER)
    front_end.flush()
    daemon.stop()
    subprocess.run(["qemu-img", "check", "-q", image], check=True, timeout=TIMEOUT)


CHANGES = [(OUT, b"b" * 512), (FLUSH, b""), (DISCARD, SEGMENT), (WRITE_ZEROES, SEGMENT)]


@pytest.mark.parametrize(("kind", "data"), CHANGES, ids=["write", "flush", "discard", "write-zeroes"])
def test_after_a_failed_metadata_write_nothing_succeeds(guest: tuple[Daemon, FrontEnd], kind: int, data: bytes) -> None:
    fail_a_metadata_write(*guest)
    assert guest[1].do(kind, 0, data).status == IOERR


def test_after_a_failed_metadata_write_reads_go_on(guest: tuple[Daemon, FrontEnd]) -> None:
    fail_a_metadata_write(*guest)
    done = guest[1].do(IN, CLUSTER, nbytes=512)
    assert (done.status, done.data) == (OK, bytes(512))


def test_status_says_that_nothing_is_written_any_more(image: Path) -> None:
    with Daemon(image, f"--control={image}.control") as daemon, FrontEnd(daemon.socket_path) as front_end:
        daemon.forbid_mappings()
        front_end.write(0, b"a" * CLUSTER)
        front_end.flush()
        with Control(f"{image}.control") as control:
            assert control.status()["failed"] is False
            fail_a_metadata_write(daemon, front_end)
            assert control.status()["failed"] is True
            front_end.start_queue(base=front_end.stop_queue())
            assert control.status()["failed"] is True


def test_after_a_failed_metadata_write_the_daemon_does_not_end_as_if_all_were_well(
    guest: tuple[Daemon, FrontEnd], image: Path
) -> None:
    daemon, front_end = guest
    fail_a_metadata_write(daemon, front_end)
    daemon.process.terminate()
    _, said = daemon.process.communicate(timeout=TIMEOUT)
    assert daemon.process.returncode == 1
    assert str(image) in said


def test_after_a_failed_metadata_write_a_pause_changes_nothing(guest: tuple[Daemon, FrontEnd], image: Path) -> None:
    daemon, front_end = guest
    fail_a_metadata_write(*guest)
    front_end.start_queue(base=front_end.stop_queue())
    assert front_end.do(OUT, 0, b"b" * 512).status == IOERR
    assert front_end.read(0, 512) == b"a" * 512
    front_end.stop_queue()
    with pytest.raises(OSError, match="lock"):
        qcow2.open(str(image), writable=True)  # nobody takes it for sound
    daemon.process.terminate()
    assert daemon.process.wait(TIMEOUT) == 1


@pytest.mark.parametrize("aio", ["auto", "threads"])
def test_failing_copies_do_not_end_the_daemon(tmp_path: Path, aio: str) -> None:
    """So many that the garbage collector comes by: it must find nothing that it cannot take apart."""
    base, overlay = tmp_path / "base.raw", tmp_path / "overlay.qcow2"
    base.write_bytes(b"b" * (1 << 22))
    qcow2_tool_ok("create", "-b", base, "-F", "raw", overlay, "4M")
    with Daemon(overlay, f"--aio={aio}") as daemon, FrontEnd(daemon.socket_path) as guest:
        guest.write(0, b"a" * 512)
        limit(daemon, 8 * CLUSTER)  # the tables are below
        outcomes = [guest.do(OUT, CLUSTER + 512 * (n * 79 % 7000), b"c" * 1024).status for n in range(400)]
        assert outcomes.count(IOERR) > 300
        limit(daemon, resource.RLIM_INFINITY)
        assert guest.read(0, 1024) == b"a" * 512 + b"b" * 512
        guest.write(1 << 21, b"d" * 512)
        daemon.stop()
    assert_clean(overlay)


@pytest.mark.parametrize("fate", ["lost", "under that file's other name"])
def test_a_name_that_was_taken_away_is_told_of(image: Path, fate: str) -> None:
    with Daemon(image) as daemon:
        with FrontEnd(daemon.socket_path) as front_end:
            front_end.write(0, b"a" * CLUSTER)
            moved = image.rename(image.with_name("moved"))
            image.write_bytes(moved.read_bytes())
            if fate == "lost":
                moved.unlink()
        daemon.stop()
        assert daemon.process.stderr is not None
        assert f"{image}: leads no longer to the image that was served: what was written is {fate}" in (
            daemon.process.stderr.read()
        )
