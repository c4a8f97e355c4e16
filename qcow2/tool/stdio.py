"""Standard input, output and error: descriptors 0, 1 and 2, to which libraries write whatever they are."""

import codecs
import io
import os
import sys
from typing import Any

OUTPUT = "standard output"
ERRORS = "qcow2-name"


def occupy() -> None:
    """Put /dev/null where one of the three is closed, before a file of ours gets its number.

    A parent that closes them would otherwise have the next message of a library written into the image.
    Raises: OSError if there is no /dev/null.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, this one
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)  # None where it was closed when Python started
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def is_of_output(error: Exception) -> bool:
    """Whether *error* is that what we print goes nowhere: nothing is wrong with an image then."""
    return isinstance(error, OSError) and error.filename == OUTPUT


class _Named(io.FileIO):
    """A descriptor whose errors say what it is."""

    def __init__(self, fd: int, what: str) -> None:
        super().__init__(fd, "w", closefd=False)
        self._what = what

    def write(self, data: Any, /) -> int:
        """Raises: OSError with the name."""
        try:
            return super().write(data)
        except OSError as error:
            error.filename = self._what
            raise


class _Heedless(io.FileIO):
    """A descriptor that takes what cannot be written: words that nobody hears end no work."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, "w", closefd=False)

    def write(self, data: Any, /) -> int:
        """Never raises OSError."""
        try:
            return super().write(data) or len(data)  # None where it would have to wait
        except OSError:
            return len(data)


def _encode(error: UnicodeError) -> tuple[str | bytes, int]:
    """A byte of a name that was no text is itself, what else cannot be said is said as an escape."""
    assert isinstance(error, UnicodeEncodeError)
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return codecs.lookup_error("backslashreplace")(error)


def name_output() -> None:
    """Let errors of standard output say so, those of standard error pass, and names of files be the bytes they are."""
    codecs.register_error(ERRORS, _encode)
    if isinstance(sys.stdout, io.TextIOWrapper):  # not what somebody has put in its place
        encoding, is_terminal = sys.stdout.encoding, sys.stdout.isatty()
        output = io.BufferedWriter(_Named(1, OUTPUT))
        named = io.TextIOWrapper(output, encoding, ERRORS, line_buffering=is_terminal)
        sys.stdout = sys.__stdout__ = named  # type: ignore[misc] # who drops the one does not flush: it might wait
    if isinstance(sys.stderr, io.TextIOWrapper):
        errors = io.BufferedWriter(_Heedless(2))
        sys.stderr = sys.__stderr__ = io.TextIOWrapper(  # type: ignore[misc]
            errors, sys.stderr.encoding, ERRORS, line_buffering=True
        )
