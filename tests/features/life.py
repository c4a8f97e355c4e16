"""The life of an image: made by one, changed by one after the other, judged by all after each turn."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Protocol

from tests.bitmapreader import AUTO, bitmaps_of
from tests.features import ours
from tests.features.model import Bits, Model
from tests.features.ours import Library, Server
from tests.features.qemu import Files, Qemu
from tests.features.shape import Shape
from tests.features.step import Step, draw_step, kinds_of
from tests.program import qcow2_tool_ok


class AtWork(Protocol):
    """Somebody who has the image."""

    def can(self, step: Step) -> bool: ...
    def apply(self, step: Step) -> None: ...
    def end(self) -> None: ...


@dataclass
class Life:
    """One image in *directory*; everything is drawn from *draw*."""

    directory: Path
    shape: Shape
    draw: Random
    qemus: list[Qemu]
    steps: list[Step] = field(default_factory=list)  # of the turn
    done: Counter[str] = field(default_factory=Counter)
    serial: int = 0

    def lead(self, turns: int, nsteps: int) -> None:
        """*turns* turns of *nsteps* steps, ours and each QEMU's after the other. Raises: AssertionError."""
        self.files = Files(self.directory / "disk", self.shape)
        self.model = Model(self._make(self.files, self.shape.nbytes))
        self.model.below = bytes(self.model.content) if self.shape.version == 2 else b""
        if "bitmaps" in self.shape.features:
            self._add_bitmaps()
        self._judge(leaks=False)
        others = self.draw.sample(self.qemus, len(self.qemus))
        we_begin = self.draw.random() < 0.5
        for turn in range(turns):
            if turn % 2 == we_begin:
                self._turn(others[turn // 2 % len(others)], nsteps)
            else:
                self._turn(self.draw.choice([Library(self.draw), Library(self.draw), Server(self.draw)]), nsteps)

    def _make(self, files: Files, nbytes: int) -> bytes:
        """The chain, its bases with some content; what the top shows."""
        content = b""
        if files.base:
            content = self._make_base(files.base, files.shape.base_nbytes)
        self._create(files, nbytes)
        if files.format == "luks":  # noise before
            with ours.open_disk(files, writable=True) as disk:
                disk.write_zeroes(0, nbytes)
        return content[:nbytes].ljust(nbytes, b"\0")

    def _create(self, files: Files, nbytes: int) -> None:
        if (maker := self.draw.choice([None, *self.qemus])) is not None:
            maker.create(files, nbytes)
        else:
            qcow2_tool_ok(*files.create(nbytes))

    def _make_base(self, files: Files, nbytes: int) -> bytes:
        model = Model(self._make(files, nbytes))
        model.below = bytes(model.content) if files.shape.version == 2 else b""
        who = self.draw.choice([*self.qemus, Library(self.draw)])
        kinds = kinds_of(files.shape, {"write", "zero", "discard", "compress"})
        self._work(who.work(files, model), files.shape, model, kinds, unit=who.unit, nsteps=20)
        return bytes(model.content)

    def _add_bitmaps(self) -> None:
        with ours.open_disk(self.files, writable=True) as disk:
            for name in ("one", "two", "three"):
                granularity = 1 << self.draw.randrange(9, 22)
                disk.bitmaps.add(name, granularity)
                self.model.bitmaps[name] = Bits(granularity, is_enabled=True)

    def _turn(self, who: Qemu | Library | Server, nsteps: int) -> None:
        self.who = who.name
        work = who.work(self.files, self.model)
        self._work(work, self.shape, self.model, kinds_of(self.shape, who.may), unit=who.unit, nsteps=nsteps)
        self._judge(leaks=getattr(work, "dies", False))

    def _work(self, work: AtWork, shape: Shape, model: Model, kinds: list[str], *, unit: int, nsteps: int) -> None:
        self.steps = []
        while len(self.steps) < nsteps:
            self.serial += 1
            step = draw_step(self.draw, shape, model, kinds, unit=unit, serial=self.serial)
            if step is not None and work.can(step):
                self.steps.append(step)
                work.apply(step)
                self.done[step.kind] += 1
        work.end()

    def _judge(self, *, leaks: bool) -> None:
        """All read the same, and find no fault; after a death *leaks* are taken back."""
        files, model = self.files, self.model
        model.require(ours.read_all(files))
        for qemu in self.qemus:
            model.require(qemu.read(files))
            if not self.shape.is_raw:
                qemu.require_sound(files, leaks=leaks)
        if not self.shape.is_raw:
            ours.require_sound(files, leaks=leaks)
        if leaks and not self.shape.is_raw:
            qcow2_tool_ok("check", "-q", "-r", "leaks", files.path)
        if "data-file-raw" in self.shape.features:
            model.require(files.data.read_bytes()[: model.nbytes])  # QEMU makes it longer, to whole clusters
        if model.snapshots:
            name = self.draw.choice([*model.snapshots])
            model.require(ours.read_all(files, name), model.snapshots[name])
            theirs = self.draw.choice(self.qemus).read(files, name)  # as long as the disk is now
            shorter = min(len(theirs), len(model.snapshots[name]))
            model.require(theirs[:shorter], model.snapshots[name][:shorter])
        if "bitmaps" in self.shape.features:
            self._judge_bitmaps()

    def _judge_bitmaps(self) -> None:
        found = bitmaps_of(self.files.path, is_padded=True)
        assert [*found] == [*self.model.bitmaps]
        for name, wanted in self.model.bitmaps.items():
            seen = found[name]
            assert (seen.flags, seen.granularity) == (AUTO * wanted.is_enabled, wanted.granularity), name
            missing, more = wanted.dirty - seen.dirty, seen.dirty - wanted.dirty - wanted.perhaps
            assert not missing, f"{name}: {len(missing)} bits are not set, such as {min(missing)}"
            assert not more, f"{name}: {len(more)} bits are set that nothing touched, such as {min(more)}"
            wanted.dirty, wanted.perhaps = set(seen.dirty), set()
