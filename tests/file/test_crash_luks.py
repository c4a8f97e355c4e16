"""Raw LUKS images by enumeration: the disk, its size and its key slots after every death; broken laws are found."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from qcow2.driver.operation import Resize, Write
from qcow2.engine.luks import Vault
from qcow2.format.luks import LuksRecord
from qcow2.node.luks import LuksImage
from tests.crash.explorer import Violation
from tests.crash.luks import explore
from tests.crash.workload import Action

Patch = pytest.MonkeyPatch
WRITE, FLUSH, LONGER, SHORTER = Action("write", 6, 5), Action("flush"), Action("size", 52), Action("size", 20)
ADD, ERASE = Action("key", 1), Action("key", 0)  # a second passphrase; the first one


@pytest.mark.parametrize(
    "steps",
    [[[ADD], [ERASE]], [[LONGER], [WRITE, FLUSH, WRITE], [SHORTER], [LONGER]]],
    ids=["slots", "sizes"],
)
def test_every_death_leaves_what_is_allowed(steps: list[list[Action]]) -> None:
    assert explore(1, steps=steps) > 20


@pytest.mark.sample(2)
@pytest.mark.parametrize("writethrough", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_random_workloads(seed: int, writethrough: bool) -> None:
    assert explore(seed, writethrough=writethrough) > 100


def longer_is_noise(patch: Patch) -> None:
    """Law 3: what a disk grows by is not written."""

    async def append(self: LuksImage, old: int, size: int) -> None:
        await Resize(self.file, self._start + size)

    patch.setattr(LuksImage, "_append", append)


def slots_are_not_synced(patch: Patch) -> None:
    """Law 2: a passphrase that was said to open the disk does not, after a power loss."""

    async def write_header(self: Vault, record: LuksRecord, sectors: list[int]) -> None:
        await Write(self.file, self.host_offset, record.pack()[:512])

    patch.setattr(Vault, "_write_header", write_header)


def the_other_slot_is_erased(patch: Patch) -> None:
    """Law 7: the passphrase that was to stay opens nothing."""
    erase = Vault.erase_slot

    async def erase_slot(self: Vault, number: int) -> Vault:
        return await erase(replace(self), 1 - number)

    patch.setattr(Vault, "erase_slot", erase_slot)


@pytest.mark.parametrize(
    ("broken", "step"), [(longer_is_noise, LONGER), (slots_are_not_synced, ADD), (the_other_slot_is_erased, ERASE)]
)
def test_a_broken_law_is_found(monkeypatch: Patch, broken: Callable[[Patch], None], step: Action) -> None:
    broken(monkeypatch)
    with pytest.raises(Violation):
        explore(1, steps=[[step]] if step is not ERASE else [[ADD], [ERASE]])
