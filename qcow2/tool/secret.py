"""`--object secret,...`: the keys of encrypted images, as qemu-img takes them. What they hold is never printed."""

import argparse
from collections.abc import Iterable
from typing import Self

from qcow2.tool.commas import split_commas
from qcow2.tool.identity import is_qemu_img, say

KNOWN = ("id", "file", "data", "format")


class Secrets:
    """The secrets of one command line, by their ids; a file, perhaps a pipe, is read once, when its secret is wanted.

    What was read is kept until the end of the block.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        """Raises: ValueError for what is no secret that we understand."""
        self._given = {each["id"]: each for each in map(_parse, texts)}
        self._read: dict[str, bytearray] = {}
        self._chosen: dict[str, str] = {}  # ids by paths

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._read:
            from qcow2.plane.cipher import wipe

            wipe(*self._read.values())
        self._read.clear()

    def __bool__(self) -> bool:
        """Whether there is one."""
        return bool(self._given)

    def __getitem__(self, name: str) -> bytearray:
        """The secret of this id, ours. Raises: ValueError if there is none, or it is no base64; OSError."""
        if name not in self._given:
            raise ValueError(f"No secret with id '{name}'")
        if name not in self._read:
            self._read[name] = _read(self._given[name])
        return self._read[name]

    def for_new_slot(self, name: str) -> bytearray:
        """The same, to make a key slot of: QEMU takes text alone, without NUL; that is said, or refused in its name."""
        secret = self[name]
        if not _is_text(secret):
            if is_qemu_img():
                raise ValueError(f"Data from secret {name} is not valid UTF-8")
            text = "is not UTF-8, or has a NUL byte: QEMU will not open this image with it"
            say(f"warning: the secret '{name}' {text}")
        return secret

    def choose(self, path: str, name: str) -> None:
        """Let the image at *path*, or whose LUKS header is there, be opened with the secret of this id alone."""
        self._chosen[path] = name

    def keys(self, path: str) -> list[bytearray]:
        """Copies, the caller's to wipe, of what may open the image at *path*: the chosen one, else all, to be tried."""
        from qcow2.library.hostfile import are_one_file

        chosen = [name for each, name in self._chosen.items() if each == path or are_one_file(each, path)]
        return [bytearray(self[name]) for name in chosen[:1] or self._given]


def add_object_option(parser: argparse.ArgumentParser) -> None:
    """Declare how keys are given."""
    parser.add_argument(
        "--object",
        action="append",
        default=[],
        metavar="SECRET",
        help="secret,id=ID,file=FILE: a key for encrypted images; or data=TEXT for FILE; and format=base64",
    )


def _is_text(secret: bytearray) -> bool:
    try:
        return "\0" not in secret.decode()
    except UnicodeDecodeError:
        return False


def _read(given: dict[str, str]) -> bytearray:
    from qcow2.plane.cipher import wipe

    if "file" in given:
        with open(given["file"], "rb", buffering=0) as file:
            content = file.readall()
    else:
        content = given["data"].encode(errors="surrogateescape")
    read = bytearray(content) if given.get("format", "raw") == "raw" else _decoded(given["id"], content)
    wipe(content)
    return read


def _decoded(name: str, content: bytes) -> bytearray:
    import base64
    import binascii

    try:
        return bytearray(base64.b64decode(b"".join(content.split()), validate=True))
    except binascii.Error as error:
        raise ValueError(f"secret '{name}' is not valid base64: {error}") from None


def _parse(text: str) -> dict[str, str]:
    given = _fields(text)
    kind = given.pop("qom-type", None)
    if kind != "secret":
        raise ValueError(f"invalid object type: {kind}, only secret is supported")
    if "keyid" in given or "iv" in given:
        raise ValueError("--object secret: one that another secret encrypts (keyid, iv) is not supported")
    for name in given:
        if name not in KNOWN:
            raise ValueError(f"--object: Invalid parameter '{name}', known are {', '.join(KNOWN)}")
    if not given.get("id"):
        raise ValueError("--object: Parameter 'id' is missing")
    if "file" in given and "data" in given:
        raise ValueError("--object: 'file' and 'data' are mutually exclusive")
    if "file" not in given and "data" not in given:
        raise ValueError("--object: Must provide 'file' or 'data'")
    if given.get("format", "raw") not in ("raw", "base64"):
        raise ValueError(f"--object secret,id={given['id']}: format is not one of raw, base64")
    return given


def _fields(text: str) -> dict[str, str]:
    if text.startswith("{"):
        import json

        try:
            given = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError("--object: what begins with a brace is no JSON, or too deep") from None
        return {str(name): str(value) for name, value in given.items()}
    fields = {}
    for number, part in enumerate(split_commas(text)):
        name, equals, value = part.partition("=")
        if not equals and number == 0:
            name, value = "qom-type", name
        fields[name] = value
    return fields
