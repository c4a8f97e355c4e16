"""Jobs beside a guest: however long a stretch needs nothing of the disk, the guest's requests get their turns in it."""

from collections.abc import Coroutine, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import qcow2
from qcow2.driver.file import HostFile, go_on, outcome, run
from qcow2.driver.operation import Compute, Grace, Operation, Read, ReadInto, Sync
from qcow2.driver.task import Scheduler, Task
from qcow2.engine.image import Image
from qcow2.engine.opened import OpenOptions
from qcow2.job.commit import commit
from qcow2.job.crew import BESIDE_A_GUEST, Windows
from qcow2.job.mirror import Mirror
from qcow2.job.reins import Reins
from qcow2.job.stream import stream
from qcow2.job.visible import require_hidden
from qcow2.plane.l2cache import Run
from vhost.frozen import Frozen, Wanted

CLUSTER = 64 << 10
NCLUSTERS = 1024
SIZE = NCLUSTERS * CLUSTER
TURNS = (Compute, Grace, Read, ReadInto, Sync)  # the worker serves its rings before these are done
MOST = 200  # looks at a mapping, 5 us each or so, between two turns


class Looked(Image):
    """Counts who looks at its mapping."""

    looks = 0

    async def resolve(self, guest_offset: int, nbytes: int) -> Run:
        self.looks += 1
        return await super().resolve(guest_offset, nbytes)


class Thread:
    """Runs a job as a worker does, and counts how often it looks at *image* between two turns of others."""

    def __init__(self, image: Looked) -> None:
        self._image = image
        self._scheduler = Scheduler(self._start)
        self._last = image.looks
        self.longest = 0

    def _start(self, task: Task, operation: Operation) -> None:
        if isinstance(operation, TURNS):
            self._take_turn()
        go_on(self._scheduler, task, *outcome(operation))

    def _take_turn(self) -> None:
        self.longest = max(self.longest, self._image.looks - self._last)
        self._last = self._image.looks

    def run(self, job: Coroutine[Any, Any, None]) -> None:
        ended: list[Task] = []
        self._scheduler.spawn(job, ended.append)
        self._scheduler.run()
        assert ended[0].take_error() is None
        self._take_turn()


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[tuple[Looked, Image, Image]]:
    """A disk of zeros in 1,024 pieces, which each other one keeps its place for, with a snapshot; its base; a copy."""
    paths = [tmp_path / name for name in ("base", "top", "copy")]
    qcow2.create(paths[0], size=SIZE)
    qcow2.create(paths[1], size=SIZE, backing=paths[0])
    with qcow2.open(paths[1], "r+") as disk:
        disk.create_snapshot("one")
        for cluster in range(0, NCLUSTERS, 2):
            disk.write(cluster * CLUSTER, b"w" * CLUSTER)
            disk.write_zeroes(cluster * CLUSTER, CLUSTER, unmap=False)
    qcow2.create(paths[2], size=SIZE)
    options = OpenOptions(writable=True)
    with ExitStack() as stack:
        base, top, copy = (stack.enter_context(HostFile.open(str(path), writable=True)) for path in paths)
        below = run(Image.open(base, options=options))
        image = run(Looked.open(top, backing=below, options=options))
        assert isinstance(image, Looked)
        yield image, below, run(Image.open(copy, options=options))


def jobs_of(image: Looked, base: Image, copy: Image) -> dict[str, Coroutine[Any, Any, None]]:
    frozen = Frozen(image, Wanted(SIZE, [(0, SIZE)]), lambda saved: frozen.taken(0))  # of zeros
    mirror = Mirror(image, copy, only_top=False, is_new=True)
    return {
        "stream": stream(image, None, Reins(), Windows(*BESIDE_A_GUEST)),
        "commit": commit(image, base, Reins(), Windows(*BESIDE_A_GUEST)),
        "commit, looking at snapshots": require_hidden(image, base, 1, Reins()),
        "mirror": mirror.catch_up(Reins(), width=4),
        "backup": frozen.walk(Reins()),
    }


@pytest.mark.parametrize("kind", ["stream", "commit", "commit, looking at snapshots", "mirror", "backup"])
def test_guests_have_turns_in_a_long_stretch_without_data(chain: tuple[Looked, Image, Image], kind: str) -> None:
    image, base, copy = chain
    if kind == "stream":
        run(image.delete_snapshot("one"))
    jobs = jobs_of(image, base, copy)
    job = jobs.pop(kind)
    for other in jobs.values():
        other.close()
    looks = image.looks
    thread = Thread(image)
    thread.run(job)
    assert image.looks - looks >= NCLUSTERS
    assert thread.longest <= MOST
