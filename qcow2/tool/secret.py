"""`--object secret,...`: passphrases that options of images refer to by their id."""

import base64
import binascii

from qcow2.tool.failure import Failure, UsageError

KEYS = ("qom-type", "id", "data", "file", "format")


def secrets_of(texts: list[str]) -> dict[str, bytes]:
    """The content of each secret, by its id.

    Raises: UsageError, Failure; OSError if a file cannot be read.
    """
    secrets = {}
    for text in texts:
        given = _parsed(text)
        if given.get("qom-type") != "secret":
            raise Failure(f"invalid object type: {given.get('qom-type', '')}")
        if "id" not in given:
            raise Failure("Parameter 'id' is missing")
        secrets[given["id"]] = _content(given)
    return secrets


def _parsed(text: str) -> dict[str, str]:
    """`secret,id=ID,file=FILE`; a comma in a value is doubled."""
    given = {}
    for index, part in enumerate(text.replace(",,", "\0").split(",")):
        name, equals, value = part.replace("\0", ",").partition("=")
        if not equals and index == 0:
            name, value = "qom-type", name
        if name not in KEYS:
            raise UsageError(f"--object: Invalid parameter '{name}'")
        given[name] = value
    return given


def _content(given: dict[str, str]) -> bytes:
    if ("data" in given) == ("file" in given):
        raise Failure(
            "'file' and 'data' are mutually exclusive" if "data" in given else "Must provide 'file' or 'data'"
        )
    if "data" in given:
        content = given["data"].encode(errors="surrogateescape")
    else:
        with open(given["file"], "rb") as file:
            content = file.read()
    if given.get("format", "raw") == "raw":
        return content
    try:
        return base64.b64decode(content.strip(), validate=True)
    except binascii.Error as error:
        raise Failure(f"secret {given['id']!r} is no base64") from error
