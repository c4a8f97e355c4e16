"""The inputs worth keeping: one file a target, one input a line in hexadecimal, so that a change is a diff."""

import hashlib
from pathlib import Path

CORPUS = Path(__file__).with_name("corpus")


def load(target: str) -> list[bytes]:
    """The kept inputs of *target*."""
    return [bytes.fromhex(line) for line in (CORPUS / f"{target}.hex").read_text().splitlines()]


def unpack(target: str, directory: Path) -> None:
    """Write each input to a file of its own, named by its hash as libFuzzer does."""
    directory.mkdir(parents=True, exist_ok=True)
    for data in load(target):
        (directory / hashlib.sha1(data).hexdigest()).write_bytes(data)


def pack(target: str, directory: Path) -> int:
    """Keep the inputs in *directory* in place of those of before; their number."""
    inputs = sorted((path.read_bytes() for path in directory.iterdir()), key=lambda data: (len(data), data))
    CORPUS.mkdir(exist_ok=True)
    (CORPUS / f"{target}.hex").write_text("".join(f"{data.hex()}\n" for data in inputs))
    return len(inputs)
