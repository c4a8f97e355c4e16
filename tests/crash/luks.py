"""Raw LUKS images by enumeration: requests, another size and other key slots, and every death between.

What a death leaves is looked at as the next process finds it: the disk, how long it is, and which passphrases open it.
"""

import hashlib
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import cache

from qcow2.driver.buffer import MemoryBuffer
from qcow2.engine.data import Data
from qcow2.engine.encryption import Keyring
from qcow2.engine.luks import Vault
from qcow2.engine.slots import Addition, Erasure, change_slots
from qcow2.error import ImageError
from qcow2.format.luks import SlotRecord
from qcow2.node.luks import LuksImage, read_luks, write_luks
from qcow2.plane.cipher import Cipher
from tests.crash.driver import CrashDriver, SimulatedFile
from tests.crash.explorer import Explorer, Run, Violation, name
from tests.crash.history import SECTOR, ZEROS, History
from tests.crash.judge import describe
from tests.crash.workload import Action, Guest, random_action
from tests.engine import ENCRYPTION, PASSPHRASE

NSECTORS, MOST = 40, 64  # of the disk, at first and ever
SIZE_AT = MOST  # the sector that stands for the size; behind it one for each passphrase
PASSPHRASES = (PASSPHRASE, b"second", b"third")
OPENS, OPENS_NOT = b"opens...".ljust(SECTOR, b"."), b"no......".ljust(SECTOR, b".")
CLUSTER_SECTORS = 4  # of random actions


def keyring(passphrase: bytes) -> Keyring:
    return Keyring(lambda path: [passphrase])


def size_of(nsectors: int) -> bytes:
    return nsectors.to_bytes(SECTOR, "big")


@dataclass(frozen=True)
class Growth:
    """Until the disk has grown its length is on the way, and a power loss leaves noise past the old end."""

    begun: int
    ended: int
    first: int
    end: int

    def explains(self, sector: int, found: bytes, *, power: bool) -> bool:
        """Whether it may have left *found* in that sector."""
        if sector == SIZE_AT:
            return self.first <= int.from_bytes(found, "big") <= self.end
        return power and self.first <= sector < self.end


@dataclass(slots=True)
class LuksExplorer(Explorer):
    """Judges no noise that a growth may leave; what is allowed at a moment it finds out once."""

    growths: list[Growth] = field(default_factory=list)
    _moment: tuple[int, bool] | None = None
    _allowed: dict[int, set[bytes]] = field(default_factory=dict)

    def _compare(self, content: bytes, position: int, where: str, *, power: bool) -> None:
        history = self.run.history
        if self._moment != (position, power):
            self._moment = position, power
            self._allowed = history.allowed_everywhere(position, power=power)
        growth = next((each for each in self.growths if each.begun < position <= each.ended), None)
        for sector in range(len(content) // SECTOR):
            found = content[sector * SECTOR : (sector + 1) * SECTOR]
            if found in self._allowed.get(sector, {history.before(sector)}):
                continue
            if growth is None or not growth.explains(sector, found, power=power):
                raise Violation(f"{where}: sector {sector} holds {name(found)}")


class Owner(Guest):
    """A guest, and who changes its disk's length and keys."""

    def __init__(self, driver: CrashDriver, image: LuksImage, history: History) -> None:
        super().__init__(driver, image, history)
        self.growths: list[Growth] = []
        self.passphrases = {PASSPHRASE}

    def _actions(self) -> dict[str, Callable[[Action], Awaitable[None]]]:
        return super()._actions() | {"size": self._resize, "key": self._toggle}

    async def _resize(self, action: Action) -> None:
        """To as many sectors as *action* says; alone."""
        old, new = self.image.size // SECTOR, action.sector
        begun = self._note(("begin", action))
        contents = dict.fromkeys(range(min(old, new), max(old, new)), ZEROS) | {SIZE_AT: size_of(new)}
        versions = self.history.begin(contents, begun)
        await (self.image.grow if new > old else self.image.shrink)(new * SECTOR)
        acked = self._note(("acked", action))
        for version in versions:
            version.is_stable, version.acked = True, acked
        if new > old:
            self.growths.append(Growth(begun, acked, old, new))

    async def _toggle(self, action: Action) -> None:
        """The passphrase of that number opens the disk from now on, or does no more; one is left. Alone."""
        passphrase = PASSPHRASES[action.sector]
        is_new = passphrase not in self.passphrases
        if self.passphrases == {passphrase}:
            return
        opener = next(iter(sorted(self.passphrases - {passphrase})))
        versions = self.history.begin(
            {SIZE_AT + 1 + action.sector: OPENS if is_new else OPENS_NOT}, self._note(("begin", action))
        )
        vault = await Vault.read(self.image.file, 0, self.image.file.size)
        change = Addition(passphrase, iter_time_ms=1) if is_new else Erasure(passphrase)
        await change_slots(vault, [opener], change)
        for version in versions:
            version.is_stable, version.acked = True, self._note(("acked", action))
        self.passphrases ^= {passphrase}


@cache
def looker() -> "Looker":
    """One for all, which knows what it has seen."""
    return Looker()


@cache
def start() -> tuple[SimulatedFile, bytes]:
    """A new disk with something on it, and what the next process finds; copy it before use."""
    driver, file = CrashDriver(), SimulatedFile("disk.luks", {}, 0)
    driver.run(write_luks(file, ENCRYPTION, NSECTORS * SECTOR))
    image = driver.run(LuksImage.unlock(file, keyring(PASSPHRASE), writable=True))
    old = b"".join(b"old%05d" % number * 64 for number in range(NSECTORS))
    driver.run(image.write(0, MemoryBuffer(memoryview(bytearray(old)))))
    driver.run(image.flush())
    return file, looker()(file.copy())


class Looker:
    """Opens what a death left."""

    def __init__(self) -> None:
        self._keys: dict[tuple[SlotRecord, bytes, bytes], bytearray | None] = {}  # by slot, material and passphrase

    def __call__(self, file: SimulatedFile) -> bytes:
        """The disk, zeros up to the longest one, its size, and of each passphrase whether it opens it."""
        try:
            return self._look(file)
        except (ImageError, OSError, ValueError, LookupError, ArithmeticError) as error:
            raise Violation(f"{type(error).__name__}: {error}") from error

    def _look(self, file: SimulatedFile) -> bytes:
        driver = CrashDriver()
        luks, size = driver.run(read_luks(file))
        vault = Vault(file, 0, luks, luks.record.end_offset)
        keys = {each: key for each in PASSPHRASES if (key := self._opened(vault, each)) is not None}
        if not keys:
            raise Violation("no passphrase opens the disk")
        start, cipher = luks.record.payload_offset, Cipher(file.path, luks.spec, next(iter(keys.values())))
        image = LuksImage(file, Data(file, cipher, origin=start), start, size, read_only=True)
        content = bytearray(size)
        driver.run(image.read(0, MemoryBuffer(memoryview(content))))
        told = b"".join(OPENS if each in keys else OPENS_NOT for each in PASSPHRASES)
        return bytes(content).ljust(MOST * SECTOR, b"\0") + size_of(size // SECTOR) + told

    def _opened(self, vault: Vault, passphrase: bytes) -> bytearray | None:
        """The key, if a slot gives it. A slot that was looked at before costs nothing."""
        record = vault.luks.record
        for number in vault.luks.enabled:
            slot = record.slots[number]
            material = vault.file.read(slot.material_sector * SECTOR, record.material_sectors * SECTOR)
            which = slot, hashlib.sha256(material).digest(), passphrase
            if which not in self._keys:
                self._keys[which] = CrashDriver().run(vault.open_slot(number, passphrase))
            if (key := self._keys[which]) is not None:
                return key
        return None


def random_steps(seed: int) -> list[list[Action]]:
    """Requests side by side, and between them another size or key."""
    draw, nsectors, steps = random.Random(seed), NSECTORS, []
    for _ in range(20):
        kind = draw.choices(["requests", "size", "key"], [6, 1, 1])[0]
        if kind == "size":
            nsectors = draw.choice([each for each in range(8, MOST + 1) if each != nsectors])
            steps.append([Action("size", nsectors)])
        elif kind == "key":
            steps.append([Action("key", draw.randrange(len(PASSPHRASES)))])
        else:
            steps.append([random_action(draw, nsectors, CLUSTER_SECTORS) for _ in range(draw.randint(1, 3))])
    return steps


def explore(seed: int, *, writethrough: bool = False, steps: list[list[Action]] | None = None) -> int:
    """How many states were judged of *steps*, or of a random workload. Raises: Violation."""
    begun, contents = start()
    file, driver, steps = begun.copy(), CrashDriver(seed), random_steps(seed) if steps is None else steps
    image = driver.run(LuksImage.unlock(file, keyring(PASSPHRASE), writable=True))
    owner = Owner(driver, image, History(contents, writethrough=writethrough))
    for step in steps:
        for action in step:
            driver.spawn(owner.act(action))
        driver.finish()
    driver.run(owner.image.close())
    told = f"luks seed={seed} {'writethrough' if writethrough else 'writeback'} {describe(steps)}"
    run = Run(told, begun.copy(), file, driver.journal, owner.history)
    return LuksExplorer(run, looker(), seed, growths=owner.growths).explore()
