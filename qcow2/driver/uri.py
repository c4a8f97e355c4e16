"""Names that are no paths."""

SCHEMES = tuple(f"nbd{secure}{transport}://" for secure in ("", "s") for transport in ("", "+unix", "+vsock"))


def is_nbd(name: str) -> bool:
    """Whether *name* is an NBD URI, and no file's."""
    return name.startswith(SCHEMES)
