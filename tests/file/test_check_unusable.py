"""`check` finds bitmaps and LUKS headers that nobody can use, as QEMU does by not opening the image; none is freed."""

import struct
from pathlib import Path

import pytest

import qcow2
from tests.builder import Recipe, build
from tests.oracle import ask_qemu, peers, read_header
from tests.program import qcow2_tool, qcow2_tool_ok

BITMAPS, LUKS = 0x23852875, 0x0537BE77
KEY = b"secret"
Change = tuple[str, int, int]  # the format of a field, where it is, its new value


def place_of(path: Path, kind: int) -> tuple[int, bytes]:
    """Where the data of a header extension is, and the data."""
    data = dict(read_header(path).extensions)[kind]
    return path.read_bytes().index(struct.pack(">II", kind, len(data))) + 8, data


def change(path: Path, *changes: Change) -> None:
    content = bytearray(path.read_bytes())
    for code, where, value in changes:
        struct.pack_into(">" + code, content, where, value)
    path.write_bytes(content)


def with_bitmaps(path: Path) -> Path:
    recipe = Recipe(size=64 << 16)
    recipe.data(3, b"data")
    recipe.bitmaps += [("b0", 16), ("b1", 15)]
    recipe.are_bitmaps_clean = True
    return build(recipe, path).path


TYPE, FLAGS, GRANULARITY, TABLE_ENTRIES, NAME_LAST = 16, 12, 17, 8, 25
DAMAGED_BITMAPS: dict[str, tuple[tuple[str, int, int], str]] = {  # what of the directory, and how it is called
    "type": (("B", TYPE, 2), "'b0' is of type 2"),
    "unknown flag": (("I", FLAGS, 8), "'b0' has flags 0x8"),
    "low granularity": (("B", GRANULARITY, 8), "'b0' has granularity_bits 8"),
    "high granularity": (("B", GRANULARITY, 32), "'b0' has granularity_bits 32"),
    "no table": (("I", TABLE_ENTRIES, 0), "'b0' has a table of 0 entries"),
    "no table in use": (("Q", TABLE_ENTRIES, 1), "'b0' has a table of 0 entries"),
    "name of another": (("B", NAME_LAST, ord("1")), "'b1' has the name of another"),
}


@pytest.mark.parametrize("what", DAMAGED_BITMAPS)
def test_a_bitmap_that_nobody_can_use_is_corrupt(tmp_path: Path, what: str) -> None:
    path = with_bitmaps(tmp_path / "disk")
    _, data = place_of(path, BITMAPS)
    (code, field, value), words = DAMAGED_BITMAPS[what]
    change(path, (code, struct.unpack_from(">Q", data, 16)[0] + field, value))
    done = qcow2_tool("check", path)
    assert done.returncode == 2
    assert words in done.stderr
    assert [ask_qemu([peer, "check", str(path)]).returncode for peer in peers()] == [1] * len(peers())
    before = path.read_bytes()
    assert qcow2_tool("check", "-r", "all", path).returncode == 2
    assert path.read_bytes() == before, "what the bitmap may refer to is kept"


@pytest.mark.parametrize("changes", [[("I", 0, 0)], [("Q", 8, 0)], [("I", 0, 0), ("Q", 8, 0)]], ids=str)
def test_bitmaps_that_the_header_does_not_name_are_an_error(tmp_path: Path, changes: list[Change]) -> None:
    path = with_bitmaps(tmp_path / "disk")
    where, _ = place_of(path, BITMAPS)
    change(path, *((code, where + field, value) for code, field, value in changes))
    assert qcow2_tool("check", path).returncode == 1
    assert [ask_qemu([peer, "check", str(path)]).returncode for peer in peers()] == [1] * len(peers())
    before = path.read_bytes()
    assert qcow2_tool("check", "-r", "all", path).returncode == 1
    assert path.read_bytes() == before


def test_a_bitmap_that_nobody_can_use_keeps_no_image_from_being_repaired_and_is_removed(tmp_path: Path) -> None:
    path = with_bitmaps(tmp_path / "disk")
    _, data = place_of(path, BITMAPS)
    change(path, ("B", struct.unpack_from(">Q", data, 16)[0] + TYPE, 2), ("Q", 72, 1))  # not closed cleanly
    with qcow2.open(path, writable=True) as disk:
        assert disk.read(3 << 16, 4) == b"data"
        disk.bitmaps.remove("b0")
    assert qcow2_tool("check", "-r", "leaks", path).returncode == 0, "nobody knew whether its bits are its own"
    assert [ask_qemu([peer, "check", str(path)]).returncode for peer in peers()] == [0] * len(peers())


@pytest.fixture
def encrypted(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    (tmp_path / "key").write_bytes(KEY)
    words = "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=1,encrypt.cipher-alg=aes-128"
    qcow2_tool_ok("create", "-q", "--object", f"secret,id=s0,file={tmp_path}/key", "-o", words, path, "1M")
    return path


def checked_by_peers(path: Path) -> list[int]:
    secret = ["--object", f"secret,id=s0,file={path.with_name('key')}", "--image-opts"]
    name = f"driver=qcow2,file.filename={path},encrypt.key-secret=s0"
    return [ask_qemu([peer, "check", *secret, name]).returncode for peer in peers()]


SLOT_0, SLOT_3 = 208, 208 + 3 * 48
DAMAGED_LUKS: dict[str, tuple[Change, str]] = {
    "magic": (("I", 0, 0), "not a LUKS header"),
    "version": (("H", 6, 2), "LUKS version 2"),
    "cipher": (("I", 8, 0x78787878), "cipher xxxx"),
    "hash": (("I", 72, 0x78787878), "hash 'xxxx"),
    "payload over the key material": (("I", 104, 8), "LUKS payload at sector 8"),
    "length of the key": (("I", 108, 0), "a key of 0 bytes"),
    "digest": (("I", 164, 0), "LUKS digest iterations 0"),
    "no slot is on": (("I", SLOT_0, 0xDEAD), "no key slot is on"),
    "state": (("I", SLOT_3, 7), "key slot 3: state 0x00000007"),
    "key material over the header": (("I", SLOT_0 + 40, 0), "key slot 0: key material at sector 0"),
    "key material past the end": (("I", SLOT_0 + 40, 1 << 20), "LUKS key material ends at"),
    "stripes": (("I", SLOT_0 + 44, 3999), "3999 stripes"),
}


@pytest.mark.parametrize("what", DAMAGED_LUKS)
def test_a_luks_header_that_nobody_can_open_is_corrupt(encrypted: Path, what: str) -> None:
    luks_offset = struct.unpack_from(">Q", place_of(encrypted, LUKS)[1])[0]
    (code, field, value), words = DAMAGED_LUKS[what]
    change(encrypted, (code, luks_offset + field, value))
    done = qcow2_tool("check", encrypted)
    assert done.returncode == 2
    assert words in done.stderr
    assert checked_by_peers(encrypted) == [1] * len(peers())


@pytest.mark.parametrize(
    ("field", "value", "ours"),
    [(8, 591, 2), (8, 4096, 2), (8, 0, 1), (0, 1 << 40, 1), (0, 0, 1), (0, 1 << 16, 2)],
    ids=["too short", "without its material", "empty", "outside", "over the header", "over a table"],
)
def test_a_luks_header_that_cannot_be_where_it_is_said_is_found_and_kept(
    encrypted: Path, field: int, value: int, ours: int
) -> None:
    change(encrypted, ("Q", place_of(encrypted, LUKS)[0] + field, value))
    assert qcow2_tool("check", encrypted).returncode == ours
    assert checked_by_peers(encrypted) == [1] * len(peers())
    material = encrypted.read_bytes().index(b"LUKS\xba\xbe")
    assert qcow2_tool("check", "-r", "all", encrypted).returncode == ours
    done = qcow2_tool("check", encrypted)
    assert "Leaked" in done.stderr or ours == 1, "its clusters are not freed"
    assert encrypted.read_bytes()[material:][:6] == b"LUKS\xba\xbe"


@pytest.mark.parametrize("crypt_method", [0, 1])
def test_a_luks_header_of_an_image_that_is_not_encrypted_with_it_is_refused(encrypted: Path, crypt_method: int) -> None:
    change(encrypted, ("I", 32, crypt_method))
    done = qcow2_tool("check", encrypted)
    assert done.returncode == 1
    assert f"crypt_method {crypt_method}, and a header extension says where a LUKS header is" in done.stderr
    assert checked_by_peers(encrypted) == [1] * len(peers())


def test_a_cipher_that_only_qemu_has_is_not_corrupt(encrypted: Path) -> None:
    luks_offset = struct.unpack_from(">Q", place_of(encrypted, LUKS)[1])[0]
    change(encrypted, ("I", luks_offset + 8, int.from_bytes(b"sm4\0", "big")))
    assert qcow2_tool("check", encrypted).returncode == 0


def test_a_uuid_that_does_not_end_is_opened_as_qemu_opens_it(encrypted: Path) -> None:
    luks_offset = struct.unpack_from(">Q", place_of(encrypted, LUKS)[1])[0]
    change(encrypted, *(("I", luks_offset + at, 0x78780778) for at in range(168, 208, 4)))
    assert checked_by_peers(encrypted) == [0] * len(peers())
    with qcow2.open(encrypted, key=KEY) as disk:
        assert disk.read(0, 512) == bytes(512)
    assert "uuid: xx?xxx?x" in qcow2_tool_ok("info", encrypted)
