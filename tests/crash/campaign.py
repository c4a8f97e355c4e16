"""Workloads by name, run and walked; what a line that a failure printed means.

A workload is a sequence of actions (`allocate+discard+reopen`), or random ones in several streams,
`random-REQUESTSxDEPTH`, the same while others read, `read-REQUESTSxDEPTH`, or while much completes at once,
`burst-REQUESTSxDEPTH`. A state is
`SORT/CACHE/SEED/WORKLOAD/POSITION,DEATH,KEPT`, and `/RECOVERY/POSITION,DEATH,KEPT` after it for a death in a recovery.
DEATH is `kill`, `power`, or `restored MOMENT`: a copy of the file, made at that moment with KEPT, is put back after a
kill.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.crash.driver import CrashDriver
from tests.crash.explorer import Run, Violation
from tests.crash.history import SIZE, History, size_sector
from tests.crash.images import open_image
from tests.crash.opening import look
from tests.crash.sequence import MANY_TABLES, OVERLAYS, SORTS, Sort, beginning, fullness, sequences, steps_of
from tests.crash.walk import Judge, Scene, Walk
from tests.crash.workload import MOST_READ, Action, Guest, random_action

CACHES = ("writeback", "writethrough")
NAMED = {**SORTS, **OVERLAYS, **MANY_TABLES}
KINDS = ("random-", "read-", "burst-")
WRITERS_A_READER = 4
RESTORED = "restored "  # the death after which a copy, made at the moment that follows, is put back


@dataclass(frozen=True)
class Workload:
    """What is done to which image."""

    sort: Sort
    cache: str
    seed: int
    what: str

    def __str__(self) -> str:
        return f"{self.sort.name}/{self.cache}/{self.seed}/{self.what}"

    @property
    def sequence(self) -> tuple[str, ...]:
        return () if self.what.startswith(KINDS) else tuple(self.what.split("+"))

    @property
    def full(self) -> str:
        return fullness(self.sequence)


def run_workload(workload: Workload) -> tuple[Run, int]:
    """The run, read at its end and closed; and the length of its journal when the last action began.

    Raises: Violation if what it reads while it lives is wrong.
    """
    begun = beginning(workload.sort, workload.full)
    file = begun.image.copy()
    initial = file.copy()
    driver = CrashDriver(workload.seed, at_once=workload.what.startswith("burst-"))
    writethrough = workload.cache == "writethrough"
    beyond = {**begun.beyond, SIZE: size_sector(workload.sort.nsectors * 512)}
    history = History(begun.contents, writethrough=writethrough, beyond=beyond)
    image = driver.run(open_image(file, begun.backing, writethrough=writethrough))
    guest = Guest(driver, image, history)
    last = 0
    if workload.sequence:
        for step in steps_of(workload.sort, workload.sequence):
            last = len(driver.journal)
            for action in step:
                driver.spawn(guest.act(action))
            driver.finish()
            if step[0].kind == "reopen":
                driver.run(guest.image.close())
                guest.image = driver.run(open_image(file, begun.backing, writethrough=writethrough, life=last))
    else:
        run_at_random(workload, driver, guest)
    now = len(driver.journal)
    Judge(history, driver.journal).judge(driver.run(look(guest.image)), now, power=False)
    driver.run(guest.image.close())
    if guest.failures:
        raise guest.failures[0]
    return Run(str(workload), initial, file, driver.journal, history), last


def run_at_random(workload: Workload, driver: CrashDriver, guest: Guest) -> None:
    """Several streams of requests at once, none waits for another."""
    kind, _, numbers = workload.what.partition("-")
    requests, depth = map(int, numbers.split("x"))
    draw = random.Random(workload.seed)
    sort = workload.sort
    nsectors = sort.nsectors if sort.tables > 1 else min(sort.nsectors, 24 * sort.cluster_sectors)
    writing = depth

    async def stream(actions: list[Action]) -> None:
        nonlocal writing
        for action in actions:
            await guest.act(action)
        writing -= 1

    async def read() -> None:
        while writing:
            first = draw.randrange(sort.nsectors)
            await guest.act(Action("read", first, min(draw.randint(1, MOST_READ), sort.nsectors - first)))

    actions = [random_action(draw, nsectors, sort.cluster_sectors) for _ in range(requests)]
    for index in range(depth):
        driver.spawn(stream(actions[index::depth]))
    for _ in range(depth // WRITERS_A_READER if kind == "read" else 0):
        driver.spawn(read())
    driver.finish()


def explore(workload: Workload, scene: Scene, *, only_last: bool = False) -> None:
    """Visit every state of *workload*; *only_last*, what came before its last action has been visited already.

    Raises: Violation.
    """
    try:
        run, last = run_workload(workload)
        scene.count.workloads += 1
        Walk(run, scene, workload.seed).visit(last if only_last else 0)
    except Violation:
        raise
    except Exception as error:  # an engine that cannot even run it
        raise Violation(f"{workload}/: {type(error).__name__}: {error}") from error


def sequences_of(sort: Sort, cache: str, seed: int, length: int) -> Iterator[Workload]:
    """Every sequence of *length* that makes sense on the sort."""
    for sequence in sequences(sort, length):
        yield Workload(sort, cache, seed, "+".join(sequence))


def scene_of(workload: Workload, directory: Path | None) -> Scene:
    """Where the states of *workload*, and of others from the same image, are opened."""
    return Scene(beginning(workload.sort, workload.full).backing, directory)


def parse(line: str) -> tuple[Workload, list[str]]:
    """A line that a failure printed: the workload, a death, the recovery, and the death in that."""
    sort, cache, seed, what, *deaths = line.split(":")[0].strip().split("/")
    return Workload(NAMED[sort], cache, int(seed), what), [*filter(None, deaths)]


def parse_death(death: str) -> tuple[int, str, list[str]]:
    """Where, how, and what it kept."""
    position, how, kept = death.split(",")
    return int(position), how, [one for one in kept.split("-") if one]


def replay(line: str) -> None:
    """Visit the one state that *line* names. Raises: Violation."""
    workload, deaths = parse(line)
    scene = scene_of(workload, None)
    if not deaths:
        explore(workload, scene)
        return
    run, _ = run_workload(workload)
    walk = Walk(run, scene, workload.seed)
    position, how, kept = parse_death(deaths[0])
    if how.startswith(RESTORED):
        walk.replay_copy(int(how.removeprefix(RESTORED)), kept, position)
        return
    if len(deaths) > 1:
        walk = walk.replay_recovery(position, kept, power=how == "power", how=deaths[1])
        position, how, kept = parse_death(deaths[2])
    walk.replay(position, kept, power=how == "power")
