"""Where a daemon with `--sandbox` makes and names files: in the directory of its image, and below it."""

import os

from vhost.option import Options


def own_directories(options: Options) -> list[str]:
    """Where snapshots and copies may be made: nowhere without a control socket, or beside a device.

    Nor beside what is read only, and perhaps others' as well: who may make files there may change all.
    """
    path = os.path.realpath(options.blk_file)
    is_out = options.control is None or options.read_only or not os.path.isfile(path)
    return [] if is_out else [os.path.dirname(path)]


def require_reach(options: Options, path: str) -> None:
    """Raises: ValueError if no sandboxed daemon may make or change a file at *path*."""
    own, place = own_directories(options), os.path.realpath(path)
    if options.sandbox and not any(os.path.commonpath([directory, place]) == directory for directory in own):
        why = ", which is read only" if options.read_only else ""
        where = " and ".join(own) or f"no directory beside {options.blk_file}{why}"
        raise ValueError(f"{path}: --sandbox leaves {where}")


def require_turn(options: Options, path: str) -> None:
    """Raises: ValueError if only a symbolic link, which no sandbox makes, could let the served path lead to *path*."""
    served = os.path.dirname(os.path.abspath(options.blk_file))
    if options.sandbox and not os.path.samefile(served, os.path.dirname(os.path.realpath(path))):
        text = "--sandbox makes no symbolic link, which serving it would take: it can be left only"
        raise ValueError(f"{path}: is not in {served}: {text}")
