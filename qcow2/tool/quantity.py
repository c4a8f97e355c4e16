"""Sizes as people write and read them."""

import re

SUFFIXES = "bkmgtpe"
LIMIT = (1 << 63) - 512
WRITTEN = re.compile(r"(\d+(?:\.\d+)?)([bkmgtpe]?)", re.ASCII | re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of a size like 512, 64k, 1.5T.

    Raises: ValueError with the text and the limit.
    """
    match = WRITTEN.fullmatch(text)
    if match is None:
        raise ValueError(f"size {text!r} is not a number with at most one of the suffixes k, M, G, T, P, E")
    number, suffix = match.groups()
    whole, _, part = number.partition(".")
    exponent = max(0, SUFFIXES.find(suffix.lower() or "b"))
    if part.strip("0") and not exponent:
        raise ValueError(f"size {text!r} has a fraction of a byte")
    nbytes = (int(whole + part) << 10 * exponent) // int("1" + "0" * len(part))
    if nbytes > LIMIT:
        raise ValueError(f"size {text!r} is more than the limit of {LIMIT} bytes")
    return nbytes


def format_size(nbytes: int) -> str:
    """Three digits and a binary unit, as in 1.5 GiB; from 1000 of one unit on, the next."""
    exponent = 0
    while nbytes >= 1000 << 10 * exponent and exponent < 6:
        exponent += 1
    unit = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")[exponent]
    return f"{nbytes / (1 << 10 * exponent):.3g} {unit}B"
