"""Requests served by C over a raw file, and the same ones left to Python."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.driver import Buffer
from ring.request import Request
from tests.blockguest import DISCARD, FLUSH, GET_ID, IN, IOERR, MIB, OK, OUT, UNSUPP, UNTOUCHED, WRITE_ZEROES, Guest
from tests.patience import TIMEOUT
from virtio.native import NativeBlock


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(MIB))
    return path


@pytest.fixture
def guest(disk: Path) -> Iterator[Guest]:
    fd = os.open(disk, os.O_RDWR | os.O_CLOEXEC)
    with Guest(fd) as guest:
        yield guest
    os.close(fd)


def test_read_brings_the_bytes_of_the_file(guest: Guest, disk: Path) -> None:
    assert guest.ask(IN, 8, room=4096) == (OK, 4097, disk.read_bytes()[4096:8192])


def test_write_reaches_the_file(guest: Guest, disk: Path) -> None:
    data = os.urandom(4096)
    assert guest.ask(OUT, 8, data=data) == (OK, 1, b"")
    assert disk.read_bytes()[4096:8192] == data


def test_reads_of_the_fast_path_never_enter_python(guest: Guest) -> None:
    guest.ask(IN, 0, room=4096)
    before = guest.counters
    for sector in range(0, 1600, 8):
        assert guest.ask(IN, sector, room=4096).status == OK
    after = guest.counters
    assert after.reads - before.reads == 200
    assert (after.python_requests, after.crossings) == (before.python_requests, before.crossings)


def test_write_may_be_split_at_any_byte(guest: Guest, disk: Path) -> None:
    for cut in range(1, 16 + 512):
        data = os.urandom(512)
        assert guest.ask(OUT, 3, data=data, cuts=[cut]) == (OK, 1, b""), cut
        assert disk.read_bytes()[1536:2048] == data, cut


def test_read_may_be_split_at_any_byte(guest: Guest, disk: Path) -> None:
    sector = disk.read_bytes()[1536:2048]
    for cut in range(1, 513):
        assert guest.ask(IN, 3, room=512, cuts=[cut, cut + 1]) == (OK, 513, sector), cut


@pytest.mark.parametrize("indirect", [False, True])
def test_every_byte_may_have_a_descriptor_of_its_own(disk: Path, indirect: bool) -> None:
    fd = os.open(disk, os.O_RDWR | os.O_CLOEXEC)
    with Guest(fd, queue_size=1024) as guest:
        answer = guest.ask(IN, 3, room=512, cuts=range(512), indirect=indirect)
    os.close(fd)
    assert answer == (OK, 513, disk.read_bytes()[1536:2048])


@pytest.mark.parametrize("indirect", [False, True])
def test_status_may_share_a_descriptor_with_the_data(guest: Guest, disk: Path, indirect: bool) -> None:
    posted = guest.post(IN, 8, room=1024, indirect=indirect)
    answer = guest.ask_all([posted])[0]
    assert answer.data == disk.read_bytes()[4096:5120]


def test_indirect_chain_may_be_longer_than_the_ring(disk: Path) -> None:
    fd = os.open(disk, os.O_RDWR | os.O_CLOEXEC)
    with Guest(fd, queue_size=4) as guest:
        answer = guest.ask(IN, 0, room=65536, cuts=range(0, 65536, 512), indirect=True)
    os.close(fd)
    assert answer.data == disk.read_bytes()[:65536]


def test_a_full_ring_of_requests_all_come_back(guest: Guest, disk: Path) -> None:
    content = disk.read_bytes()
    posted = [guest.post(IN, sector, room=512, indirect=True) for sector in range(128)]
    for sector, answer in enumerate(guest.ask_all(posted)):
        assert answer.data == content[sector * 512 : (sector + 1) * 512]


def test_more_long_chains_than_the_worker_holds_at_once_are_served(disk: Path) -> None:
    fd = os.open(disk, os.O_RDWR | os.O_CLOEXEC)
    with Guest(fd, queue_size=512) as guest:
        posted = [guest.post(IN, 0, room=4096, cuts=range(0, 4096, 128), indirect=True) for _ in range(512)]
        answers = guest.ask_all(posted)
    os.close(fd)
    assert {answer.data for answer in answers} == {disk.read_bytes()[:4096]}


def test_long_chains_wait_until_the_worker_has_room() -> None:
    held: list[Request] = []
    full = threading.Event()

    def hold(request: Request) -> None:
        held.append(request)
        if len(held) in (128, 200):
            full.set()

    with Guest(on_request=hold, queue_size=256) as guest:
        posted = [guest.post(IN, 0, room=4096, cuts=range(0, 4096, 128), indirect=True) for _ in range(200)]
        guest.queue.kick()
        assert full.wait(TIMEOUT)
        guest.worker.call(lambda: None)
        assert len(held) == 128
        full.clear()
        guest.worker.call(lambda: [request.finish(OK) for request in held[:72]])
        assert full.wait(TIMEOUT)
        guest.worker.call(lambda: [request.finish(OK) for request in held[72:]])
        assert len(guest.queue.wait(200)) == len(posted)


def test_what_is_past_the_end_of_the_file_reads_as_zeros(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"\x11" * 1000)
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    with Guest(fd) as guest:
        answer = guest.ask(IN, 1, room=2048, cuts=[7, 488, 489, 1500])
    os.close(fd)
    assert answer == (OK, 2049, b"\x11" * 488 + bytes(1560))


# statuses; `Guest` has 2048 sectors

MALFORMED = {
    "data is not a multiple of a sector": (IN, 0, b"", 513, IOERR),
    "less than a sector": (IN, 0, b"", 100, IOERR),
    "write is not a multiple of a sector": (OUT, 0, bytes(511), 0, IOERR),
    "read past the end": (IN, 2048, b"", 512, IOERR),
    "read across the end": (IN, 2047, b"", 1024, IOERR),
    "write across the end": (OUT, 2047, bytes(1024), 0, IOERR),
    "sector that overflows in bytes": (IN, 1 << 55, b"", 512, IOERR),
    "last sector of all": (IN, (1 << 64) - 1, b"", 512, IOERR),
    "unknown type": (99, 0, b"", 0, UNSUPP),
    "SCSI": (2, 0, bytes(32), 96, UNSUPP),
    "secure erase": (14, 0, bytes(16), 0, UNSUPP),
    "discard without a segment": (DISCARD, 0, b"", 0, IOERR),
    "discard with half a segment": (DISCARD, 0, bytes(8), 0, IOERR),
    "discard of two segments": (DISCARD, 0, bytes(32), 0, UNSUPP),
    "discard past the end": (DISCARD, 0, (2047).to_bytes(8, "little") + (2).to_bytes(8, "little"), 0, IOERR),
    "discard of too many": (DISCARD, 0, bytes(8) + (32769).to_bytes(8, "little"), 0, IOERR),
    "discard with unmap": (DISCARD, 0, bytes(8) + (1 + (1 << 32)).to_bytes(8, "little"), 0, UNSUPP),
    "discard with unknown flag": (DISCARD, 0, bytes(8) + (1 + (2 << 32)).to_bytes(8, "little"), 0, UNSUPP),
    "zeroes with unknown flag": (WRITE_ZEROES, 0, bytes(8) + (1 + (2 << 32)).to_bytes(8, "little"), 0, UNSUPP),
    "zeroes of two segments": (WRITE_ZEROES, 0, bytes(32), 0, UNSUPP),
    "zeroes past the end": (WRITE_ZEROES, 0, (2048).to_bytes(8, "little") + (1).to_bytes(8, "little"), 0, IOERR),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_request_gets_a_status(guest: Guest, name: str) -> None:
    type, sector, data, room, status = MALFORMED[name]
    assert guest.ask(type, sector, data=data, room=room) == (status, 1, bytes([UNTOUCHED]) * room)
    assert guest.counters.python_requests == 0


def test_chain_without_room_for_a_status_comes_back_empty(guest: Guest) -> None:
    address = guest.memory.allocate(512)
    guest.queue.add([Buffer(address, 512)])
    guest.queue.kick()
    assert guest.queue.wait()[0].nbytes == 0


@pytest.mark.parametrize("nbytes", [1, 15])
def test_short_header_gets_an_error(guest: Guest, nbytes: int) -> None:
    address, status = guest.memory.allocate(nbytes), guest.memory.allocate(1)
    guest.queue.add([Buffer(address, nbytes), Buffer(status, 1, True)])
    guest.queue.kick()
    assert guest.queue.wait()[0].nbytes == 1
    assert guest.memory.load(status, 1)[0] == IOERR


def test_chain_without_a_header_gets_an_error(guest: Guest) -> None:
    status = guest.memory.allocate(1)
    guest.queue.add([Buffer(status, 1, True)])
    guest.queue.kick()
    guest.queue.wait()
    assert guest.memory.load(status, 1)[0] == IOERR


@pytest.mark.parametrize("type", [IN, OUT])
def test_transfer_of_nothing_is_fine(guest: Guest, type: int) -> None:
    assert guest.ask(type, 2048).status == OK


def test_barrier_bit_is_ignored(guest: Guest, disk: Path) -> None:
    assert guest.ask(IN | 0x80000000, 0, room=512).data == disk.read_bytes()[:512]


def test_read_only_disk_refuses_to_change() -> None:
    block = NativeBlock(size=MIB, read_only=True, max_range_sectors=8)
    segment = bytes(8) + (1).to_bytes(8, "little")
    with Guest(block=block) as guest:
        answers = [
            guest.ask(OUT, 0, data=bytes(512)),
            *(guest.ask(t, 0, data=segment) for t in (DISCARD, WRITE_ZEROES)),
        ]
        assert [answer.status for answer in answers] == [IOERR] * 3
        assert guest.counters.python_requests == 0


def test_limit_of_zero_sectors_means_unsupported() -> None:
    with Guest(block=NativeBlock(size=MIB)) as guest:
        segment = bytes(8) + (1).to_bytes(8, "little")
        assert [guest.ask(t, 0, data=segment).status for t in (DISCARD, WRITE_ZEROES)] == [UNSUPP, UNSUPP]


@pytest.mark.parametrize(("sector", "nbytes"), [(1, 4096), (8, 512), (8, 4608)])
def test_transfer_that_splits_a_logical_block_fails(sector: int, nbytes: int) -> None:
    with Guest(block=NativeBlock(size=MIB, block_size=4096)) as guest:
        assert guest.ask(IN, sector, room=nbytes).status == IOERR


@pytest.mark.parametrize(
    "serial",
    ["guest", "x" * 19, "x" * 20, ""],
)
def test_get_id_is_padded_with_nul(serial: str) -> None:
    with Guest(block=NativeBlock(size=MIB, serial=serial)) as guest:
        assert guest.ask(GET_ID, room=20) == (OK, 21, serial.encode().ljust(20, b"\0"))


def test_get_id_never_gives_more_than_twenty_bytes() -> None:
    with Guest(block=NativeBlock(size=MIB, serial="x" * 20)) as guest:
        assert guest.ask(GET_ID, room=40) == (OK, 21, b"x" * 20 + bytes([UNTOUCHED]) * 20)


@pytest.mark.parametrize(("nsectors", "status"), [(32768, OK), (32769, IOERR)])
@pytest.mark.parametrize("type", [DISCARD, WRITE_ZEROES])
def test_one_segment_has_a_limit(type: int, nsectors: int, status: int) -> None:
    block = NativeBlock(size=64 * MIB, max_range_sectors=32768)
    with Guest(block=block) as guest:
        assert guest.ask(type, 0, data=bytes(8) + nsectors.to_bytes(8, "little")).status == status


def test_get_id_fills_a_short_buffer() -> None:
    with Guest(block=NativeBlock(size=MIB, serial="guest")) as guest:
        assert guest.ask(GET_ID, room=3) == (OK, 4, b"gue")


# requests that Python serves


def test_request_reaches_python_parsed() -> None:
    seen: list[tuple[int, int, int, int]] = []

    def note(request: Request) -> None:
        seen.append((request.type, request.offset, request.nbytes, request.flags))
        request.finish(OK)

    segment = (8).to_bytes(8, "little") + (16 + (1 << 32)).to_bytes(8, "little")
    with Guest(on_request=note) as guest:
        guest.ask(IN, 8, room=1024)
        guest.ask(OUT, 16, data=bytes(512))
        guest.ask(WRITE_ZEROES, data=segment)
        guest.ask(FLUSH)
        assert guest.counters.python_requests == 4
    assert seen == [(IN, 4096, 1024, 0), (OUT, 8192, 512, 0), (WRITE_ZEROES, 4096, 8192, 1), (FLUSH, 0, 0, 0)]


@pytest.mark.parametrize("cut", [1, 15, 17, 100, 511, 513])
def test_python_sees_the_data_whatever_the_split(cut: int) -> None:
    seen: list[bytes] = []

    def note(request: Request) -> None:
        seen.append(request.data().load())
        seen.append(request.data().slice(100, 200).load())
        request.finish(OK)

    data = os.urandom(1024)
    with Guest(on_request=note) as guest:
        guest.ask(OUT, 0, data=data, cuts=[cut, cut + 300])
    assert seen == [data, data[100:300]]


def test_python_fills_the_data() -> None:
    def fill(request: Request) -> None:
        data = request.data()
        data.store(b"\x01" * 1024)
        data.slice(10, 4).store(b"abcd")
        data.slice(1000, 24).zero()
        request.finish(OK)

    with Guest(on_request=fill) as guest:
        answer = guest.ask(IN, 0, room=1024, cuts=[11, 13, 1001])
    assert answer.data == b"\x01" * 10 + b"abcd" + b"\x01" * 986 + bytes(24)


@pytest.mark.parametrize("status", [OK, IOERR, UNSUPP])
def test_python_chooses_the_status(status: int) -> None:
    with Guest(on_request=lambda request: request.finish(status)) as guest:
        assert guest.ask(OUT, 0, data=bytes(512)).status == status


def test_request_finishes_only_once() -> None:
    errors: list[OSError] = []

    def finish_twice(request: Request) -> None:
        request.finish(OK)
        for misuse in (lambda: request.finish(OK), lambda: request.data().load()):
            with pytest.raises(OSError) as caught:
                misuse()
            errors.append(caught.value)

    with Guest(on_request=finish_twice) as guest:
        guest.ask(IN, 0, room=512)
    assert [error.strerror for error in errors] == ["Stale file handle"] * 2


def test_slice_of_a_finished_request_does_not_touch_the_next_one() -> None:
    kept: list[Request] = []

    def keep(request: Request) -> None:
        if kept:
            with pytest.raises(OSError):
                kept[0].data().store(bytes(512))
        kept.append(request)
        request.finish(OK)

    with Guest(on_request=keep, queue_size=4) as guest:
        assert [guest.ask(IN, 0, room=512).data for _ in range(3)] == [bytes([UNTOUCHED]) * 512] * 3


def test_slice_outside_the_request_is_refused() -> None:
    def overreach(request: Request) -> None:
        with pytest.raises(ValueError):
            request.data().slice(500, 13)
        with pytest.raises(ValueError):
            request.data().store(bytes(511))
        request.finish(OK)

    with Guest(on_request=overreach) as guest:
        assert guest.ask(IN, 0, room=512).status == OK


def test_error_in_python_ends_the_worker_loudly() -> None:
    def fail(request: Request) -> None:
        raise LookupError("a bug")

    with Guest(on_request=fail) as guest:
        guest.post(IN, 0, room=512)
        guest.queue.kick()
        with pytest.raises(LookupError, match="a bug"):
            guest.worker.stop()


def test_request_kept_past_the_end_of_the_worker_is_stale() -> None:
    kept: list[Request] = []

    def keep(request: Request) -> None:
        kept.append(request)
        request.finish(OK)

    with Guest(on_request=keep) as guest:
        guest.ask(IN, 0, room=512)
    with pytest.raises(OSError, match="Stale"):
        kept[0].finish(OK)
    with pytest.raises(OSError, match="Stale"):
        kept[0].data().load()
