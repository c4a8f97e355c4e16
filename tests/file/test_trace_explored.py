"""What the real daemon did under load, judged by the laws; and what it would have to do wrong to be found out."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from ring.trace import Kind, Record, TraceError, read_trace
from tests.builder import Recipe, build
from tests.builder.record import BACKING_FORMAT, LAZY_REFCOUNTS
from tests.crash.driver import SimulatedFile
from tests.crash.explorer import Violation
from tests.crash.recorded import FLUSH, OUT, Recorded, adapt
from tests.crash.survey import Survey
from tests.frontend import FrontEnd
from tests.kill.ledger import Ledger
from tests.kill.load import Load
from tests.program import Daemon

NBYTES = 4 << 20
CLUSTER_BITS = 12
OFFSET_MASK = 0x00FFFFFFFFFFFE00
DIRTY_BIT_OFFSET = 72
EARLY = 3  # where one of many is broken: every point before it is visited in vain

Records = list[Record]


@dataclass(frozen=True)
class Traced:
    """A trace and what its image was."""

    records: Records
    contents: bytes
    backing: SimulatedFile | None

    def run(self, records: Records | None = None) -> Recorded:
        return adapt(self.records if records is None else records, self.contents, self.backing)


@cache
def traced(kind: str, cache_mode: str, *, depth: int = 8, count: int = 50) -> Traced:
    """A load on two queues of the daemon; *kind* is lazy, accurate, overlay or overlay-lazy."""
    recipe = Recipe(size=NBYTES, cluster_bits=CLUSTER_BITS, compatible=LAZY_REFCOUNTS if "lazy" in kind else 0)
    base = random.Random(1).randbytes(NBYTES - 70_000) if "overlay" in kind else b""
    with TemporaryDirectory() as name:
        directory = Path(name)
        if base:
            (directory / "base").write_bytes(base)
            recipe.backing = "base"
            recipe.extensions = [(BACKING_FORMAT, b"raw")]
        path = build(recipe, directory / "a").path
        contents = recipe.contents(base)
        with Daemon(path, f"--cache={cache_mode}", f"--trace-io={directory / 'trace'}") as daemon:
            with FrontEnd(daemon.socket_path, queues=2) as guest:
                draw = random.Random(f"{kind} {cache_mode}")
                load = Load(guest, Ledger(contents), draw, cluster_sectors=1 << CLUSTER_BITS - 9, depth=depth)
                load.run(count)
                load.drain()
            daemon.stop()
        records = list(read_trace(directory / "trace"))
    return Traced(records, contents, SimulatedFile.parse("base", base) if base else None)


def survey(run: Recorded, npoints: int, seed: int = 0) -> int:
    return Survey(run, 1 << CLUSTER_BITS - 9, seed, samples=1).visit(npoints)


@pytest.mark.sample(3)
@pytest.mark.parametrize("cache_mode", ["writeback", "writethrough"])
@pytest.mark.parametrize("kind", ["lazy", "accurate", "overlay", "overlay-lazy"])
def test_no_death_of_the_real_daemon_breaks_a_law(kind: str, cache_mode: str) -> None:
    assert survey(traced(kind, cache_mode).run(), 30) > 50


# The judge can fail


def without(records: Records, dropped: set[int]) -> Records:
    """As if the operations of these ids had never been made."""
    operations = (Kind.WRITE, Kind.ZERO, Kind.RESIZE, Kind.SYNC, Kind.DONE)
    return [record for record in records if not (record.kind in operations and record.id in dropped)]


def moved(records: Records, numbers: set[int], before: int) -> Records:
    """The operations *numbers* issued and done right before the operation *before* is issued."""
    early = [record for record in records if record.kind in (Kind.WRITE, Kind.DONE) and record.id in numbers]
    rest = without(records, numbers)
    at = next(i for i, record in enumerate(rest) if (record.kind, record.id) == (Kind.WRITE, before))
    return [*rest[:at], *early, *rest[at:]]


def links(records: Records) -> list[tuple[Record, Record]]:
    """Entries of tables that are written one at a time, and the guest's data that each leads to."""
    found = []
    writes = [record for record in records if record.kind == Kind.WRITE]
    for link in writes:
        target = int.from_bytes(link.content, "big") & OFFSET_MASK if link.nbytes == 8 else 0
        data = [
            w for w in writes if w.id < link.id and w.nbytes > 8 and target <= w.offset < target + (1 << CLUSTER_BITS)
        ]
        if target and link.offset > DIRTY_BIT_OFFSET and data:
            found.append((link, data[-1]))
    return found


def no_sync_at_all(records: Records) -> Records:
    return without(records, {record.id for record in records if record.kind == Kind.SYNC})


def one_sync_is_left_out(records: Records) -> Records:
    """The one that the first answered write waited for."""
    syncs = {record.id for record in records if record.kind == Kind.SYNC}
    answer = next(i for i, record in enumerate(records) if (record.kind, record.type) == (Kind.ANSWER, OUT))
    served = [record.id for record in records[:answer] if record.kind == Kind.DONE and record.id in syncs]
    return without(records, {served[-1]})


def flushes_are_answered_at_once(records: Records) -> Records:
    moved_records: Records = []
    asked = {record.id: record for record in records if record.kind == Kind.REQUEST and record.type == FLUSH}
    for record in records:
        if record.kind == Kind.ANSWER and record.id in asked:
            continue
        moved_records.append(record)
        if record.kind == Kind.REQUEST and record.id in asked:
            moved_records.append(Record(Kind.ANSWER, id=record.id, type=FLUSH))
    return moved_records


def a_link_comes_before_its_data(records: Records) -> Records:
    link, data = links(records)[EARLY]
    return moved(records, {link.id}, data.id)


def a_link_is_left_out(records: Records) -> Records:
    return without(records, {links(records)[EARLY][0].id})


def the_link_log_is_not_written(records: Records) -> Records:
    assert any(record.kind == Kind.STORE for record in records)
    return [record for record in records if record.kind != Kind.STORE]


def data_is_done_after_the_answer(records: Records) -> Records:
    """All data writes stay in flight to the end."""
    late = {data.id for _, data in links(records)}
    return [r for r in records if not (r.kind == Kind.DONE and r.id in late)]


def the_dirty_bit_is_not_set(records: Records) -> Records:
    return without(records, {r.id for r in records if (r.kind, r.offset) == (Kind.WRITE, DIRTY_BIT_OFFSET)})


def clusters_are_not_counted(records: Records) -> Records:
    """The metadata that is neither an entry of a table nor the header's is not written."""
    leads = {link.id for link, _ in links(records)} | {data.id for _, data in links(records)}
    asked = {r.content for r in records if r.kind == Kind.REQUEST}
    return without(
        records,
        {
            r.id
            for r in records
            if r.kind == Kind.WRITE and r.id not in leads and r.nbytes > 8 and r.content not in asked
        },
    )


MUTANTS: list[tuple[Callable[[Records], Records], str, str]] = [
    (no_sync_at_all, "lazy", "writeback"),
    (no_sync_at_all, "accurate", "writethrough"),
    (one_sync_is_left_out, "accurate", "writethrough"),
    (flushes_are_answered_at_once, "lazy", "writeback"),
    (a_link_comes_before_its_data, "overlay", "writeback"),
    (a_link_is_left_out, "accurate", "writeback"),
    (the_link_log_is_not_written, "overlay", "writeback"),
    (data_is_done_after_the_answer, "lazy", "writeback"),
    (the_dirty_bit_is_not_set, "lazy", "writeback"),
    (clusters_are_not_counted, "accurate", "writeback"),
]


@pytest.mark.sample(3)
@pytest.mark.parametrize(("mutant", "kind", "cache_mode"), MUTANTS)
def test_a_trace_that_was_changed_is_found_out(
    mutant: Callable[[Records], Records], kind: str, cache_mode: str
) -> None:
    with pytest.raises(Violation):  # noqa: PT012
        for count in range(50, 60):  # a break shows only if the requests of a trace happen to meet: not in every one
            one = traced(kind, cache_mode, count=count)
            survey(one.run(mutant(one.records)), 1000)


def test_a_trace_of_a_failed_operation_is_refused() -> None:
    one = traced("lazy", "writeback")
    last = max(index for index, record in enumerate(one.records) if record.kind == Kind.DONE)
    failed = [*one.records[:last], one.records[last]._replace(result=-5), *one.records[last + 1 :]]
    with pytest.raises(TraceError, match="EIO"):
        one.run(failed)


def test_a_prefix_of_a_trace_is_as_good() -> None:
    one = traced("overlay", "writethrough")
    assert survey(one.run(one.records[: len(one.records) // 2]), 20) > 50
