"""Laws 1 and 3 with real files: what may happen to an image and its link log between a death and the next open."""

import os
import shutil
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import qcow2
from qcow2.plane.linklog import MARK_OFFSET
from tests.builder import Recipe, build
from tests.builder.record import BACKING_FORMAT
from tests.crash.explorer import Violation

CLUSTER, NCLUSTERS = 1 << 16, 8
BASE, NEW = b"base" * (CLUSTER // 4), b"new!" * 128
Shown = frozenset[int]  # the clusters that show what was written


class Place:
    """An overlay, and a directory for link logs."""

    def __init__(self, directory: Path) -> None:
        self.logs = directory / "logs"
        self.elsewhere = directory / "elsewhere"
        self.backup = directory / "backup"
        for made in (self.logs, self.elsewhere):
            made.mkdir()
        (directory / "base").write_bytes(BASE * NCLUSTERS)
        recipe = Recipe(size=NCLUSTERS * CLUSTER, backing="base", extensions=[(BACKING_FORMAT, b"raw")])
        self.image = build(recipe, directory / "image").path

    def die(self, *clusters: int, then: Iterable[int] = ()) -> None:
        """Let a process be killed that has written *clusters*; *then* others, once the image is copied."""
        child = os.fork()
        if not child:
            try:
                self._write_until_killed(clusters, then)
            finally:
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)

    def _write_until_killed(self, clusters: Iterable[int], then: Iterable[int]) -> None:
        disk = qcow2.open(str(self.image), writable=True, log_directory=str(self.logs))
        for cluster in clusters:
            disk.write(cluster * CLUSTER, NEW)
        if then:
            shutil.copyfile(self.image, self.backup)
        for cluster in then:
            disk.write(cluster * CLUSTER, NEW)
        os.kill(os.getpid(), signal.SIGKILL)

    def put_back(self) -> None:
        """The copy, into the same inode."""
        with self.backup.open("rb") as source, self.image.open("r+b") as target:
            target.truncate(0)
            shutil.copyfileobj(source, target)

    def shown(self, image: Path | None = None, logs: Path | None = None, *, discard: bool = False) -> Shown | None:
        """Open as the next process would, and look; None: refused."""
        path, directory = str(image or self.image), str(logs or self.logs)
        try:
            with qcow2.open(path, writable=True, log_directory=directory, discard_log=discard) as disk:
                content = disk.read(0, disk.size)
        except qcow2.ImageError:
            return None
        return frozenset(i for i in range(NCLUSTERS) if content[i * CLUSTER :].startswith(NEW))


def require(what: str, found: Shown | None, *allowed: set[int] | None) -> None:
    """Raises: Violation if *found* is none of what is *allowed*."""
    if found not in allowed:
        raise Violation(f"{what}: shows {found and set(found)}, allowed are {allowed}")


def _restored(place: Place) -> None:
    """What was written after the copy must not come."""
    place.die(1, then=(2, 3))
    place.put_back()
    require("an earlier image beside a later log", place.shown(), {1}, None)


def _copied_back(place: Place) -> None:
    """The log went with the replay."""
    place.die(1, 2)
    shutil.copyfile(place.image, place.backup)
    require("the image", place.shown(), {1, 2})
    place.put_back()
    require("a copy whose log is gone", place.shown(), None)
    require("a copy whose log may be lost", place.shown(discard=True), set())


def _copied_back_beside_the_next_log(place: Place) -> None:
    place.die(1)
    shutil.copyfile(place.image, place.backup)
    place.die(2, 3)
    place.put_back()
    require("a copy beside the log of a later process", place.shown(), None)
    require("a copy whose log may be lost", place.shown(discard=True), set())


def _opened_by_one_who_sees_no_log(place: Place) -> None:
    """Another user, another container, a tool with another directory."""
    place.die(1, 2)
    before = place.image.read_bytes()
    require("without the log", place.shown(logs=place.elsewhere), None)
    if place.image.read_bytes() != before:
        raise Violation("a refused open has changed the image")
    require("with the log", place.shown(), {1, 2})


def _removed(place: Place) -> None:
    place.die(1)
    for log in place.logs.iterdir():
        log.unlink()
    require("without the log", place.shown(), None)


def _opened_by_another_program(place: Place) -> None:
    """It knows no link logs, so it clears the mark, and takes the clusters that nothing refers to."""
    place.die(1, 2)
    with place.image.open("r+b") as file:
        file.seek(MARK_OFFSET)
        file.write(bytes(8))
    require("an image that another program wrote to", place.shown(), set())


def _copy_opened_first(place: Place) -> None:
    """Both have the writes, and the copy leaves the original its log."""
    place.die(1, 2)
    shutil.copyfile(place.image, place.backup)
    require("the copy", place.shown(place.backup), {1, 2})
    require("the original", place.shown(), {1, 2})


CASES: dict[str, Callable[[Place], None]] = {
    "restored": _restored,
    "copied-back": _copied_back,
    "copied-back-beside-the-next-log": _copied_back_beside_the_next_log,
    "opened-by-one-who-sees-no-log": _opened_by_one_who_sees_no_log,
    "log-removed": _removed,
    "opened-by-another-program": _opened_by_another_program,
    "copy-opened-first": _copy_opened_first,
}


def intervene(case: str) -> int:
    """Let *case* happen to a new image; how many times it did.

    Raises: Violation if the next open shows what it must not, or loses something without a word.
    """
    with TemporaryDirectory() as directory:
        CASES[case](Place(Path(directory)))
    return 1
