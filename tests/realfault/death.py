"""A host on which a daemon dies before one call that changes a file or a name."""

import subprocess
from functools import cache
from pathlib import Path
from tempfile import mkdtemp


@cache
def library() -> Path:
    """death.c, compiled."""
    built = Path(mkdtemp(prefix="death-")) / "death.so"
    source = Path(__file__).with_name("death.c")
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-o", built, source, "-ldl"], check=True
    )
    return built


def dying(at: int, after: str) -> list[str]:
    """What runs a daemon that is killed before call *at*, from 1 on, since it removed a name that ends in *after*."""
    return ["env", f"LD_PRELOAD={library()}", f"DEATH={at}", f"DEATH_AFTER={after}"]


def dying_once_renamed(at: int, old: str) -> list[str]:
    """The same, counted from when a name that ends in *old* was given away."""
    return ["env", f"LD_PRELOAD={library()}", f"DEATH={at}", f"DEATH_RENAMED={old}"]


def dying_from_start(at: int) -> list[str]:
    """The same, counted from its start."""
    return ["env", f"LD_PRELOAD={library()}", f"DEATH={at}"]


def forgetful(at: int) -> list[str]:
    """What runs a daemon whose *at*-th sync of a directory, from 1 on, fails."""
    return ["env", f"LD_PRELOAD={library()}", f"FSYNC_FAILS={at}"]


def linkless() -> list[str]:
    """What runs a daemon where a file has one name only."""
    return ["env", f"LD_PRELOAD={library()}", "NO_LINKS=1"]


def waiting(at: int, pipe: Path) -> list[str]:
    """What runs a daemon whose *at*-th sync of a directory ends once who has opened *pipe* for writing closes it."""
    return ["env", f"LD_PRELOAD={library()}", f"FSYNC_WAITS={at}", f"FSYNC_PIPE={pipe}"]
