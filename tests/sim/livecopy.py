"""Where copies of a disk go while it is served: the target of a backup, the other side of a mirror, simulated.

What decides there is what ships; names, threads and files of the host are here.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

from qcow2.engine.create import Options
from qcow2.job import mirror
from qcow2.job.newimage import NewImage
from tests.sim.file import KernelFile
from tests.sim.kernel import US, Kernel
from tests.sim.livehost import LiveHost, open_chain
from vhost import backup, frozen, mirrorcopy, mirroring, overlaybitmaps, servedchain
from vhost.backup import Feed
from vhost.backuptarget import BackupFile
from vhost.frozen import Saved

BACKUP_BITS = 12  # of a cluster of a backup


class SimulatedTarget(BackupFile):
    """A new file of the simulated host; one without a header is as good as none."""

    def __init__(self, host: LiveHost, path: str, options: Options, image_format: str, **more: object) -> None:
        self.path = os.path.basename(path)
        self._made = None
        self._driver: Any = SimpleNamespace(run=host.through)
        files = {file.path: file for file in host.every_file}
        below = None if options.backing_name is None else host.through(open_chain(files, options.backing_name))
        self._target = NewImage(host.new_file(self.path), replace(options, cluster_bits=BACKUP_BITS), below)
        host.through(self._target.begin())
        self.on_whole: Callable[[], None] = lambda: None  # told once it is a disk, and stable

    def finish(self) -> None:
        super().finish()
        self.on_whole()

    def close(self) -> None:
        """Nobody else looks at it."""


class SimulatedFeed(Feed):
    """Its thread is an event of the kernel's."""

    kernel: Kernel  # of the history under way

    def give(self, saved: Saved) -> None:
        super().give(saved)
        if self.kernel.random.random() < 0.2:  # it is faster than who gives
            self._work()
        else:
            self.kernel.at(self.kernel.random.randrange(5 * US, 300 * US), self._work)

    def close(self) -> None:
        self._is_ending = True
        self._saved.clear()

    def _work(self) -> None:
        if self._saved and not self._is_ending:
            self._put_one(self._saved[0])


class StoppedClock:
    """No target hangs."""

    def __init__(self, tick: Callable[[], None]) -> None:
        pass

    def close(self) -> None:
        """It never ticks."""


class SimulatedNewFile:
    """The file of a mirror; another one each time it is made, which has its name from the start."""

    def __init__(self, host: LiveHost, path: str, log_directory: str, image_format: str) -> None:
        self.temporary = ""
        self._host = host

    def make(self, like: KernelFile, fill: Callable[[KernelFile], None]) -> None:
        file = self._host.new_image()
        self.temporary = file.path
        fill(file)

    def name(self) -> None:
        """It has it."""

    def unname(self) -> None:
        """It keeps it."""

    @property
    def place(self) -> str:
        return self.temporary

    def is_led_to_by(self, path: str) -> bool:
        return False

    def discard(self) -> None:
        """Nobody takes it for a disk."""


class SimulatedPivot:
    """The path comes to lead to the copy by a rename in the directory."""

    def __init__(self, host: LiveHost, served: str, top: KernelFile, target: str, copy: KernelFile) -> None:
        self._host = host
        self._copy = copy

    def prepare(self) -> None:
        """What is served keeps its name."""

    def switch(self) -> None:
        self._host.directory.rename(self._copy.path)

    def sync(self) -> None:
        self._host.directory.sync()

    def discard(self) -> None:
        """There is nothing to undo."""


def install(host: LiveHost, kernel: Kernel) -> None:
    """Let jobs find the simulated host, and work in pieces that fit its small disks."""
    SimulatedFeed.kernel = kernel
    vars(backup).update(
        BackupFile=partial(SimulatedTarget, host),
        Feed=SimulatedFeed,
        Clock=StoppedClock,
        start_deaf=lambda thread: None,
    )
    vars(mirrorcopy).update(NewFile=partial(SimulatedNewFile, host), run=host.through, _second=nullcontext)
    vars(mirroring).update(
        Pivot=lambda *given: SimulatedPivot(host, *given),
        require_turnable=lambda served, top: None,
    )
    vars(overlaybitmaps).update(run=host.through)
    vars(servedchain).update(  # there are no names but these
        require_way=lambda image, name, base: None,
        is_at=lambda file, path: file.path == path,
    )
    vars(frozen).update(WINDOW=1)
    vars(mirror).update(CHUNK=16 << 10, UNIT=512)
