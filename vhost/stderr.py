"""What the daemon says, on standard error, where perhaps nobody listens."""

import logging
import select
import sys


class Stderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Says what can be said without waiting: no disk may stop because a pipe is full that nobody reads."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self._unsaid = 0

    def emit(self, record: logging.LogRecord) -> None:
        if not _takes_a_line():
            self._unsaid += 1
            return
        if self._unsaid:
            record.msg, record.args = f"{record.getMessage()} ({self._unsaid} messages before it are lost)", None
            self._unsaid = 0
        super().emit(record)


def _takes_a_line() -> bool:
    """Whether a line fits: of a pipe, whether it has room for PIPE_BUF bytes, in which ours are."""
    ready = select.poll()
    ready.register(2, select.POLLOUT)
    return bool(ready.poll(0))
