"""Which program we are: `qcow2`, or, run under the name of `qemu-img` (a link will do), that one with its defaults.

It guesses formats that nobody named, and makes raw images where `qcow2` makes qcow2 ones.
"""

import os
import sys

QEMU_IMG = "qemu-img"
SPOKEN = "7.2.0"  # the version whose words we use, for scripts that ask before they use an option


def is_qemu_img() -> bool:
    """Whether we were called so."""
    return os.path.basename(sys.argv[0]) == QEMU_IMG


def program() -> str:
    """How we call ourselves in what we say."""
    return QEMU_IMG if is_qemu_img() else "qcow2"


def default_format() -> str:
    """Of a new image."""
    return "raw" if is_qemu_img() else "qcow2"


def say(text: str) -> None:
    """One line on standard error."""
    print(f"{program()}: {text}", file=sys.stderr)
