"""LUKS headers: what hostile ones are refused for, and key slots that survive a death at any moment."""

import random
import struct

import pytest

from qcow2.engine.luks import NewVault, Vault, new_vault
from qcow2.error import CorruptImage, ImageError, UnsupportedImage, WrongKey
from qcow2.format.luks import DISABLED, CipherSpec, Encryption, LuksRecord, parse_luks
from tests.crash.driver import CrashDriver, SimulatedFile, points

SPEC = CipherSpec("aes", "xts", "plain64", None, 32)
CBC = CipherSpec("aes", "cbc", "essiv", "sha256", 16)


def made(spec: CipherSpec = SPEC, hash_name: str = "sha256") -> tuple[SimulatedFile, NewVault]:
    """A header whose slot 0 is opened by "first"."""
    file, driver = SimulatedFile("disk", {}, 0), CrashDriver()
    vault = driver.run(new_vault("", Encryption(spec, hash_name, b"first", 0)))
    driver.run(vault.write(file, 0))
    return file, vault


def opened(file: SimulatedFile, *passphrases: bytes) -> bytes | None:
    """The master key, by a reader that knows nothing but the file."""
    driver = CrashDriver()
    vault = driver.run(Vault.read(file, 0, 1 << 22))
    try:
        return bytes(driver.run(vault.open(passphrases)).key)
    except WrongKey:
        return None


def enabled_that_do_not_open(file: SimulatedFile, *passphrases: bytes) -> list[int]:
    driver = CrashDriver()
    vault = driver.run(Vault.read(file, 0, 1 << 22))
    opens = {n for n in vault.luks.enabled for phrase in passphrases if driver.run(vault.open_slot(n, phrase))}
    return [number for number in vault.luks.enabled if number not in opens]


@pytest.mark.parametrize(("spec", "hash_name"), [(SPEC, "sha256"), (CBC, "sha1"), (CBC, "sha512")])
def test_a_passphrase_gives_the_key_and_another_gives_none(spec: CipherSpec, hash_name: str) -> None:
    file, vault = made(spec, hash_name)
    key = opened(file, b"first")
    assert key is not None
    assert len(key) == vault.luks.record.key_bytes
    assert opened(file, b"other", b"first") == key
    assert opened(file, b"first\n") is None


@pytest.mark.parametrize("number", [1, 6, 7])  # slot 6 lies in both sectors of the header
def test_adding_and_erasing_a_slot_survives_a_death_at_any_moment(number: int) -> None:
    file, _ = made()
    key = opened(file, b"first")
    assert key is not None
    before, driver = file.copy(), CrashDriver(number)
    vault = driver.run(Vault.read(file, 0, 1 << 22))
    vault = driver.run(vault.add_slot(number, b"second", key, 0))
    assert opened(file, b"second") == key
    driver.run(vault.erase_slot(0))
    assert opened(file, b"first") is None
    chance = random.Random(number)
    for point in points(driver.journal, before, file):
        parts = [part for _, effect in point.pending for part in effect.tear()]
        state = point.keep(part for part in parts if chance.random() < 0.5)
        assert opened(state, b"first", b"second") == key
        assert enabled_that_do_not_open(state, b"first", b"second") == []
    assert parse_luks("", file.read(0, 592), 1 << 22).record.slots[0].state == DISABLED


def patched(offset: int, layout: str, *values: int | bytes) -> bytes:
    data = bytearray(made()[0].read(0, LuksRecord.NBYTES))
    struct.pack_into(layout, data, offset, *values)
    return bytes(data)


@pytest.mark.parametrize(
    ("offset", "layout", "value", "text"),
    [
        (0, "6s", b"LUKX\xba\xbe", "not a LUKS header"),
        (6, ">H", 2, "version 2"),
        (8, "32s", b"camellia", "cipher camellia-xts-plain64"),
        (8, "32s", b"a" * 32, "no text that ends"),
        (40, "32s", b"xts-essiv:sha1", "no key of aes is as long"),
        (40, "32s", b"xts", "cipher aes-xts- is not supported"),
        (40, "32s", b"xts-plain64:sha256", "nothing else"),
        (72, "32s", b"whirlpool", "hash 'whirlpool'"),
        (104, ">I", 7, "payload at sector 7"),
        (104, ">I", 100, "payload at sector 100"),
        (108, ">I", 48, "a key of 48 bytes"),
        (108, ">I", 0xFFFFFFFF, "a key of"),
        (164, ">I", 0, "digest iterations 0"),
        (164, ">I", 0xFFFFFFFF, "digest iterations"),
        (208, ">I", 1, "neither on nor off"),
        (212, ">I", 0xFFFFFFFF, "key slot 0 iterations"),
        (212, ">I", 0, "key slot 0 iterations"),
        (248, ">I", 0, "material at sector 0"),
        (248, ">I", 300, "inside what ends"),
        (248, ">I", 0xFFFFFFFF, "limit"),
        (252, ">I", 0xFFFFFFFF, "stripes"),
    ],
)
def test_a_header_that_does_not_hold_together_is_refused_by_name(
    offset: int, layout: str, value: int | bytes, text: str
) -> None:
    with pytest.raises((UnsupportedImage, CorruptImage), match=text):
        parse_luks("disk", patched(offset, layout, value), 1 << 22)


def test_no_mutation_of_a_header_ends_in_anything_but_a_refusal() -> None:
    chance, original = random.Random(7), made()[0].read(0, LuksRecord.NBYTES)
    for _ in range(3000):
        data = bytearray(original)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.choice((0, 1, 0x7F, 0xFF, chance.randrange(256)))
        try:
            luks = parse_luks("disk", bytes(data[: chance.choice((len(data), 591, 3))]), 1 << 22)
        except ImageError:
            continue
        assert all(luks.record.material_end(number) <= 1 << 22 for number in luks.enabled)
