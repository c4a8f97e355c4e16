"""`--trace-io`: what the daemon was asked, what it issued and when each came to an end, in one order."""

import os
import resource
from collections.abc import Iterable
from pathlib import Path

import pytest

from ring.trace import Flag, Kind, Record, Trace, TraceError, read_trace
from tests.blockguest import FLUSH, IOERR, OK, OUT, Guest
from tests.builder import Recipe, build
from tests.builder.record import BACKING_FORMAT, LAZY_REFCOUNTS
from tests.frontend import DISCARD, FrontEnd
from tests.patience import TIMEOUT
from tests.program import Daemon

SIZE = 16 << 20
CHANGES = (Kind.WRITE, Kind.ZERO, Kind.RESIZE)


def serve(directory: Path, *options: str, lazy: bool = True, backing: bool = False) -> list[Record]:
    """A few requests one after the other to a daemon that traces; what it recorded."""
    recipe = Recipe(size=SIZE, compatible=LAZY_REFCOUNTS if lazy else 0)
    recipe.data(3, b"old " * 16384)
    if backing:
        build(Recipe(size=SIZE), directory / "base")
        recipe.backing = "base"
        recipe.extensions = [(BACKING_FORMAT, b"qcow2")]
    path = build(recipe, directory / "a").path
    with Daemon(path, f"--trace-io={directory / 'trace'}", *options) as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            guest.write(0, b"new " * 1024)
            guest.write(3 << 16, b"over" * 1024)
            guest.flush()
            guest.discard(3 << 16, 1 << 16)
            guest.read(0, 4096)
        daemon.stop()
    return list(read_trace(directory / "trace"))


def is_link(record: Record) -> bool:
    """An entry of an L1 or L2 table is written; cluster 0 is the header."""
    return (record.kind, record.nbytes) == (Kind.WRITE, 8) and record.offset >= 1 << 16


def index_of(records: list[Record], kind: Kind, content: bytes) -> int:
    return next(i for i, record in enumerate(records) if record.kind == kind and record.content == content)


def end_of(records: list[Record], kind: Kind, begun: int) -> int:
    return next(i for i, record in enumerate(records) if (record.kind, record.id) == (kind, records[begun].id))


def test_a_write_is_asked_issued_done_linked_and_answered(tmp_path: Path) -> None:
    """An allocating write (Python's) and an overwrite in place (C alone)."""
    records = serve(tmp_path)
    for content, allocates in ((b"new " * 1024, True), (b"over" * 1024, False)):
        asked = index_of(records, Kind.REQUEST, content)
        issued = index_of(records, Kind.WRITE, content)
        done, answered = end_of(records, Kind.DONE, issued), end_of(records, Kind.ANSWER, asked)
        assert asked < issued < done < answered
        assert (records[done].result, records[answered].result) == (len(content), OK)
        links = [record for record in records[done:answered] if is_link(record)]
        assert len(links) == allocates


def test_a_flush_is_answered_after_a_sync_that_began_after_it_was_asked(tmp_path: Path) -> None:
    records = serve(tmp_path)
    asked = next(i for i, record in enumerate(records) if (record.kind, record.type) == (Kind.REQUEST, FLUSH))
    begun = next(i for i, record in enumerate(records) if record.kind == Kind.SYNC and i > asked)
    assert end_of(records, Kind.DONE, begun) < end_of(records, Kind.ANSWER, asked)


def test_every_operation_and_every_request_comes_to_an_end(tmp_path: Path) -> None:
    records = serve(tmp_path)
    begun = [record.id for record in records if record.kind in (*CHANGES, Kind.SYNC)]
    assert begun == list(range(1, len(begun) + 1))
    assert sorted(record.id for record in records if record.kind == Kind.DONE) == begun
    asked = [(record.id, record.type) for record in records if record.kind == Kind.REQUEST]
    assert [(record.id, record.type) for record in records if record.kind == Kind.ANSWER] == asked
    assert [type_ for _, type_ in asked] == [OUT, OUT, FLUSH, DISCARD]
    assert {Kind.RESIZE, Kind.ZERO} <= {record.kind for record in records}


@pytest.mark.parametrize("cache", ["writeback", "writethrough"])
def test_requests_say_whether_they_must_be_stable(tmp_path: Path, cache: str) -> None:
    records = serve(tmp_path, f"--cache={cache}")
    wanted = Flag.WRITETHROUGH if cache == "writethrough" else Flag(0)
    assert {record.flags for record in records if record.kind == Kind.REQUEST} == {wanted}


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "accurate"])
def test_the_trace_alone_makes_the_image_as_the_worker_left_it(tmp_path: Path, lazy: bool) -> None:
    """The clean close comes after it: the guest's bytes and every mapping are in place before."""
    records = serve(tmp_path, lazy=lazy, backing=True)
    files = {record.slot: record for record in records if record.kind == Kind.FILE}
    assert [os.path.basename(files[slot].content) for slot in sorted(files)] == [b"a", b"base"]
    assert [files[slot].flags for slot in sorted(files)] == [Flag.WRITABLE, Flag(0)]
    assert {record.slot for record in records if record.kind in (Kind.CONTENT, *CHANGES)} == {0}
    replayed = replay(records, files[0].nbytes)
    left = (tmp_path / "a").read_bytes()
    issued = next(r for r in records if (r.kind, r.content) == (Kind.WRITE, b"new " * 1024))
    assert replayed[issued.offset : issued.offset + 4096] == left[issued.offset : issued.offset + 4096]
    l2 = next(filter(is_link, records))
    table = l2.offset >> 16 << 16
    assert replayed[table : table + 65536] == left[table : table + 65536]


def replay(records: Iterable[Record], nbytes: int) -> bytes:
    """Slot 0 after all of them."""
    file = bytearray(nbytes)
    for record in records:
        end = record.offset + record.nbytes
        if record.slot != 0:
            continue
        if record.kind in (Kind.CONTENT, Kind.WRITE):
            file.extend(bytes(max(0, end - len(file))))
            file[record.offset : end] = record.content
        elif record.kind == Kind.ZERO:
            file[record.offset : end] = bytes(len(file[record.offset : end]))
        elif record.kind == Kind.RESIZE:
            del file[record.nbytes :]
            file.extend(bytes(record.nbytes - len(file)))
    return bytes(file)


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    path = build(Recipe(size=SIZE), tmp_path / "a").path
    before = path.read_bytes()
    with Daemon(path, f"--trace-io={path}") as daemon:
        assert daemon.process.wait(TIMEOUT) == 1
        assert daemon.process.stderr is not None
        assert "File exists" in daemon.process.stderr.read()
    assert path.read_bytes() == before


@pytest.fixture
def traced(tmp_path: Path) -> Path:
    return tmp_path / "trace"


def test_a_full_trace_says_so_and_the_guest_goes_on(tmp_path: Path, traced: Path) -> None:
    with open(tmp_path / "disk", "w+b") as disk:
        disk.truncate(1 << 20)
        with Trace(str(traced), limit=20_000) as trace:
            with Guest(disk.fileno()) as guest:
                guest.worker.call(lambda: guest.worker.set_trace(trace))
                for sector in range(10):
                    assert guest.ask(OUT, sector, data=b"x" * 4096).status == OK
        assert os.strerror(trace.error) == "File too large"
    assert traced.stat().st_size <= 20_000
    records = list(read_trace(traced))
    assert records[-1].kind == Kind.FULL
    assert sum(record.kind == Kind.REQUEST for record in records) in (2, 3)


def test_a_trace_that_the_host_refuses_does_not_fail_the_guest(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 18))
    with Daemon(tmp_path / "disk", "--format=raw", f"--trace-io={tmp_path / 'trace'}") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (3 << 19, 3 << 19))
            for _ in range(20):
                guest.write(0, b"x" * (1 << 18))
            guest.flush()
        daemon.stop()
        assert daemon.process.stderr is not None
        assert f"{tmp_path / 'trace'}: the trace ends early: File too large" in daemon.process.stderr.read()
    assert 0 < sum(record.kind == Kind.REQUEST for record in read_trace(tmp_path / "trace")) < 20


def test_what_is_too_large_for_a_trace_is_refused(tmp_path: Path, traced: Path) -> None:
    with open(tmp_path / "disk", "w+b") as disk, Trace(str(traced), limit=20_000) as trace:
        disk.write(b"x" * 30_000)
        disk.flush()
        with pytest.raises(OSError, match="too large"):
            trace.add_file(0, disk.fileno(), "disk", writable=True)


def test_a_cut_trace_is_good_up_to_the_cut(tmp_path: Path) -> None:
    records = serve(tmp_path)
    whole = (tmp_path / "trace").read_bytes()
    cut = tmp_path / "cut"
    for nbytes in (len(whole) - 1, len(whole) - 49, len(whole) // 2, 64):
        cut.write_bytes(whole[:nbytes])
        read = list(read_trace(cut))
        assert read == records[: len(read)]
        assert len(read) < len(records)


@pytest.mark.parametrize("content", [b"", b"QFI\xfb" * 100, bytes(4096)], ids=["empty", "image", "zeros"])
def test_what_is_no_trace_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(TraceError):
        list(read_trace(tmp_path / "other"))


def test_refused_writes_are_answered_in_the_trace_too(tmp_path: Path, traced: Path) -> None:
    with open(tmp_path / "disk", "w+b") as disk, Trace(str(traced)) as trace:
        disk.truncate(1 << 20)
        with open(disk.name, "rb") as unwritable, Guest(unwritable.fileno()) as guest:
            guest.worker.call(lambda: guest.worker.set_trace(trace))
            assert guest.ask(OUT, 0, data=b"x" * 4096).status == IOERR
    assert [(record.kind, record.result) for record in read_trace(traced)] == [
        (Kind.REQUEST, 0),
        (Kind.WRITE, 0),
        (Kind.DONE, -9),
        (Kind.ANSWER, IOERR),
    ]
