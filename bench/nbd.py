"""`python -m bench.nbd`: how fast a disk can be pulled over NBD, beside `cp` of the same bytes to the same place.

Pairs of copies, one after the other, all from the page cache: `cp` of the image file, and `nbdcopy` from our server,
from a daemon's export of what it has frozen, and from qemu-nbd, of an image of random bytes. Ratios are of each pass;
their median counts.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import qcow2
from bench.frontend import FrontEnd
from bench.machine import describe
from bench.server import Server, Service, connect, listen, our_command
from vhost import Control
from vhost.option import CacheMode

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


@contextmanager
def exported(image: Path) -> Iterator[tuple[Path, str]]:
    """What *image* held, frozen in another file, and the URI at which the daemon that serves the image offers it."""
    frozen, control = image.with_name("frozen.qcow2"), f"{image}.control"
    listening, address = listen()
    command = our_command(Service(image, CacheMode.WRITEBACK, options=(f"--control={control}",)), listening.fileno())
    with Server(command, listening) as server:
        with FrontEnd(connect(address), queues=1, nbytes=0), Control(control) as asked:  # a guest that does nothing
            asked.snapshot(frozen.name)
            yield frozen, asked.export_start(frozen.name, socket=f"{image}.export").uri
        server.stop()


class Servers:
    """Copies by one kind of server each; the target is new each time."""

    def __init__(self, image: Path, uri: str, target: Path, connections: int) -> None:
        """*uri*: where a daemon offers *image*."""
        self._image = image
        self._uri = uri
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

    def by_daemon(self) -> list[str]:
        """From its export, which is there all the time."""
        return ["nbdcopy", f"--connections={self._connections}", self._uri, str(self._target)]

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
        taken: dict[str, list[float]] = {}
        with exported(image.resolve()) as (frozen, uri):
            servers = Servers(frozen, uri, Path(place) / "copy", options.connections)
            ways = {
                "cp": servers.by_cp,
                "serve-nbd": servers.by_us,
                "export": servers.by_daemon,
                "qemu-nbd": servers.by_qemu,
            }
            for _ in range(options.pairs):
                for name, command in ways.items():
                    taken.setdefault(name, []).append(servers.seconds(command))
    for name, seconds in taken.items():
        ratios = [mine / other for mine, other in zip(taken["cp"], seconds, strict=True)]
        rate = options.mib / statistics.median(seconds)
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{name:10} {rate:7.0f} MiB/s, {statistics.median(ratios):.2f} of cp's rate ({spread})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
