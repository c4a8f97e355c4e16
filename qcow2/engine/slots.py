"""Which key slots are added and erased: the rules before `qcow2.engine.luks` writes. One slot is always left."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from qcow2.engine.luks import Vault
from qcow2.format.luks import DEFAULT_ITER_TIME_MS, NSLOTS, require_passphrase
from qcow2.plane.cipher import wipe


@dataclass(frozen=True, slots=True)
class Addition:
    """Let *passphrase* open a slot, the first that is free unless a number is given."""

    passphrase: bytes | bytearray = field(repr=False)
    number: int | None = None
    iter_time_ms: int = DEFAULT_ITER_TIME_MS

    def __post_init__(self) -> None:
        require_passphrase(self.passphrase)


@dataclass(frozen=True, slots=True)
class Erasure:
    """Let nothing open that slot, or those that *passphrase* opens; one of the two is given."""

    passphrase: bytes | bytearray | None = field(default=None, repr=False)
    number: int | None = None


async def change_slots(vault: Vault, keys: Sequence[bytes | bytearray], change: Addition | Erasure) -> None:
    """Do *change*, if one of *keys* opens a slot; stable on return. A death leaves the old slots or the new ones.

    Raises: WrongKey, OSError; ValueError for what would lose the key, or makes no sense.
    """
    key = (await vault.open(keys)).key
    if change.number is not None and not 0 <= change.number < NSLOTS:
        raise ValueError(f"Invalid keyslot {change.number} specified, must be between 0 and {NSLOTS - 1}")
    if isinstance(change, Addition):
        await vault.add_slot(_slot_to_add(vault, change.number), change.passphrase, key, change.iter_time_ms)
    else:
        for number in await _slots_to_erase(vault, change):
            vault = await vault.erase_slot(number)
    wipe(key)


def _slot_to_add(vault: Vault, wanted: int | None) -> int:
    record, enabled = vault.luks.record, vault.luks.enabled
    free = (number for number in range(NSLOTS) if number not in enabled and record.material_end(number) <= vault.nbytes)
    number = next(free, None) if wanted is None else wanted
    if number is None:
        raise ValueError("Can't add a keyslot - all keyslots are in use")
    if number in enabled:
        raise ValueError(f"Refusing to overwrite active keyslot {number} - please erase it first")
    if record.material_end(number) > vault.nbytes:
        text = f"its material ends at {record.material_end(number)}, past the LUKS header of {vault.nbytes} bytes"
        raise ValueError(f"Can't add keyslot {number}: {text}")
    return number


async def _slots_to_erase(vault: Vault, change: Erasure) -> list[int]:
    enabled = vault.luks.enabled
    if change.number is not None:
        if change.number not in enabled:
            raise ValueError(f"Given keyslot {change.number} is already erased (inactive)")
        if change.passphrase is not None and not await vault.open_slot(change.number, change.passphrase):
            raise ValueError(f"Given keyslot {change.number} doesn't contain the given old password")
        numbers = [change.number]
    else:
        assert change.passphrase is not None
        numbers = [number for number in enabled if await vault.open_slot(number, change.passphrase)]
        if not numbers:
            raise ValueError("No keyslots match given (old) password for erase operation")
    if numbers == enabled:
        lost = "will erase all the data in the image irreversibly - refusing operation"
        if change.number is not None:
            raise ValueError(f"Attempt to erase the only active keyslot {enabled[0]} which {lost}")
        text = "All the active keyslots match the (old) password that was given and erasing them"
        raise ValueError(f"{text} {lost}")
    return numbers
