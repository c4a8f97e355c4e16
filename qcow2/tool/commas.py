"""Lists of name=value as QEMU's command line has them."""

import re


def split_commas(text: str) -> list[str]:
    """The parts of *text*; a comma in a part is doubled."""
    return [part.replace(",,", ",") for part in re.split(r"(?<!,),(?!,)", text)]
