"""What a lack of space is: the rule is `space.h`."""

from qcow2.native import lib


def lacks_space(error: OSError) -> bool:
    """Whether the host had no room, or the quota none."""
    return bool(lib.lacks_space(-(error.errno or 0)))
