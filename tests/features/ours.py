"""We ourselves: the library, and the daemon with a guest's driver."""

from collections.abc import Callable
from random import Random

import qcow2
from tests.features.model import Bits, Model
from tests.features.qemu import KEY, MAY, Files
from tests.features.step import IO, Step
from tests.frontend import DATA_BYTES, FrontEnd
from tests.program import Daemon, qcow2_tool

TOO_OFTEN = "referenced too often"  # where counts are narrow


class Library:
    """Steps by `qcow2.Disk`."""

    name = "library"
    may = MAY | {"shrink"}
    unit = 1

    def __init__(self, draw: Random) -> None:
        self._draw = draw

    def work(self, files: Files, model: Model) -> "LibraryAtWork":
        return LibraryAtWork(files, model, dies=self._draw.random() < 0.3)


def open_disk(files: Files, *, writable: bool = False, snapshot: str | None = None) -> qcow2.Disk:
    return qcow2.open(files.path, format=files.format, writable=writable, key=KEY, snapshot=snapshot)


def read_all(files: Files, snapshot: str | None = None) -> bytes:
    with open_disk(files, snapshot=snapshot) as disk:
        return disk.read(0, disk.size)


def require_sound(files: Files, *, leaks: bool) -> None:
    """Raises: AssertionError with what our check says."""
    done = qcow2_tool("check", files.path)
    assert done.returncode in ((0, 3) if leaks else (0,)), done.stdout[-2000:] + done.stderr[-2000:]


class LibraryAtWork:
    """An open disk; at the end it is closed, or dies and is opened once more."""

    def __init__(self, files: Files, model: Model, *, dies: bool) -> None:
        self._files = files
        self._model = model
        self.dies = dies
        self._disk = open_disk(files, writable=True)

    def can(self, step: Step) -> bool:
        return not (step.kind in ("grow", "shrink") and self._files.shape.has_data_file)

    def apply(self, step: Step) -> None:
        disk, model, start, nbytes = self._disk, self._model, step.offset, step.nbytes
        match step.kind:
            case "write" | "compress":
                data = Random(step.seed).randbytes(nbytes) if step.seed % 4 else bytes([step.byte()]) * nbytes
                (disk.write_compressed if step.kind == "compress" else disk.write)(start, data)
                model.write(start, data)
            case "zero" | "unmap":
                disk.write_zeroes(start, nbytes, unmap=step.kind == "unmap")
                model.write(start, bytes(nbytes))
            case "discard":
                disk.discard(start, nbytes)
                model.take_discard(start, disk.read(start, nbytes))
            case "flush":
                disk.flush()
            case "grow" | "shrink":
                disk.resize(nbytes, shrink=step.kind == "shrink")
                model.resize(nbytes)
            case _:
                self._manage(step)

    def _manage(self, step: Step) -> None:
        disk, model, name = self._disk, self._model, step.name
        match step.kind:
            case "create-snapshot":
                if self._counts(disk.create_snapshot, name):
                    model.snapshots[name] = bytes(model.content)
            case "apply-snapshot":
                if self._counts(disk.apply_snapshot, name):
                    model.apply_snapshot(name)
            case "delete-snapshot":
                disk.delete_snapshot(name)
                del model.snapshots[name]
            case "add":
                disk.bitmaps.add(name, step.nbytes)
                model.bitmaps[name] = Bits(step.nbytes, is_enabled=True)
            case "merge":
                disk.bitmaps.merge(name, step.source)
                model.merge(name, step.source)
            case _:
                getattr(disk.bitmaps, step.kind)(name)
                model.change_bitmap(name, step.kind)

    def _counts(self, act: Callable[[str], object], name: str) -> bool:
        """Whether the counts of the image are wide enough for it."""
        try:
            act(name)
        except OSError as error:
            if TOO_OFTEN in str(error) and self._files.shape.refcount_bits <= 8:
                return False
            raise
        return True

    def end(self) -> None:
        self._model.require(self._disk.read(0, self._disk.size))
        if self.dies:
            self._disk.abandon()
            with open_disk(self._files, writable=True) as disk:
                self._model.require(disk.read(0, disk.size))
        else:
            self._disk.close()


class Server:
    """Steps by a guest of the daemon's, in the cache mode that is drawn."""

    name = "daemon"
    may = frozenset(IO)
    unit = 512

    def __init__(self, draw: Random) -> None:
        self._draw = draw

    def work(self, files: Files, model: Model) -> "ServerAtWork":
        cache = self._draw.choice(["writeback", "writeback", "writethrough", "none", "directsync"])
        return ServerAtWork(files, model, cache, dies=self._draw.random() < 0.3)


class ServerAtWork:
    """A daemon with its front-end; at the end it is stopped, or killed and another one started."""

    def __init__(self, files: Files, model: Model, cache: str, *, dies: bool) -> None:
        self._files = files
        self._model = model
        self.dies = dies
        key = files.path.with_name("key")
        self._options = [f"--cache={cache}", f"--format={files.format}", f"--key-file={key}"]
        self._start()

    def _start(self) -> None:
        self._daemon = Daemon(self._files.path, *self._options).__enter__()
        self._guest = FrontEnd(self._daemon.socket_path).__enter__()

    def _stop(self, *, dies: bool) -> None:
        self._guest.__exit__()
        (self._daemon.kill if dies else self._daemon.stop)()
        self._daemon.__exit__(None, None, None)

    def can(self, step: Step) -> bool:
        return step.nbytes <= DATA_BYTES or step.kind != "write"

    def apply(self, step: Step) -> None:
        guest, model, start, nbytes = self._guest, self._model, step.offset, step.nbytes
        match step.kind:
            case "write":
                data = Random(step.seed).randbytes(nbytes) if step.seed % 4 else bytes([step.byte()]) * nbytes
                guest.write(start, data)
                model.write(start, data)
            case "zero" | "unmap":
                guest.write_zeroes(start, nbytes, unmap=step.kind == "unmap")
                model.write(start, bytes(nbytes))
            case "discard":
                guest.discard(start, nbytes)
                model.take_discard(start, self._read(start, nbytes))
            case "flush":
                guest.flush()

    def _read(self, start: int, nbytes: int) -> bytes:
        ends = range(start, start + nbytes, DATA_BYTES)
        return b"".join(self._guest.read(at, min(DATA_BYTES, start + nbytes - at)) for at in ends)

    def end(self) -> None:
        whole = self._model.nbytes // 512 * 512
        self._model.require(self._read(0, whole))
        self._stop(dies=self.dies)
        if self.dies:
            self._start()
            self._model.require(self._read(0, whole))
            self._stop(dies=False)
