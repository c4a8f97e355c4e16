"""Encrypted images that lie: whatever their headers say, opening them ends, and in a refusal."""

import random
from contextlib import suppress
from pathlib import Path

import pytest

import qcow2
from qcow2.driver.file import HostFile, run
from qcow2.error import ImageError
from qcow2.judge.check import check
from tests.program import qcow2_tool_ok

MUTANTS = 150
SMALL = "cluster_size=4k,encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=1,encrypt.hash-alg=sha1"


@pytest.mark.parametrize("image_format", ["qcow2", "luks"])
def test_mutants_of_the_headers_open_or_are_refused(tmp_path: Path, image_format: str) -> None:
    path = tmp_path / "disk"
    words = SMALL if image_format == "qcow2" else "key-secret=s0,iter-time=1,hash-alg=sha1"
    secret = ("--object", "secret,id=s0,data=k")
    qcow2_tool_ok("create", "-q", "-f", image_format, *secret, "-o", words, path, "1M")
    original = path.read_bytes()
    luks = original.index(b"LUKS\xba\xbe")
    chance = random.Random(image_format)
    opened = refused = 0
    for _ in range(MUTANTS):
        content = bytearray(original)
        for _ in range(chance.randint(1, 3)):
            # Not the iterations: that a header can ask for minutes is no news.
            slot = luks + chance.randrange(240, 256)
            where = chance.choice((chance.randrange(200), luks + chance.randrange(164), slot))
            content[where] = chance.choice((0, 1, 0x7F, 0xFF, chance.randrange(256)))
        path.write_bytes(content[: chance.choice((len(content), len(content), luks + 300))])
        try:
            with qcow2.open(path, format=image_format, key=b"k", writable=chance.random() < 0.5) as disk:
                disk.read(0, min(disk.size, 4096))
            opened += 1
        except (ImageError, OSError):
            refused += 1
        if image_format == "qcow2":
            with HostFile.open(str(path)) as file, suppress(ImageError):
                run(check(file))
    assert opened > MUTANTS // 20
    assert refused > MUTANTS // 4
