"""Standard input, output and error: descriptors 0, 1 and 2, to which libraries write whatever they are."""

import os
import sys


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
