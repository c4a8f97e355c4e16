"""Progress with the time since the start."""

import time
from collections.abc import Callable


def stopwatch() -> Callable[[str], None]:
    """Return a function that prints a line with the seconds since now in front."""
    started = time.monotonic()
    return lambda line: print(f"[{time.monotonic() - started:6.1f} s] {line}", flush=True)
