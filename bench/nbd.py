"""`python -m bench.nbd`: how fast a disk can be pulled over NBD, beside `cp` of the same bytes to the same place.

Pairs of copies, one after the other, all from the page cache: `cp` of the image file, and `nbdcopy` from our server
and from qemu-nbd, of an image of random bytes. Ratios are of each pass; their median counts.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import qcow2
from bench.machine import describe

MIB = 1 << 20
STEP = 4 * MIB
TOOL = Path(sys.executable).with_name("qcow2")


def make_image(path: Path, nbytes: int) -> None:
    """An image full of noise, in the page cache."""
    qcow2.create(path, nbytes)
    with qcow2.open(path, "r+") as disk:
        for offset in range(0, nbytes, STEP):
            disk.write(offset, os.urandom(min(STEP, nbytes - offset)))
        disk.flush()


class Servers:
    """Copies by one kind of server each; the target is new each time."""

    def __init__(self, image: Path, target: Path, connections: int) -> None:
        self._image = image
        self._target = target
        self._connections = connections

    def by_cp(self) -> list[str]:
        """The file itself."""
        return ["cp", "--reflink=never", "--sparse=never", str(self._image), str(self._target)]

    def _by_nbdcopy(self, *server: str) -> list[str]:
        return ["nbdcopy", f"--connections={self._connections}", "--", "[", *server, "]", str(self._target)]

    def by_us(self) -> list[str]:
        """`nbdcopy` starts the server and gives it a socket as systemd does."""
        return self._by_nbdcopy(str(TOOL), "serve-nbd", "-r", "-e", "0", str(self._image))

    def by_qemu(self) -> list[str]:
        """The same of qemu-nbd."""
        return self._by_nbdcopy("qemu-nbd", "-r", "-f", "qcow2", "-e", "8", str(self._image))

    def seconds(self, command: Callable[[], list[str]]) -> float:
        """How long one copy takes, its start included."""
        self._target.unlink(missing_ok=True)
        self._target.touch()
        begin = time.monotonic()
        subprocess.run(command(), check=True)
        return time.monotonic() - begin


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.nbd", description=__doc__)
    parser.add_argument("--mib", type=int, default=4096, help="size of the disk (default: 4096)")
    parser.add_argument("--pairs", type=int, default=5, help="passes (default: 5)")
    parser.add_argument("--connections", type=int, default=4, help="of nbdcopy (default: 4)")
    parser.add_argument("--directory", type=Path, default=Path(".cache"), help="of image and target (default: .cache)")
    options = parser.parse_args()
    options.directory.mkdir(exist_ok=True)
    print(describe(options.directory))
    with tempfile.TemporaryDirectory(dir=options.directory) as place:
        image = Path(place) / "disk.qcow2"
        make_image(image, options.mib * MIB)
        servers = Servers(image, Path(place) / "copy", options.connections)
        ways = {"cp": servers.by_cp, "serve-nbd": servers.by_us, "qemu-nbd": servers.by_qemu}
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.pairs):
            for name, command in ways.items():
                taken[name].append(servers.seconds(command))
    for name, seconds in taken.items():
        ratios = [mine / other for mine, other in zip(taken["cp"], seconds, strict=True)]
        rate = options.mib / statistics.median(seconds)
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{name:10} {rate:7.0f} MiB/s, {statistics.median(ratios):.2f} of cp's rate ({spread})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
