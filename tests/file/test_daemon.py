"""The daemon as a process: requests and their effect on the file, cache modes by their syncs, visitors in turn."""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.frontend import (
    DATA_BYTES,
    DISCARD,
    F_CONFIG_WCE,
    F_DISCARD,
    F_FLUSH,
    F_WRITE_ZEROES,
    FLUSH,
    GET_ID,
    GUEST_ADDRESS,
    IN,
    IOERR,
    OK,
    OUT,
    SET_MEM_TABLE,
    SET_VRING_BASE,
    SET_VRING_CALL,
    SET_VRING_ENABLE,
    SET_VRING_KICK,
    UNSUPP,
    USER_ADDRESS,
    WRITE_ZEROES,
    FrontEnd,
)
from tests.program import TIMEOUT, Daemon

SIZE = 4 << 20
ALL = F_FLUSH | F_DISCARD | F_WRITE_ZEROES | F_CONFIG_WCE
PATTERN = bytes(range(256)) * 256


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw image: no byte of it is zero."""
    path = tmp_path / "disk.raw"
    path.write_bytes((bytes(range(1, 256)) * (SIZE // 255 + 1))[:SIZE])
    return path


def raw(image: Path, *options: str) -> Daemon:
    return Daemon(image, "--format=raw", "--stats", *options)


@pytest.fixture
def daemon(image: Path) -> Iterator[Daemon]:
    with raw(image, "--serial=serial number") as running:
        yield running


def stop(daemon: Daemon) -> dict[str, int]:
    """End the daemon and return its counters."""
    daemon.stop()
    assert daemon.process.stdout is not None
    counters = json.loads(daemon.process.stdout.read())
    assert isinstance(counters, dict)
    return counters


# Requests


def test_read_returns_the_bytes_of_the_file(daemon: Daemon, image: Path) -> None:
    with FrontEnd(daemon.socket_path) as guest:
        assert guest.read(512 * 1000, 4096) == image.read_bytes()[512 * 1000 :][:4096]


def test_completed_write_is_in_the_file(daemon: Daemon, image: Path) -> None:
    with FrontEnd(daemon.socket_path) as guest:
        guest.write(65536, PATTERN)
        assert image.read_bytes()[65536:][: len(PATTERN)] == PATTERN


def test_many_requests_at_once_complete(daemon: Daemon) -> None:
    with FrontEnd(daemon.socket_path) as guest:
        for number in range(60):
            guest.submit(OUT, number * 65536, PATTERN)
        done = []
        while len(done) < 60:
            done += guest.wait()
    assert {completion.status for completion in done} == {OK}


def test_discard_gives_space_back_and_reads_as_zeros(daemon: Daemon, image: Path) -> None:
    before = image.stat().st_blocks
    with FrontEnd(daemon.socket_path) as guest:
        guest.discard(1 << 20, 1 << 20)
        assert guest.read(1 << 20, 65536) == bytes(65536)
    assert image.stat().st_blocks <= before - (1 << 20) // 512


@pytest.mark.parametrize("unmap", [False, True])
def test_write_zeroes_reads_as_zeros_and_nothing_around_it(daemon: Daemon, image: Path, unmap: bool) -> None:
    before = image.read_bytes()
    with FrontEnd(daemon.socket_path) as guest:
        guest.write_zeroes(512 * 3, 512 * 1000, unmap=unmap)
    end = 512 * 1003
    assert image.read_bytes() == before[: 512 * 3] + bytes(512 * 1000) + before[end:]


def test_get_id_is_the_serial_with_zeros_after_it(daemon: Daemon) -> None:
    with FrontEnd(daemon.socket_path) as guest:
        done = guest.do(GET_ID, nbytes=20)
    assert (done.status, done.data) == (OK, b"serial number".ljust(20, b"\0"))


SEGMENT = struct.Struct("<QII")

BAD_REQUESTS = [
    ("read past the end", IN, SIZE, b"", 512, IOERR),
    ("read over the end", IN, SIZE - 512, b"", 1024, IOERR),
    ("read at an impossible sector", IN, (2**64 - 1) * 512, b"", 512, IOERR),
    ("write past the end", OUT, SIZE, bytes(512), 0, IOERR),
    ("write of half a sector", OUT, 0, bytes(256), 0, IOERR),
    ("read of half a sector", IN, 0, b"", 256, IOERR),
    ("discard past the end", DISCARD, 0, SEGMENT.pack(SIZE // 512, 1, 0), 0, IOERR),
    ("discard that is too large", DISCARD, 0, SEGMENT.pack(0, 32769, 0), 0, IOERR),
    ("discard with unmap", DISCARD, 0, SEGMENT.pack(0, 8, 1), 0, UNSUPP),
    ("write-zeroes with unknown flags", WRITE_ZEROES, 0, SEGMENT.pack(0, 8, 2), 0, UNSUPP),
    ("two segments", WRITE_ZEROES, 0, SEGMENT.pack(0, 8, 0) * 2, 0, UNSUPP),
    ("half a segment", DISCARD, 0, bytes(8), 0, IOERR),
    ("unknown type", 99, 0, b"", 0, UNSUPP),
]


@pytest.mark.parametrize(
    ("kind", "guest_offset", "data", "nbytes", "status"),
    [case[1:] for case in BAD_REQUESTS],
    ids=[case[0] for case in BAD_REQUESTS],
)
def test_bad_request_gets_its_status_and_changes_nothing(
    daemon: Daemon, image: Path, kind: int, guest_offset: int, data: bytes, nbytes: int, status: int
) -> None:
    before = image.read_bytes()
    with FrontEnd(daemon.socket_path) as guest:
        assert guest.do(kind, guest_offset, data, nbytes=nbytes).status == status
        assert guest.read(0, 512) == before[:512]
    assert image.read_bytes() == before


def test_read_only_disk_refuses_to_change(image: Path) -> None:
    before = image.read_bytes()
    image.chmod(0o444)
    with raw(image, "--read-only") as daemon, FrontEnd(daemon.socket_path) as guest:
        assert guest.offered & (1 << 5)
        segment = SEGMENT.pack(0, 8, 0)
        changes = [(OUT, bytes(512)), (DISCARD, segment), (WRITE_ZEROES, segment)]
        assert OK not in [guest.do(kind, 0, data).status for kind, data in changes]
        assert guest.do(FLUSH).status == OK
        assert guest.read(0, 512) == before[:512]
    assert image.read_bytes() == before


# A qcow2 image: the parts that a raw one does not have


@pytest.fixture
def qcow2(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1G"], check=True, timeout=TIMEOUT)
    return path


def host_map(image: Path) -> list[dict[str, object]]:
    done = subprocess.run(["qemu-img", "map", "--output=json", image], capture_output=True, check=True, timeout=TIMEOUT)
    return list(json.loads(done.stdout))


@pytest.mark.parametrize(("unmap", "keeps_its_place"), [(False, True), (True, False)])
def test_unmap_lets_go_of_host_clusters(qcow2: Path, unmap: bool, keeps_its_place: bool) -> None:
    with Daemon(qcow2) as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            guest.write(0, PATTERN)
            guest.write_zeroes(0, len(PATTERN), unmap=unmap)
        daemon.stop()
    first = host_map(qcow2)[0]
    assert first["zero"]
    assert ("offset" in first) == keeps_its_place


def test_mapped_requests_never_enter_python(qcow2: Path) -> None:
    with Daemon(qcow2, "--stats") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            guest.write(0, PATTERN)
            for number in range(50):
                guest.read(4096 * (number % 16), 4096)
                guest.write(4096 * (number % 16), bytes(4096))
        counters = stop(daemon)
    assert (counters["requests"], counters["python_requests"]) == (101, 1)


# Cache modes: what a completed write waited for


def syncs_of_three_writes(daemon: Daemon, features: int) -> int:
    with FrontEnd(daemon.socket_path, features=features) as guest:
        for number in range(3):
            guest.write(number * 4096, bytes(4096))
    return stop(daemon)["syncs"]


@pytest.mark.parametrize("cache", ["writeback", "writethrough"])
def test_driver_without_flush_gets_a_sync_for_every_write(image: Path, cache: str) -> None:
    with raw(image, f"--cache={cache}") as daemon:
        assert syncs_of_three_writes(daemon, features=0) == 3


@pytest.mark.parametrize(("cache", "syncs"), [("writeback", 0), ("unsafe", 0), ("writethrough", 3)])
@pytest.mark.parametrize("features", [F_FLUSH, F_FLUSH | F_CONFIG_WCE])
def test_driver_with_flush_gets_the_configured_mode(image: Path, cache: str, syncs: int, features: int) -> None:
    with raw(image, f"--cache={cache}") as daemon:
        assert syncs_of_three_writes(daemon, features=features) == syncs


@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
def test_writethrough_covers_discard_and_write_zeroes(image: Path, kind: int) -> None:
    with raw(image) as daemon:
        with FrontEnd(daemon.socket_path, features=F_DISCARD | F_WRITE_ZEROES) as guest:
            assert guest.do(kind, 0, SEGMENT.pack(0, 128, 0)).status == OK
        assert stop(daemon)["syncs"] == 1


def test_flush_syncs(image: Path) -> None:
    with raw(image) as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            guest.write(0, bytes(512))
            guest.flush()
        assert stop(daemon)["syncs"] == 1


def test_unsafe_answers_flushes_without_a_sync(image: Path) -> None:
    with raw(image, "--cache=unsafe") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            guest.write(0, bytes(512))
            guest.flush()
        assert stop(daemon)["syncs"] == 0


def test_switching_wce_off_syncs_what_was_written_before(image: Path) -> None:
    with raw(image) as daemon:
        with FrontEnd(daemon.socket_path, features=ALL) as guest:
            guest.write(0, bytes(512))
            guest.set_writeback(False)
        assert stop(daemon)["syncs"] == 1


def test_every_write_after_wce_was_switched_off_syncs(image: Path) -> None:
    with raw(image) as daemon:
        with FrontEnd(daemon.socket_path, features=ALL) as guest:
            guest.set_writeback(False)
            guest.write(0, bytes(512))
            guest.write(0, bytes(512))
            guest.set_writeback(True)
            guest.write(0, bytes(512))
        assert stop(daemon)["syncs"] == 3


@pytest.mark.parametrize(
    ("cache", "wce"), [("writeback", 1), ("none", 1), ("unsafe", 1), ("writethrough", 0), ("directsync", 0)]
)
def test_wce_tells_the_truth_about_the_cache(image: Path, cache: str, wce: int) -> None:
    with raw(image, f"--cache={cache}") as daemon, FrontEnd(daemon.socket_path) as guest:
        assert guest.read_config()[32] == wce


def test_switched_wce_stays_for_the_next_front_end(daemon: Daemon) -> None:
    with FrontEnd(daemon.socket_path, features=ALL) as guest:
        guest.set_writeback(False)
    with FrontEnd(daemon.socket_path, features=ALL) as guest:
        assert guest.read_config()[32] == 0


@pytest.mark.parametrize(
    ("cache", "direct"), [("writeback", 0), ("writethrough", 0), ("none", 1), ("directsync", 1), ("unsafe", 0)]
)
def test_cache_mode_decides_about_a_descriptor_past_the_page_cache(image: Path, cache: str, direct: int) -> None:
    with raw(image, f"--cache={cache}") as daemon, FrontEnd(daemon.socket_path) as guest:
        guest.read(0, 512)
        process = Path("/proc", str(daemon.process.pid))
        own = [fd.name for fd in (process / "fd").iterdir() if fd.resolve() == image]
        flags = [int((process / "fdinfo" / fd).read_text().split()[3], 8) for fd in own]
    assert len([flag for flag in flags if flag & os.O_DIRECT]) == direct


@pytest.mark.parametrize("cache", ["none", "directsync"])
def test_data_past_the_page_cache_is_the_same_data(image: Path, cache: str) -> None:
    with raw(image, f"--cache={cache}") as daemon, FrontEnd(daemon.socket_path) as guest:
        guest.write(4096, PATTERN)
        guest.write(512, bytes(512))
        assert guest.read(0, 65536) == image.read_bytes()[:65536]


# Front-ends that come and go


def test_next_front_end_may_come_when_one_left(daemon: Daemon) -> None:
    for number in range(3):
        with FrontEnd(daemon.socket_path) as guest:
            guest.write(0, bytes([number]) * 512)
    with FrontEnd(daemon.socket_path) as guest:
        assert guest.read(0, 512) == b"\2" * 512


def test_front_end_that_leaves_with_requests_in_flight_leaves_nothing_behind(daemon: Daemon) -> None:
    with FrontEnd(daemon.socket_path):
        pass  # until its rings stopped the image was open from the start
    before = leftovers(daemon)
    with FrontEnd(daemon.socket_path) as guest:
        for number in range(60):
            guest.submit(OUT, number * 65536, PATTERN)
    assert leftovers(daemon) == before == (before[0], 0)


class HesitantFrontEnd(FrontEnd):
    """Never enables its ring, in which a request waits from the start."""

    def start_queue(self, base: int, index: int = 0) -> None:
        self.submit(IN, 0, nbytes=512)
        super().start_queue(base, index)

    def tell(self, request: int, payload: bytes, *, fds: tuple[int, ...] = ()) -> None:
        if request != SET_VRING_ENABLE:
            super().tell(request, payload, fds=fds)


def test_ring_that_is_not_enabled_is_left_alone_also_after_one_that_was(daemon: Daemon) -> None:
    with FrontEnd(daemon.socket_path) as guest:
        guest.read(0, 512)
    with HesitantFrontEnd(daemon.socket_path) as guest:
        assert guest.stop_queue() == 0


def leftovers(daemon: Daemon) -> tuple[int, int]:
    """The daemon's descriptors, and its mappings of guest memory, beside one visitor that shared nothing yet."""
    with socket.socket(socket.AF_UNIX) as visitor:
        visitor.connect(str(daemon.socket_path))
        visitor.sendall(struct.pack("<III", 1, 1, 0))  # GET_FEATURES, answered once the visitor before is forgotten
        assert visitor.recv(20, socket.MSG_WAITALL)
        process = Path("/proc", str(daemon.process.pid))
        return len(os.listdir(process / "fd")), (process / "maps").read_text().count("memfd:guest")


def test_drained_queue_goes_on_where_it_stopped(daemon: Daemon) -> None:
    with FrontEnd(daemon.socket_path) as guest:
        guest.write(0, PATTERN)
        base = guest.stop_queue()
        assert base == guest.available
        guest.start_queue(base)
        assert guest.read(0, 65536) == PATTERN


def calls(guest: FrontEnd) -> int:
    """How often the driver of queue 0 was called since it looked last."""
    os.set_blocking(guest.queues[0].call, False)
    with contextlib.suppress(BlockingIOError):
        return os.eventfd_read(guest.queues[0].call)
    return 0


def test_call_is_signalled_once_when_a_ring_starts_and_never_while_it_is_stopped(daemon: Daemon) -> None:
    with FrontEnd(daemon.socket_path) as guest:
        base = guest.stop_queue()
        calls(guest)
        guest.tell(SET_VRING_CALL, struct.pack("<Q", 0), fds=(guest.queues[0].call,))
        assert calls(guest) == 0
        guest.tell(SET_VRING_BASE, struct.pack("<II", 0, base))
        guest.tell(SET_VRING_KICK, struct.pack("<Q", 0), fds=(guest.kick,))
        assert calls(guest) == 1  # a daemon before this one may have died before it could
        guest.tell(SET_VRING_CALL, struct.pack("<Q", 0), fds=(guest.queues[0].call,))
        assert calls(guest) == 1


def test_request_posted_while_the_queue_was_stopped_is_found_without_a_kick(daemon: Daemon) -> None:
    with FrontEnd(daemon.socket_path) as guest:
        base = guest.stop_queue()
        guest.submit(IN, 0, nbytes=512)
        os.eventfd_read(guest.kick)  # an earlier life of the daemon consumed it
        guest.start_queue(base)
        (done,) = guest.wait()
    assert done.status == OK


def test_memory_table_may_be_replaced_while_the_queue_runs(daemon: Daemon) -> None:
    with FrontEnd(daemon.socket_path) as guest:
        guest.write(0, PATTERN)
        region = struct.pack("<IIQQQQ", 1, 0, GUEST_ADDRESS, len(guest.memory), USER_ADDRESS, 0)
        guest.tell(SET_MEM_TABLE, region, fds=(guest.memory_fd,))
        assert guest.read(0, DATA_BYTES)[:65536] == PATTERN


def test_region_longer_than_its_file_is_refused(daemon: Daemon) -> None:
    with FrontEnd(daemon.socket_path) as guest:
        region = struct.pack("<IIQQQQ", 1, 0, GUEST_ADDRESS, 2 * len(guest.memory), USER_ADDRESS, 0)
        with pytest.raises(AssertionError):
            guest.tell(SET_MEM_TABLE, region, fds=(guest.memory_fd,))
        guest.write(0, PATTERN)


# Ends


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_daemon_while_a_front_end_is_connected(daemon: Daemon, by: signal.Signals) -> None:
    with FrontEnd(daemon.socket_path) as guest:
        guest.write(0, PATTERN)
        daemon.stop(by)


def test_signal_drains_what_is_in_flight(daemon: Daemon, image: Path) -> None:
    with FrontEnd(daemon.socket_path) as guest:
        for number in range(40):
            guest.submit(OUT, number * 65536, PATTERN)
        daemon.stop()
        done = list(guest.reap())
    data = image.read_bytes()
    assert {completion.status for completion in done} <= {OK}
    assert data.count(PATTERN) >= len(done)


def test_stats_count_what_was_asked(image: Path) -> None:
    with raw(image) as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            guest.write(0, PATTERN)
            guest.read(0, 4096)
            guest.read(4096, 4096)
            guest.flush()
            guest.discard(0, 4096)
            guest.write_zeroes(0, 4096, unmap=True)
        counters = stop(daemon)
    assert counters.pop("crossings") > 0  # the session's messages, too
    assert counters.pop("immediate") <= 3  # the write and the reads, unless the host stalls
    assert counters.pop("stalls") <= 3
    assert counters == {
        "requests": 6,
        "reads": 2,
        "writes": 1,
        "flushes": 1,
        "discards": 1,
        "write_zeroes": 1,
        "python_requests": 2,
        "syncs": 1,
        "metadata_writes": 0,
        "clusters_allocated": 0,
        "bytes_read": 8192,
        "bytes_written": 65536,
    }


def test_killed_daemon_leaves_the_image_unlocked(image: Path) -> None:
    with raw(image) as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            guest.write(0, PATTERN)
        daemon.kill()
    with raw(image) as daemon, FrontEnd(daemon.socket_path) as guest:
        assert guest.read(0, 65536) == PATTERN


def test_stopped_ring_is_not_touched_and_its_driver_not_called(daemon: Daemon) -> None:
    with FrontEnd(daemon.socket_path, queues=2) as guest:
        for slot in range(32):
            guest.submit(IN, slot << 16, nbytes=65536)
        base = guest.stop_queue()
        done = guest.reap()
        assert len(done) == base  # what was fetched is answered, the rest is where it was
        os.set_blocking(guest.queues[0].call, False)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(guest.queues[0].call)
        guest.submit(IN, 0, nbytes=512)
        before = bytes(guest.bytes)
        guest.queues[1].submit(OUT, 0, bytes(512))  # the other ring goes on, the daemon has looked around
        while not list(guest.queues[1].reap()):
            guest.wait_for_call()
        zone = len(before) // 2
        assert bytes(guest.bytes[:zone]) == before[:zone]
        with pytest.raises(BlockingIOError):
            os.eventfd_read(guest.queues[0].call)
