"""What a user of the library does, in steps; `python -m tests.border.library IMAGE write|die|read`."""

import os
import sys

import qcow2

FLUSHED, ACKNOWLEDGED = 64 << 10, 3 << 20  # guest offsets


def main(path: str, deed: str) -> None:
    """Write both places; *die* without a close, or see that they hold what was written."""
    with qcow2.open(path, writable=True) as disk:
        if deed == "read":
            print(disk.read(FLUSHED, 1).decode(), disk.read(ACKNOWLEDGED, 1).decode())
            return
        disk.write(FLUSHED, b"F" * 4096)
        disk.flush()
        disk.write(ACKNOWLEDGED, b"A" * 4096)
        if deed == "die":
            os._exit(0)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (OSError, qcow2.ImageError) as error:
        sys.exit(f"library: {error}")
