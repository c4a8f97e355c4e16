"""The image is the daemon's while rings run: two daemons hand it to each other, as in a live migration."""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import qcow2
from qcow2.engine.image import Image
from tests.frontend import F_CONFIG_WCE, F_FLUSH, BackendGone, FrontEnd
from tests.patience import TIMEOUT
from tests.program import Daemon, complaints, qcow2_tool_ok
from tests.served import serve

ROOT = Path(__file__).resolve().parents[2]
SIZE = 64 << 20
FILES_MAX = 256  # WORKER_FILES: a worker knows no more at a time


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qcow2_tool_ok("create", "-o", "compat=1.1,lazy_refcounts=on", path, str(SIZE))
    return path


@pytest.fixture
def pair(image: Path) -> Iterator[tuple[Daemon, Daemon]]:
    """A daemon that has the image, and one that waits for it."""
    with Daemon(image) as source, Daemon(image, "--incoming") as destination:
        yield source, destination


def require_clean(image: Path) -> None:
    """Nobody has the image open for writing, and it was closed cleanly."""
    with qcow2.open(str(image), writable=True) as disk:  # takes the lock
        assert isinstance(disk.image, Image)
        assert not disk.image.header.is_dirty
    subprocess.run(["qemu-img", "check", "-q", image], check=True)


def is_locked(image: Path) -> bool:
    try:
        qcow2.open(str(image), writable=True).close()
    except OSError:
        return True
    return False


def test_image_is_clean_and_unlocked_once_the_last_ring_has_stopped(image: Path) -> None:
    with Daemon(image) as daemon, FrontEnd(daemon.socket_path, queues=3) as guest:
        guest.write(0, b"\1" * 65536)
        assert is_locked(image)
        for index in (2, 0):
            guest.stop_queue(index)
        assert is_locked(image)
        guest.stop_queue(1)
        require_clean(image)


def test_image_is_unlocked_when_the_front_end_has_left(image: Path) -> None:
    with Daemon(image) as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            guest.write(0, b"\1" * 65536)
        with FrontEnd(daemon.socket_path):
            assert is_locked(image)
        require_clean(image)  # the lock is tried for a second: the daemon may still be letting go


def test_guest_moves_back_and_forth_between_two_daemons(pair: tuple[Daemon, Daemon], image: Path) -> None:
    expected = bytearray(16 * 65536)
    for turn in range(6):
        here = pair[turn % 2]
        with FrontEnd(here.socket_path) as guest:
            assert guest.read(0, len(expected) // 8) == expected[: len(expected) // 8]
            for slot in range(16):
                data = os.urandom(65536)
                expected[slot << 16 : (slot + 1) << 16] = data
                guest.write(slot << 16, data)
            guest.stop_queue()
            require_clean(image)
    for daemon in pair:
        daemon.stop()
    with qcow2.open(str(image)) as disk:
        assert disk.read(0, len(expected)) == expected


def test_destination_knows_the_size_while_the_source_has_the_image(pair: tuple[Daemon, Daemon]) -> None:
    source, destination = pair
    with FrontEnd(source.socket_path) as guest, WaitingFrontEnd(destination.socket_path) as waiting:
        guest.write(0, b"\1" * 65536)
        assert waiting.size == SIZE
        guest.stop_queue()
        waiting.start_queue(base=0)
        assert waiting.read(0, 65536) == b"\1" * 65536


class WaitingFrontEnd(FrontEnd):
    """Has said all but where its rings are, as a QEMU that waits for a migration."""

    def __init__(self, socket_path: Path, *, features: int = F_FLUSH) -> None:
        self.waits = True
        super().__init__(socket_path, features=features)
        self.waits = False

    def start_queue(self, base: int, index: int = 0) -> None:
        if not self.waits:
            super().start_queue(base, index)


def test_source_goes_on_if_the_guest_stays(image: Path) -> None:
    with Daemon(image) as daemon, FrontEnd(daemon.socket_path) as guest:
        for turn in range(5):
            guest.write(turn << 16, bytes([turn]) * 65536)
            base = guest.stop_queue()
            guest.start_queue(base=base)
            assert guest.read(turn << 16, 65536) == bytes([turn]) * 65536


def test_image_that_another_has_ends_the_connection_and_the_next_may_have_it(pair: tuple[Daemon, Daemon]) -> None:
    source, destination = pair
    with FrontEnd(source.socket_path) as guest:
        with pytest.raises(BackendGone):
            FrontEnd(destination.socket_path)
        guest.write(0, b"\1" * 65536)
        guest.stop_queue()
        with FrontEnd(destination.socket_path) as next_guest:
            assert next_guest.read(0, 65536) == b"\1" * 65536
    destination.stop()
    assert destination.process.stderr is not None
    (line,) = complaints(destination.process.stderr.read()).splitlines()
    assert line.startswith("vhost-user-qcow2: connection closed: ")
    assert "is another process using the image?" in line


def test_front_end_that_cannot_flush_may_wait_for_the_image(pair: tuple[Daemon, Daemon]) -> None:
    source, destination = pair
    with FrontEnd(source.socket_path) as guest:
        with WaitingFrontEnd(destination.socket_path, features=0) as waiting:  # writethrough, of nothing yet
            guest.stop_queue()
            waiting.start_queue(base=0)
            waiting.write(0, b"\1" * 512)


def test_daemon_without_incoming_needs_the_image_at_its_start(image: Path) -> None:
    with Daemon(image) as first, FrontEnd(first.socket_path), Daemon(image) as second:
        assert second.process.wait(TIMEOUT) == 1


def test_incoming_daemon_needs_an_image_all_the_same(image: Path) -> None:
    image.unlink()
    with Daemon(image, "--incoming") as daemon:
        assert daemon.process.wait(TIMEOUT) == 1


def test_image_that_grew_elsewhere_has_the_new_size(image: Path) -> None:
    with Daemon(image, "--incoming") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            assert guest.size == SIZE
        with WaitingFrontEnd(daemon.socket_path) as waiting:
            qcow2_tool_ok("resize", image, str(2 * SIZE))
            waiting.start_queue(base=0)
            with waiting.open_backend_channel() as channel:
                assert len(channel.recv(12)) == 12
            assert waiting.size == 2 * SIZE
            waiting.write(2 * SIZE - 512, b"\1" * 512)
            waiting.stop_queue()
        qcow2_tool_ok("resize", image, str(3 * SIZE))
        with FrontEnd(daemon.socket_path) as guest:
            assert guest.size == 3 * SIZE


def test_cache_may_be_switched_off_while_rings_are_stopped(image: Path) -> None:
    with Daemon(image) as daemon, FrontEnd(daemon.socket_path, features=F_FLUSH | F_CONFIG_WCE) as guest:
        base = guest.stop_queue()
        guest.set_writeback(False)
        guest.start_queue(base=base)
        guest.write(0, b"\1" * 512)


def test_any_number_of_stops_and_starts_leaves_nothing_behind(image: Path) -> None:
    with serve(image) as served, FrontEnd(served.socket_path) as guest:
        counts = []
        for turn in range(FILES_MAX + 10):
            guest.start_queue(base=guest.stop_queue())
            if turn in (5, FILES_MAX + 5):
                guest.write(0, b"\1" * 512)
                counts.append(len(os.listdir("/proc/self/fd")))
        assert counts[0] == counts[1]


def test_stopped_disk_may_be_resized(image: Path) -> None:
    with serve(image) as served, FrontEnd(served.socket_path) as guest:
        base = guest.stop_queue()
        served.device.resize(2 * SIZE)
        require_clean(image)
        assert guest.size == 2 * SIZE
        guest.start_queue(base=base)
        guest.write(2 * SIZE - 512, b"\1" * 512)


@pytest.mark.parametrize("options", [("--cache=none",), ("--read-only",), ("--format=raw",)])
def test_options_hold_after_the_image_was_taken_again(tmp_path: Path, image: Path, options: tuple[str, ...]) -> None:
    if options == ("--format=raw",):
        image = tmp_path / "disk.raw"
        image.write_bytes(bytes(1 << 20))
    with ExitStack() as stack:
        daemon = stack.enter_context(Daemon(image, *options))
        guest = stack.enter_context(FrontEnd(daemon.socket_path))
        before = flags_of_image(daemon, image)
        guest.start_queue(base=guest.stop_queue())
        assert flags_of_image(daemon, image) == before
        guest.read(0, 4096)


def flags_of_image(daemon: Daemon, image: Path) -> list[str]:
    """How the daemon has the image open, once for each descriptor."""
    process = Path("/proc", str(daemon.process.pid))
    own = [fd.name for fd in (process / "fd").iterdir() if fd.resolve() == image]
    return sorted((process / "fdinfo" / fd).read_text().split()[3] for fd in own)


def images() -> int:
    return sum(type(each) is Image for each in gc.get_objects())


def test_pauses_leave_no_closed_images_in_memory(image: Path) -> None:
    overlay = image.with_name("overlay")
    qcow2.create(overlay, backing=image.name)
    gc.collect()
    gc.disable()  # Python would come by itself, once in hundreds of pauses
    try:
        before = images()
        with serve(overlay) as served, FrontEnd(served.socket_path) as guest:
            for _ in range(5):
                guest.write(0, b"\1" * 512)
                guest.start_queue(guest.stop_queue())
            assert images() - before <= 2 * 2  # those that are open, and those that were last
    finally:
        gc.enable()


START = """
import gc, os, sys, threading
from pathlib import Path
from tests.file.test_lease import images
from tests.frontend import FrontEnd
from vhost.command import serve_image
from vhost.endpoint import listen
from vhost.option import parse

stop_fd = os.eventfd(0)
with listen(sys.argv[1]) as endpoint:
    options = parse([f"--fd={os.dup(endpoint.unix_socket.fileno())}", f"--blk-file={sys.argv[2]}"])
    daemon = threading.Thread(target=serve_image, args=(options, stop_fd))
    daemon.start()
    with FrontEnd(Path(sys.argv[1])) as guest:
        gc.disable()
        for _ in range(3):
            guest.start_queue(guest.stop_queue())
        gc.unfreeze()  # or what is frozen would not be counted
        print(images())
    os.eventfd_write(stop_fd, 1)
    daemon.join()
"""


def test_image_of_the_start_is_collected_as_those_of_later_pauses(image: Path) -> None:
    overlay = image.with_name("overlay")
    qcow2.create(overlay, backing=image.name)
    command = [sys.executable, "-c", START, image.with_name("socket"), overlay]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT, check=True)
    assert int(done.stdout) <= 2 * 2  # those that are open, and those that were last
