"""Visits images that may be hostile, in a process with little memory and little time, and says how each visit ended.

`python -m tests.visitor ACTION IMAGE...` prints one JSON object an image: its path, how it ended ("done", "refused" or
"failed") and a line of text. A crash or a hang of the process names the image by being the first one missing.
"""

import io
import json
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.patience import TIMEOUT

ADDRESS_SPACE = 1 << 30
SECONDS = 10  # of a processor, for one image
PROBE = 1 << 16


@dataclass(frozen=True)
class Visit:
    """How one visit ended."""

    path: str
    end: str
    text: str


def visit(action: str, paths: Sequence[Path]) -> list[Visit]:
    """Visit each image for *action*, one of `ACTIONS`, in a process of its own."""
    command = [sys.executable, "-m", "tests.visitor", action, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT + len(paths))
    visits = [Visit(**json.loads(line)) for line in done.stdout.splitlines()]
    assert len(visits) == len(paths), (
        f"{action} of {paths[len(visits)]}: exit {done.returncode}: {done.stderr[-2000:]}, after {visits[-1:]}"
    )
    return visits


def _places(size: int) -> list[int]:
    """Where to look on a disk that may claim to be enormous."""
    spread = [size // 8 * eighth for eighth in range(8)]
    near = list(range(0, min(size, 20 * PROBE), PROBE))
    return sorted(
        {min(place // 512 * 512, max(size - PROBE, 0)) for place in [*near, *spread, size - PROBE] if place >= 0}
    )


def _try_all(deeds: Iterable[Callable[[], object]]) -> None:
    """Do each of *deeds*, whatever became of the ones before; then raise what went wrong first."""
    import qcow2

    refusal: Exception | None = None
    for deed in deeds:
        try:
            deed()
        except (OSError, qcow2.ImageError) as error:
            refusal = refusal or error
    if refusal is not None:
        raise refusal


def read(path: str) -> None:
    import qcow2

    with qcow2.open(path) as disk:
        _try_all(partial(disk.read, place, min(PROBE, disk.size - place)) for place in _places(disk.size))


def write(path: str) -> None:
    import qcow2

    with qcow2.open(path, writable=True) as disk:
        deeds: list[Callable[[], object]] = []
        for number, place in enumerate(_places(disk.size)):
            nbytes = min(PROBE, disk.size - place)
            deeds += [
                [partial(disk.write, place + nbytes // 3, b"\xa5" * (nbytes // 3))],
                [partial(disk.write_zeroes, place, nbytes, unmap=True), partial(disk.write, place, b"\x5a" * 512)],
                [partial(disk.discard, place, nbytes), disk.flush, partial(disk.write, place, b"\x5a" * nbytes)],
            ][number % 3]
        _try_all(deeds)


def _tool(*arguments: str) -> Callable[[str], None]:
    def run(path: str) -> None:
        from qcow2.tool.command import main

        said, complained = io.StringIO(), io.StringIO()
        with redirect_stdout(said), redirect_stderr(complained):
            status = main([*arguments, path])
        if status not in (0, 2, 3):  # corrupt, or wasting space, is a verdict of check, no refusal
            raise OSError(f"exit {status}: {complained.getvalue() or said.getvalue()[-200:]}")

    return run


ACTIONS: dict[str, Callable[[str], None]] = {
    "read": read,
    "write": write,
    "check": _tool("check"),
    "repair": _tool("check", "-r", "all"),
    "info": _tool("info"),
    "map": _tool("map", "--output=json"),
    "dump-header": _tool("dump-header"),
}


def _end_of(action: str, path: str) -> Visit:
    import qcow2

    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        ACTIONS[action](path)
        return Visit(path, "done", "")
    except (OSError, qcow2.ImageError) as error:
        return Visit(path, "refused", str(error))
    except BaseException:
        return Visit(path, "failed", traceback.format_exc())
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main(action: str, *paths: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    for path in paths:
        print(json.dumps(vars(_end_of(action, path))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
