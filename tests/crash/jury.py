"""Every judge of the engine by one line that names it and what it looks at.

- `SORT/CACHE/SEED/WORKLOAD`: the crash explorer visits every state of a workload;
- `live SORT/CACHE/SEED/WORKLOAD`: nobody dies, and what reads find is compared;
- `faults SORT/CACHE/WORKLOAD`: each of its operations fails, `tests/crash/life.py`;
- `crowd SORT/CACHE/SEED/WORKLOAD`: the same, while neighbours write into the same clusters, and much completes at once;
- `hostile CASE`: an image that lies, `tests/crash/hostile.py`;
- `alone CASE`: two processes meet on an image, `tests/crash/alone.py`;
- `between CASE`: something happens to a dead process's image or its link log, `tests/crash/between.py`.
"""

from tests.crash.alone import meet
from tests.crash.between import intervene
from tests.crash.campaign import explore, parse, run_workload, scene_of
from tests.crash.explorer import Violation
from tests.crash.hostile import face
from tests.crash.life import Host
from tests.crash.sequence import SORTS


def sit(line: str) -> int:
    """Let the judge that *line* names look at the engine; how many states, operations, lives or cases it saw.

    Raises: Violation if a law is broken.
    """
    judge, _, what = line.rpartition(" ")
    try:
        match judge:
            case "live":
                return _watch(what)
            case "faults":
                return _face_faults(what)
            case "crowd":
                sort, cache, crowd, sequence = what.split("/")
                return _face_faults(f"{sort}/{cache}/{sequence}", int(crowd))
            case "hostile":
                return face(what)
            case "alone":
                return meet(what)
            case "between":
                return intervene(what)
            case _:
                return _explore(line)
    except Violation:
        raise
    except Exception as error:  # a broken engine may also fall over
        raise Violation(f"{line}: {type(error).__name__}: {error}") from error


def _watch(what: str) -> int:
    run, _ = run_workload(parse(what)[0])
    return len(run.journal)


def _face_faults(what: str, crowd: int | None = None) -> int:
    sort, cache, sequence = what.split("/")
    host = Host(SORTS[sort], cache, crowd)
    host.live_with_every_fault(tuple(sequence.split("+")))
    return host.outcomes.total()


def _explore(line: str) -> int:
    workload, _ = parse(line)
    scene = scene_of(workload, None)
    explore(workload, scene)
    return scene.count.states
