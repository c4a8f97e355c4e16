"""Encrypted images: what QEMU wrote we read, what we wrote QEMU reads; without the key there is nothing to see."""

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import qcow2
from qcow2 import ImageError, WrongKey
from tests.file.test_convert import wait_until
from tests.oracle import ask_qemu, peers
from tests.program import TIMEOUT, TOOL, qcow2_tool, qcow2_tool_ok

KEY = b"correct horse\n"  # the newline is part of it
SIZE = 4 << 20
CIPHERS = {
    "xts": "",
    "cbc-essiv": ",encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,"
    "encrypt.ivgen-hash-alg=sha256",
    "cbc-plain": ",encrypt.cipher-mode=cbc,encrypt.ivgen-alg=plain,encrypt.hash-alg=sha1,compat=0.10",
    "small": ",cluster_size=1k,encrypt.cipher-mode=ctr",
    "subclusters": ",extended_l2=on,cluster_size=16k",
    "preallocated": ",preallocation=metadata",
}


@pytest.fixture
def secret(tmp_path: Path) -> list[str]:
    (tmp_path / "key").write_bytes(KEY)
    return ["--object", f"secret,id=s0,file={tmp_path}/key"]


def qemu(program: str, *arguments: str) -> str:
    """What it prints."""
    done = ask_qemu([program, *arguments])
    assert done.returncode == 0, done.stderr
    return done.stdout


def options(path: Path, image_format: str = "luks") -> str:
    return f"driver=qcow2,file.filename={path},encrypt.format={image_format},encrypt.key-secret=s0"


LUKS = "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10"


def create(path: Path, secret: list[str], extra: str = "") -> Path:
    qcow2_tool_ok("create", "-q", *secret, "-o", LUKS + extra, path, str(SIZE))
    return path


def create_by_qemu(path: Path, secret: list[str], wanted: str = LUKS) -> Path:
    qemu("qemu-img", "create", "-q", *secret, "-f", "qcow2", "-o", wanted, str(path), str(SIZE))
    return path


def qemu_reads(path: Path, secret: list[str], content: bytes) -> None:
    """Each QEMU finds the image sound, and exactly *content* on the disk."""
    plain = path.with_suffix(".plain")
    plain.write_bytes(content)
    for peer in peers():
        qemu(peer, "check", "-q", *secret, "--image-opts", options(path))
        qemu(peer, "compare", *secret, "--image-opts", f"driver=raw,file.filename={plain}", options(path))


def qemu_writes(path: Path, secret: list[str], *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    qemu("qemu-io", *secret, *words, "--image-opts", options(path))


def change(disk: qcow2.Disk, model: bytearray, seed: int, count: int) -> None:
    """Random operations of all kinds, also on parts of sectors."""
    chance = random.Random(seed)
    for _ in range(count):
        offset = chance.randrange(len(model))
        nbytes = chance.choice((1, 511, 512, 4096, 65536, 200_000))
        if chance.random() < 0.6:
            offset, nbytes = offset & ~511, max(512, nbytes & ~511)
        nbytes = min(nbytes, len(model) - offset)
        kind = chance.random()
        if kind < 0.6:
            model[offset : offset + nbytes] = data = chance.randbytes(nbytes)
            disk.write(offset, data)
        elif kind < 0.8:
            disk.write_zeroes(offset, nbytes, unmap=kind < 0.7)
            model[offset : offset + nbytes] = bytes(nbytes)
        else:
            assert disk.read(offset, nbytes) == model[offset : offset + nbytes]


@pytest.mark.parametrize(("cipher", "maker"), [("xts", create_by_qemu), *((each, create) for each in CIPHERS)])
def test_what_qemu_and_we_write_in_turns_both_read(
    tmp_path: Path, secret: list[str], cipher: str, maker: Callable[..., Path]
) -> None:
    path = maker(tmp_path / "disk", secret, *([CIPHERS[cipher]] if maker is create else []))
    qemu_writes(path, secret, "write -q -P 0x5a 100k 300k", "write -q -z 200k 64k", "write -q -P 0xa5 1M 512")
    with qcow2.open(path, key=KEY, writable=True) as disk:
        model = bytearray(SIZE)
        model[100 << 10 : 400 << 10] = b"\x5a" * (300 << 10)
        model[200 << 10 : 264 << 10] = bytes(64 << 10)
        model[1 << 20 : (1 << 20) + 512] = b"\xa5" * 512
        assert disk.read(0, SIZE) == model
        change(disk, model, 1, 100)
    qemu_reads(path, secret, bytes(model))
    qemu_writes(path, secret, "write -q -P 0x11 3M 100k")
    model[3 << 20 : (3 << 20) + (100 << 10)] = b"\x11" * (100 << 10)
    with qcow2.open(path, key=KEY) as disk:
        assert disk.read(0, SIZE) == model


def test_snapshots_and_a_longer_disk_stay_encrypted(tmp_path: Path, secret: list[str]) -> None:
    path = create(tmp_path / "disk", secret, ",cluster_size=4k")
    with qcow2.open(path, key=KEY, writable=True) as disk:
        model = bytearray(SIZE)
        change(disk, model, 2, 60)
        disk.create_snapshot("then")
        then = bytes(model)
        change(disk, model, 3, 60)
        disk.resize(SIZE + 1536)
        model += bytes(1536)
        change(disk, model, 4, 30)
    qemu_reads(path, secret, bytes(model))
    with qcow2.open(path, key=KEY, snapshot="then") as disk:
        assert disk.read(0, SIZE) == then
    with qcow2.open(path, key=KEY, writable=True) as disk:
        disk.apply_snapshot("then")
    qemu_reads(path, secret, then)


def test_a_chain_of_encrypted_and_plain_images_is_read_with_all_its_keys(tmp_path: Path, secret: list[str]) -> None:
    base = create(tmp_path / "base", secret)
    with qcow2.open(base, key=KEY, writable=True) as disk:
        model = bytearray(SIZE)
        change(disk, model, 5, 40)
    middle, top = tmp_path / "middle", tmp_path / "top"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", str(base), "-F", "qcow2", str(middle), str(SIZE))
    (tmp_path / "key").write_bytes(b"another")
    create(top, secret, f",backing_file={middle},backing_fmt=qcow2")
    asked = []

    def key(path: str) -> bytes:
        asked.append(path)
        return b"another" if path == str(top) else KEY

    for path in (middle, top):
        with qcow2.open(path, key=key, writable=True) as disk:
            assert disk.read(0, SIZE) == model
            change(disk, model, 6, 40)
            assert disk.read(0, SIZE) == model
    assert set(asked) == {str(base), str(top)}
    with qcow2.open(top, key=[b"wrong", KEY, b"another"]) as disk:
        assert disk.read(0, SIZE) == model


def test_without_the_key_nothing_opens_it_but_check_map_and_info(tmp_path: Path, secret: list[str]) -> None:
    path = create(tmp_path / "disk", secret)
    qemu_writes(path, secret, "write -q -P 0x5a 0 64k")
    for key in (None, b"correct horse", []):
        with pytest.raises(WrongKey) as caught:
            qcow2.open(path, key=key)
        assert "correct" not in str(caught.value)
    for command in ("check", "info", "map"):
        qcow2_tool_ok(command, "--output=json", path)


def test_legacy_aes_is_read_and_not_written(tmp_path: Path, secret: list[str]) -> None:
    (tmp_path / "key").write_bytes(b"short")
    path = create_by_qemu(tmp_path / "disk", secret, "encrypt.format=aes,encrypt.key-secret=s0")
    qemu("qemu-io", *secret, "-c", "write -q -P 0x5a 64k 1k", "--image-opts", options(path, "aes"))
    with qcow2.open(path, key=b"short") as disk:
        assert disk.read(0, SIZE) == bytes(64 << 10) + b"\x5a" * 1024 + bytes(SIZE - (65 << 10))
    with pytest.raises(ImageError, match="read only"):
        qcow2.open(path, key=b"short", writable=True)


def test_convert_encrypts_and_decrypts_and_compare_sees_the_same(tmp_path: Path, secret: list[str]) -> None:
    plain, encrypted, again = (tmp_path / name for name in ("plain", "encrypted", "again"))
    content = bytearray(SIZE)
    content[: 5 << 10] = random.Random(1).randbytes(5 << 10)
    content[2 << 20 : (2 << 20) + 70_000] = random.Random(2).randbytes(70_000)
    plain.write_bytes(content)
    qcow2_tool_ok("convert", "-f", "raw", *secret, "-O", "qcow2", "-o", LUKS, plain, encrypted)
    qemu_reads(encrypted, secret, bytes(content))
    qcow2_tool_ok("convert", *secret, "-O", "raw", encrypted, again)
    assert again.read_bytes() == content
    assert "Images are identical" in qcow2_tool_ok("compare", "-F", "raw", *secret, encrypted, again)
    qcow2_tool_ok("convert", "-n", "-f", "raw", *secret, "-O", "qcow2", plain, encrypted)
    qemu_reads(encrypted, secret, bytes(content))
    done = qcow2_tool("convert", "-c", "-f", "raw", *secret, "-O", "qcow2", "-o", LUKS, plain, tmp_path / "packed")
    assert done.returncode == 1
    assert done.stderr == "qcow2: Compression and encryption not supported at the same time\n"


def test_info_tells_what_qemu_tells_without_the_key(tmp_path: Path, secret: list[str]) -> None:
    path = create(tmp_path / "disk", secret, CIPHERS["cbc-essiv"])
    ours = json.loads(qcow2_tool_ok("info", "--output=json", path))
    qemus = json.loads(qemu("qemu-img", "info", "--output=json", str(path)))
    ours["format-specific"]["data"]["encrypt"].pop("detached-header")  # which QEMU tells from 9.0 on
    assert ours["encrypted"] is True
    assert ours["format-specific"] == qemus["format-specific"]


@pytest.mark.parametrize(
    ("objects", "wanted", "text"),
    [
        ([], "encrypt.format=luks", "Parameter 'encrypt.key-secret' is required for cipher"),
        (["secret,id=s1,data=x"], LUKS, "No secret with id 's0'"),
        (["secret,id=s0,data=x"], LUKS + ",encrypt.cipher-alg=camellia-256", "encrypt.cipher-alg=camellia-256"),
        (["secret,id=s0,data=x"], LUKS + ",encrypt.cipher-alg=cast5-128", "cipher-alg=cast5-128 is not possible"),
        (["secret,id=s0,data=x"], LUKS + ",encrypt.cipher-alg=aes-192", "cipher-alg=aes-192"),
        (["secret,id=s0,data=x"], LUKS + ",encrypt.cipher-alg=aes-192,encrypt.cipher-mode=cbc", "cipher-alg=aes-192"),
        (["secret,id=s0,data=x"], LUKS + ",encrypt.hash-alg=md4", "encrypt.hash-alg=md4"),
        (["secret,id=s0,data=x"], LUKS + ",cluster_size=512", "1024 bytes at least"),
        (["secret,id=s0,data=x"], "encrypt.key-secret=s0", "encrypt.format is missing"),
        (["secret,id=s0,data=x"], "encrypt.format=aes,encrypt.key-secret=s0", "only luks"),
        (["secret,id=s0,data=*,format=base64"], LUKS, "not valid base64"),
        (["secret,id=s0,data=x,keyid=s1,iv=y"], LUKS, "keyid"),
        (["secret,id=s0"], LUKS, "Must provide 'file' or 'data'"),
        (["tls-creds-x509,id=s0"], LUKS, "only secret is supported"),
        (['{"id": ' + "[" * 5000 + "]" * 5000 + "}"], LUKS, "no JSON, or too deep"),
    ],
)
def test_what_cannot_be_created_is_refused_by_name(tmp_path: Path, objects: list[str], wanted: str, text: str) -> None:
    words = [word for each in objects for word in ("--object", each)]
    done = qcow2_tool("create", *words, "-o", wanted, tmp_path / "disk", "1M")
    assert done.returncode == 1
    assert text in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "disk").exists()


@pytest.mark.parametrize("command", ["create", "convert"])
@pytest.mark.parametrize("more", ["", ",data_file=data,data_file_use=empty"])
def test_what_was_there_stays_if_nobody_can_encrypt_so(tmp_path: Path, command: str, more: str) -> None:
    path, data, source = (tmp_path / name for name in ("disk", "data", "source"))
    qcow2.create(path, 4096)
    qcow2.create(source, 4096)
    data.write_bytes(b"precious")
    before = path.read_bytes()
    wanted = LUKS + ",encrypt.cipher-alg=cast5-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv" + more
    words = ["-f", "qcow2", path, "1M"] if command == "create" else ["-O", "qcow2", source, path]
    done = qcow2_tool(command, "--object", "secret,id=s0,data=x", "-o", wanted, *words)
    text = "cipher mode cbc-essiv:sha256: no key of cast5 is as long as this hash"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"qcow2: {path}: {text}\n")
    assert (path.read_bytes(), data.read_bytes()) == (before, b"precious")


def test_measure_counts_the_header(tmp_path: Path) -> None:
    words = ["--object", "secret,id=s0,data=x", "-O", "qcow2", "-o", LUKS, "--output=json", "--size=4M"]
    measures = json.loads(qcow2_tool_ok("measure", *words))
    assert measures == {"required": 2424832, "fully-allocated": 6619136}  # QEMU 10.0


def amend(path: Path, secrets: dict[str, bytes], wanted: str, *how: str) -> str:
    """What the tool says; the first secret has to open the image, as all do."""
    words = []
    for name, content in secrets.items():
        (path.parent / name).write_bytes(content)
        words += ["--object", f"secret,id={name},file={path.parent / name}"]
    done = qcow2_tool("amend", *how, *words, "-o", wanted, path)
    assert done.returncode == (1 if done.stderr else 0)
    return done.stderr


def test_key_slots_are_added_and_erased_and_qemu_agrees(tmp_path: Path, secret: list[str]) -> None:
    path = create(tmp_path / "disk", secret)
    with qcow2.open(path, key=KEY, writable=True) as disk:
        disk.write(0, b"kept" * 128)
    fast = "encrypt.state=active,encrypt.iter-time=10,encrypt.new-secret="
    assert amend(path, {"a": KEY, "b": b"second"}, f"{fast}b,encrypt.keyslot=7") == ""
    assert amend(path, {"a": b"second", "c": b"third"}, f"{fast}c") == ""
    assert "active keyslot 7" in amend(path, {"a": KEY, "c": b"third"}, f"{fast}c,encrypt.keyslot=7")
    assert "between 0 and 7" in amend(path, {"a": KEY}, "encrypt.state=inactive,encrypt.keyslot=9")
    assert "already erased" in amend(path, {"a": KEY}, "encrypt.state=inactive,encrypt.keyslot=5")
    assert "No keyslots match" in amend(path, {"a": KEY, "x": b"x"}, "encrypt.state=inactive,encrypt.old-secret=x")
    assert "opens no key slot" in amend(path, {"x": b"x"}, "encrypt.state=inactive,encrypt.keyslot=0")
    assert "state" in amend(path, {"a": KEY}, "encrypt.new-secret=a")
    (tmp_path / "key").write_bytes(b"second")  # QEMU opens it with what we have added
    qemu_reads(path, secret, b"kept" * 128 + bytes(SIZE - 512))
    qemu("qemu-img", "amend", *secret, "-o", "encrypt.state=inactive,encrypt.keyslot=0", "--image-opts", options(path))
    assert amend(path, {"a": b"second"}, "encrypt.state=inactive,encrypt.old-secret=a") == ""
    assert "only active keyslot 1" in amend(path, {"a": b"third"}, "encrypt.state=inactive,encrypt.keyslot=1")
    for key, opens in ((KEY, False), (b"second", False), (b"third", True)):
        if opens:
            with qcow2.open(path, key=key) as disk:
                assert disk.read(0, 512) == b"kept" * 128
        else:
            with pytest.raises(WrongKey):
                qcow2.open(path, key=key)


def test_what_a_slot_that_is_off_has_past_the_headers_end_is_nobodys(tmp_path: Path, secret: list[str]) -> None:
    path = create(tmp_path / "disk", secret)
    content = bytearray(path.read_bytes())
    at = content.index(bytes.fromhex("0537be77 00000010")) + 16  # the header's length, in its extension
    content[at : at + 8] = (512 << 10).to_bytes(8, "big")  # of eight slots of 252 KiB
    path.write_bytes(content)
    plain = tmp_path / "plain"
    plain.write_bytes(bytes(SIZE))
    for peer in peers():
        qemu(peer, "compare", *secret, "--image-opts", f"driver=raw,file.filename={plain}", options(path))
    with qcow2.open(path, key=KEY, writable=True) as disk:
        assert disk.read(0, SIZE) == bytes(SIZE)
    fast = "encrypt.state=active,encrypt.iter-time=10,encrypt.new-secret="
    said = amend(path, {"a": KEY, "b": b"second"}, f"{fast}b,encrypt.keyslot=7")
    assert "Can't add keyslot 7: its material ends at 2066432, past the LUKS header of 524288 bytes" in said
    assert amend(path, {"a": KEY, "b": b"second"}, f"{fast}b") == ""
    assert "all keyslots are in use" in amend(path, {"a": KEY, "c": b"third"}, f"{fast}c")
    (tmp_path / "key").write_bytes(b"second")
    for peer in peers():
        qemu(peer, "compare", *secret, "--image-opts", f"driver=raw,file.filename={plain}", options(path))


def test_a_raw_luks_image_is_read_and_written_by_qemu_and_us(tmp_path: Path, secret: list[str]) -> None:
    path, plain = tmp_path / "disk.luks", tmp_path / "plain"
    words = ["-f", "luks", "-o", "key-secret=s0,iter-time=10"]
    qcow2_tool_ok("create", "-q", *secret, *words, path, str(SIZE))
    opts = f"driver=luks,file.filename={path},key-secret=s0"
    qemu("qemu-io", *secret, "-c", f"write -q -z 0 {SIZE}", "-c", "write -q -P 9 1M 64k", "--image-opts", opts)
    with qcow2.open(path, format="luks", key=KEY, writable=True) as disk:
        model = bytearray(SIZE)
        model[1 << 20 : (1 << 20) + (64 << 10)] = b"\t" * (64 << 10)
        assert disk.read(0, SIZE) == model
        change(disk, model, 8, 60)
        disk.resize(SIZE + 5000)
        model += bytes(5120)
        change(disk, model, 9, 20)
    plain.write_bytes(model)
    qemu("qemu-img", "compare", *secret, "--image-opts", f"driver=raw,file.filename={plain}", opts)
    again = tmp_path / "again.luks"
    qcow2_tool_ok("convert", *secret, "-f", "raw", "-O", "luks", "-o", "key-secret=s0,iter-time=10", plain, again)
    assert "identical" in qcow2_tool_ok("compare", *secret, "-f", "luks", "-F", "luks", path, again)
    ours = json.loads(qcow2_tool_ok("info", "-f", "luks", "--output=json", again))
    qemus = json.loads(qemu("qemu-img", "info", "-f", "luks", "--output=json", str(again)))
    ours["format-specific"]["data"].pop("detached-header")  # which QEMU tells from 9.0 on
    assert ours["format-specific"] == qemus["format-specific"]
    assert ours["virtual-size"] == qemus["virtual-size"] == len(model)
    luks = "-f", "luks"
    assert amend(path, {"a": KEY, "b": b"x"}, "state=active,new-secret=b,iter-time=10", *luks) == ""
    assert amend(path, {"b": b"x"}, "state=inactive,keyslot=0", *luks) == ""
    with pytest.raises(WrongKey):
        qcow2.open(path, format="luks", key=KEY)
    qcow2.open(path, format="luks", key=b"x").close()
    top = tmp_path / "top"
    qcow2_tool_ok("create", "-q", *secret, "-b", again, "-F", "luks", "-o", LUKS, top)
    with qcow2.open(top, key=KEY, writable=True) as disk:
        assert disk.read(0, len(model)) == model
        change(disk, model, 10, 20)
        assert disk.read(0, len(model)) == model


def test_a_raw_luks_image_that_a_signal_keeps_from_growing_is_as_it_was(tmp_path: Path, secret: list[str]) -> None:
    path = tmp_path / "disk"
    qcow2.create(path, 1 << 20, format="luks", key=KEY, iter_time=10)
    before = path.read_bytes()
    words = [*secret, "--image-opts", f"driver=luks,file.filename={path},key-secret=s0", "1G"]
    with subprocess.Popen([TOOL, "resize", *words]) as process:
        wait_until(lambda: path.stat().st_size > len(before))
        process.terminate()
    assert process.returncode == -signal.SIGTERM
    assert path.read_bytes() == before


def test_a_raw_luks_image_is_not_longer_than_files_are(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    qcow2.create(path, 1 << 20, format="luks", key=KEY, iter_time=10)
    before = path.read_bytes()
    with qcow2.open(path, format="luks", key=KEY, writable=True) as disk:
        with pytest.raises(ValueError, match="more than a file can have"):
            disk.resize((1 << 63) - 512)
    assert path.read_bytes() == before


@pytest.mark.parametrize("mode", ["off", "metadata", "falloc", "full"])
@pytest.mark.parametrize("how", ["create", "convert"])
def test_a_raw_luks_image_has_its_space_at_once(tmp_path: Path, secret: list[str], mode: str, how: str) -> None:
    results = []
    (tmp_path / "raw").write_bytes(bytes(SIZE))
    for program in (TOOL, *peers()):
        path = tmp_path / "disk"
        words = [*secret, "-o", f"key-secret=s0,iter-time=10,preallocation={mode}"]
        if how == "create":
            said = qemu(str(program), "create", *words, "-f", "luks", str(path), str(SIZE))
        else:
            said = qemu(str(program), "convert", *words, "-f", "raw", "-O", "luks", str(tmp_path / "raw"), str(path))
        is_there = path.stat().st_blocks * 512 >= SIZE
        results.append((said, path.stat().st_size, is_there))
        assert is_there or (how, mode) in [("create", "off"), ("create", "metadata")]
        with qcow2.open(path, format="luks", key=KEY) as disk:
            assert how == "create" or disk.read(0, disk.size) == bytes(SIZE)
        path.unlink()
    assert results == [results[0]] * len(results)


@pytest.mark.skipif(shutil.which("cryptsetup") is None, reason="cryptsetup is not installed")
def test_cryptsetup_opens_what_we_made_and_we_what_it_made(tmp_path: Path, secret: list[str]) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    qcow2_tool_ok("create", "-q", *secret, "-f", "luks", "-o", "key-secret=s0,iter-time=10", ours, "1M")
    key = str(tmp_path / "key")
    subprocess.run(["cryptsetup", "open", "--test-passphrase", "--key-file", key, ours], check=True)
    theirs.write_bytes(bytes(8 << 20))
    quick = ["--type", "luks1", "--pbkdf-force-iterations", "1000", "--batch-mode"]
    subprocess.run(["cryptsetup", "luksFormat", *quick, "--key-file", key, theirs], check=True)
    with qcow2.open(theirs, format="luks", key=KEY, writable=True) as disk:
        disk.write(700, b"ours")
        assert disk.read(699, 6)[1:5] == b"ours"


def test_a_hash_that_newer_qemus_have(tmp_path: Path, secret: list[str]) -> None:
    if "sm3" not in hashlib.algorithms_available:
        pytest.skip("this OpenSSL has no sm3")
    wanted = LUKS + ",encrypt.hash-alg=sm3"
    path, theirs = create(tmp_path / "disk.qcow2", secret, ",encrypt.hash-alg=sm3"), tmp_path / "theirs.qcow2"
    with qcow2.open(path, key=KEY, writable=True) as disk:
        disk.write(0, b"x" * 4096)
    for peer in peers():
        made = ask_qemu([peer, "create", "-q", *secret, "-f", "qcow2", "-o", wanted, str(theirs), str(SIZE)])
        if made.returncode:
            assert "sm3" in made.stderr  # QEMU 7.2
            continue
        with qcow2.open(theirs, key=KEY) as disk:
            assert disk.read(0, SIZE) == bytes(SIZE)
        qemu(peer, "check", "-q", *secret, "--image-opts", options(path))
        qemu(peer, "convert", *secret, "--image-opts", options(path), "-O", "raw", str(tmp_path / "plain"))
        assert (tmp_path / "plain").read_bytes() == (b"x" * 4096).ljust(SIZE, b"\0")


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "cipher",
    [
        "serpent-256,encrypt.cipher-mode=xts",
        "serpent-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256",
        "twofish-256,encrypt.cipher-mode=xts",
        "twofish-128,encrypt.cipher-mode=ctr",
        "cast5-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=plain64",
        "cast5-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=md5",
        "cast5-128,encrypt.cipher-mode=ecb",
    ],
)
def test_ciphers_that_only_another_library_has(tmp_path: Path, secret: list[str], cipher: str) -> None:
    wanted = f",encrypt.cipher-alg={cipher}"
    done = qcow2_tool("create", "-q", *secret, "-o", LUKS + wanted, tmp_path / "disk.qcow2", str(SIZE))
    if "libgcrypt" in done.stderr:
        pytest.skip("there is no libgcrypt")
    theirs = create_by_qemu(tmp_path / "theirs.qcow2", secret, LUKS + wanted)
    content = random.Random(8).randbytes(70000).ljust(SIZE, b"\0")
    for path in (tmp_path / "disk.qcow2", theirs):
        with qcow2.open(path, key=KEY, writable=True) as disk:
            disk.write(0, content[:70144])
        qemu_reads(path, secret, content)
        qemu_writes(path, secret, "write -P 7 65536 4096")
        with qcow2.open(path, key=KEY) as disk:
            assert disk.read(65536, 4096) == b"\7" * 4096
            assert disk.read(0, 65536) == content[:65536]
        assert content[:64] not in path.read_bytes()


# -- a convert that ends while it derives the key of what it has made, which is nothing yet

ENCRYPTED = {
    "qcow2": ("qcow2", "encrypt.format=luks,encrypt.key-secret=s0"),
    "data file": ("qcow2", "encrypt.format=luks,encrypt.key-secret=s0,data_file=data"),
    "luks": ("luks", "key-secret=s0"),
}
WITHOUT_MEMORY = """
import hashlib, sys
from qcow2.tool.command import main
derive, target = hashlib.pbkdf2_hmac, sys.argv[-1]
old = open(target, "rb").read(4096)
def without_memory(*given):
    first = open(target, "rb").read(4096)
    if first != old and any(first[6:8]):
        raise MemoryError
    return derive(*given)
hashlib.pbkdf2_hmac = without_memory
sys.exit(main(sys.argv[1:]))
"""


def convert(directory: Path, secret: list[str], image_format: str, wanted: str) -> list[str]:
    """The words that make an encrypted image, called target."""
    (directory / "source").write_bytes(b"x" * 4096)
    names = [str(directory / name) for name in ("source", "target")]
    return ["convert", *secret, "-f", "raw", "-O", image_format, "-o", wanted, *names]


def has_header(path: Path) -> bool:
    """Whether there is one, but perhaps for its magic."""
    return path.exists() and any(path.read_bytes()[6:8])


@pytest.mark.parametrize(("image_format", "wanted"), ENCRYPTED.values(), ids=ENCRYPTED)
def test_killed_before_it_copies_a_convert_leaves_nothing_that_opens(
    tmp_path: Path, secret: list[str], image_format: str, wanted: str
) -> None:
    target = tmp_path / "target"
    with subprocess.Popen([TOOL, *convert(tmp_path, secret, image_format, wanted)]) as process:
        wait_until(lambda: has_header(target))
        process.kill()
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(ImageError, match="magic"):
        qcow2.open(target, format=image_format, key=KEY)


@pytest.mark.parametrize(("image_format", "wanted"), ENCRYPTED.values(), ids=ENCRYPTED)
def test_what_a_convert_replaces_is_no_image_if_the_key_cannot_be_derived(
    tmp_path: Path, secret: list[str], image_format: str, wanted: str
) -> None:
    target = tmp_path / "target"
    qcow2.create(target, 4096, format=image_format, key=KEY, iter_time=10)
    command = [sys.executable, "-c", WITHOUT_MEMORY, *convert(tmp_path, secret, image_format, wanted)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stderr) == (1, "qcow2: Cannot allocate memory\n")
    with pytest.raises(ImageError, match="magic"):
        qcow2.open(target, format=image_format, key=KEY)
