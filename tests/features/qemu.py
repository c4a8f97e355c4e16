"""A QEMU: makes an image, changes it, reads it, and judges it."""

import json
import os
import re
from pathlib import Path
from typing import Any

from tests.features.model import Bits, Model
from tests.features.shape import Shape
from tests.features.step import Step
from tests.oracle import ask_qemu

KEY = b"a key\nof two lines"
MAY = {
    "write",
    "zero",
    "unmap",
    "discard",
    "flush",
    "compress",
    "create-snapshot",
    "apply-snapshot",
    "delete-snapshot",
    "grow",
    "add",
    "remove",
    "clear",
    "enable",
    "disable",
    "merge",
}


class Files:
    """Where an image of a shape, and those under it, are; how QEMU is told of it."""

    def __init__(self, path: Path, shape: Shape) -> None:
        self.path = path
        self.shape = shape
        self.data = path.with_name(f"{path.name}.data")
        self.base = Files(path.with_name(f"{path.name}.base"), shape.base) if shape.base else None
        path.with_name("key").write_bytes(KEY)

    @property
    def format(self) -> str:
        return next(iter(self.shape.features)) if self.shape.is_raw else "qcow2"

    def node(self) -> dict[str, Any]:
        """For QEMU."""
        said: dict[str, Any] = {"driver": self.format, "file": {"driver": "file", "filename": str(self.path)}}
        if self.format == "luks":
            said["key-secret"] = "s0"
        if "encrypted" in self.shape.features:
            said["encrypt"] = {"format": "luks", "key-secret": "s0"}
        if self.shape.has_data_file:
            said["data-file"] = {"driver": "file", "filename": str(self.data)}
        if self.base:
            said["backing"] = self.base.node()
        return said

    def named(self, *, alone: bool = False) -> str:
        """With what is under it, unless it is to be *alone*."""
        said = {**self.node(), "discard": "unmap"}
        return "json:" + json.dumps({key: value for key, value in said.items() if key != "backing" or not alone})

    def secret(self) -> list[str]:
        return ["--object", f"secret,id=s0,file={self.path.with_name('key')}"]

    def create(self, nbytes: int) -> list[str]:
        """What `create` is told, ours or QEMU's."""
        words = ["create", "-q", "-f", self.format]
        if self.shape.is_encrypted:
            words += self.secret()
        if self.format == "luks":
            words += ["-o", "key-secret=s0,iter-time=10"]
        if self.format == "qcow2":
            words += ["-o", self.shape.options(str(self.data))]
        if self.base:
            words += ["-u", "-b", str(self.base.path), "-F", self.base.format]
        return [*words, str(self.path), str(nbytes)]


class Qemu:
    """The programs of one QEMU, in a directory or of this system."""

    may = MAY
    unit = 512

    def __init__(self, directory: str = "") -> None:
        self._directory = directory
        version = self.run("qemu-img", "--version").split()[2]
        self.name = f"QEMU {'.'.join(re.findall('[0-9]+', version)[:2])}"

    def program(self, name: str) -> str:
        return os.path.join(self._directory, name)

    def run(self, program: str, *words: str, codes: tuple[int, ...] = (0,)) -> str:
        command = [self.program(program), *words]
        done = ask_qemu(command)
        if done.returncode not in codes:
            raise AssertionError(
                f"{' '.join(command)}: exit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
        return done.stdout

    def create(self, files: Files, nbytes: int) -> None:
        self.run("qemu-img", *files.create(nbytes))

    def read(self, files: Files, snapshot: str = "") -> bytes:
        """All of the disk, or of what it was."""
        plain = files.path.with_name("plain")
        of = ["-l", f"snapshot.name={snapshot}"] if snapshot else []
        self.run("qemu-img", "convert", *files.secret(), *of, "-O", "raw", files.named(), str(plain))
        return plain.read_bytes()

    def require_sound(self, files: Files, *, leaks: bool) -> None:
        """Raises: AssertionError with what the check says."""
        self.run("qemu-img", "check", *files.secret(), files.named(), codes=(0, 3) if leaks else (0,))

    def work(self, files: Files, model: Model) -> "QemuAtWork":
        return QemuAtWork(self, files, model)


class QemuAtWork:
    """Changes an image; as many steps as possible at a time."""

    def __init__(self, qemu: Qemu, files: Files, model: Model) -> None:
        self._qemu = qemu
        self._files = files
        self._model = model
        self._commands: list[str] = []

    def can(self, step: Step) -> bool:
        """Whether QEMU does this, without the mistakes that are known."""
        shape, model = self._files.shape, self._model
        match step.kind:
            case "compress":  # it writes none over anything
                where = range(step.offset // 512, (step.offset + step.nbytes) // 512)
                return step.nbytes == shape.cluster_size and not model.written.intersection(where)
            case "create-snapshot":  # it leaks where counts are too narrow
                return shape.refcount_bits >= 16
            case "apply-snapshot":  # refused with bitmaps
                return not model.bitmaps
            case "grow":  # noise; so does the second one within a cluster; not over a base without zero clusters
                cut_off = shape.has_data_file and shape.is_encrypted
                return "luks" not in shape.features and not cut_off and not (shape.version == 2 and shape.base)
        return True

    def apply(self, step: Step) -> None:
        """Do *step*, at the latest at `end`, and tell the model."""
        start, nbytes, model = step.offset, step.nbytes, self._model
        match step.kind:
            case "write" | "compress":
                self._commands.append(f"write {'-c ' * (step.kind == 'compress')}-P {step.byte()} {start} {nbytes}")
                model.write(start, bytes([step.byte()]) * nbytes)
            case "zero" | "unmap":
                self._commands.append(f"write -z {'-u ' * (step.kind == 'unmap')}{start} {nbytes}")
                model.write(start, bytes(nbytes))
            case "discard":
                self._commands.append(f"discard {start} {nbytes}")
                model.discard(start, nbytes)
            case "flush":
                self._commands.append("flush")
            case _:
                self.end()
                self._manage(step)

    def _manage(self, step: Step) -> None:
        model, name = self._model, step.name
        match step.kind:
            case "create-snapshot":
                self._image("snapshot", "-c", name)
                model.snapshots[name] = bytes(model.content)
            case "apply-snapshot":
                self._image("snapshot", "-a", name)
                model.apply_snapshot(name)
            case "delete-snapshot":
                self._image("snapshot", "-d", name)
                del model.snapshots[name]
            case "grow":
                self._image("resize", "-q", after=[str(step.nbytes)])
                model.resize(step.nbytes)
            case "add":
                self._image("bitmap", "--add", "-g", str(step.nbytes), after=[name])
                model.bitmaps[name] = Bits(step.nbytes, is_enabled=True)
            case "merge":
                if name != step.source:
                    self._image("bitmap", "--merge", step.source, after=[name])
                    model.merge(name, step.source)
            case _:
                self._image("bitmap", f"--{step.kind}", after=[name])
                model.change_bitmap(name, step.kind)

    def _image(self, command: str, *words: str, after: list[str] | None = None) -> None:
        files = self._files
        self._qemu.run(
            "qemu-img", command, *files.secret(), *words, files.named(alone=command == "bitmap"), *(after or [])
        )

    def end(self) -> None:
        """All has been done, and what was discarded has been looked at."""
        if not self._commands:
            return
        words = [word for command in self._commands for word in ("-c", command)]
        said = self._qemu.run("qemu-io", *self._files.secret(), *words, self._files.named())
        assert "error" not in said.lower(), said
        assert "failed" not in said.lower(), said
        self._commands.clear()
        if self._model.discarded:
            self._model.look(self._qemu.read(self._files))
