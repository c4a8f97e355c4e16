"""Lists of name=value as QEMU's command line has them."""


def split_commas(text: str) -> list[str]:
    """The parts of *text*; a comma in a part is doubled."""
    return [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]
