"""Sizes as people write and read them."""

import re
from collections.abc import Callable

from qcow2.tool.failure import Failure
from qcow2.tool.identity import is_qemu_img, say

SUFFIXES = "bkmgtpe"
LIMIT = (1 << 63) - 512
HEXADECIMAL = re.compile(r"0x[0-9a-f]+", re.IGNORECASE)
WRITTEN = re.compile(r"(\d+\.?\d*|\.\d+)([bkmgtpe]?)", re.ASCII | re.IGNORECASE)
LEAD = re.compile(r"\s*\+?(?=[\d.])", re.ASCII)  # of a number that C's strtod reads


def parse_size(text: str) -> int:
    """Bytes of a size like 512, 0x200, 64k, 1.5T; `qemu-img` also takes spaces and a plus in front.

    Raises: ValueError with the text and the limit.
    """
    nbytes = _number(text)
    if nbytes > LIMIT:
        raise ValueError(f"size {text!r} is more than the limit of {LIMIT} bytes")
    return nbytes


def _number(text: str) -> int:
    if is_qemu_img() and (lead := LEAD.match(text)):
        text = text[lead.end() :]
    if HEXADECIMAL.fullmatch(text):
        text = str(int(text, 16))
    match = WRITTEN.fullmatch(text)
    if match is None:
        raise ValueError(f"size {text!r} is not a number with at most one of the suffixes k, M, G, T, P, E")
    number, suffix = match.groups()
    whole, _, part = number.partition(".")
    exponent = max(0, SUFFIXES.find(suffix.lower() or "b"))
    if part.strip("0") and not exponent:
        raise ValueError(f"size {text!r} has a fraction of a byte")
    return (int(whole + part) << 10 * exponent) // int("1" + "0" * len(part))


def size_of(what: str, text: str) -> int:
    """The same, of *what* it is.

    Raises: ValueError; Failure for what `qemu-img` has its own words for.
    """
    return _said(parse_size, what, text)


def size_between(what: str, text: str, least: int, most: int) -> int:
    """The same, from *least* to *most*. Raises: as `size_of`; Failure with these two."""
    nbytes = _said(_number, what, text)
    if not least <= nbytes <= most:
        raise Failure(f"Invalid {what} specified. Must be between {least} and {most}.")
    return nbytes


def _said(parse: Callable[[str], int], what: str, text: str) -> int:
    try:
        return parse(text)
    except ValueError as error:
        if not is_qemu_img():
            raise
        say(f"Invalid {what} specified. You may use k, M, G, T, P or E suffixes for")
        raise Failure("kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes.") from error


def format_size(nbytes: int) -> str:
    """Three digits and a binary unit, as in 1.5 GiB; from 1000 of one unit on, the next."""
    exponent = 0
    while nbytes >= 1000 << 10 * exponent and exponent < 6:
        exponent += 1
    unit = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")[exponent]
    return f"{nbytes / (1 << 10 * exponent):.3g} {unit}B"
