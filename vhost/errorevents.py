"""What the daemon logs as an error is told to those who subscribed, whoever has logged it."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vhost.event import Event

log = logging.getLogger("vhost")


class _Teller(logging.Handler):
    """Of a job's own errors its state tells: they are another logger's, below this one."""

    def __init__(self, tell: Callable[[Event], None]) -> None:
        super().__init__(logging.ERROR)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == log.name:
            self._tell(Event("error", {"message": record.getMessage()}))


@contextmanager
def telling_errors(tell: Callable[[Event], None]) -> Iterator[None]:
    """Let *tell* have an event for each error that is logged, on any thread, until the end."""
    teller = _Teller(tell)
    log.addHandler(teller)
    try:
        yield
    finally:
        log.removeHandler(teller)
