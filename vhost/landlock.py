"""Landlock: which files a thread may still open or remove, and how; and whom else it may reach."""

import ctypes
import os
import struct
from collections.abc import Iterable
from enum import IntFlag

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on every architecture
VERSION_FLAG, PATH_BENEATH = 1, 1
NET_ACCESS = 0b11  # LANDLOCK_ACCESS_NET_BIND_TCP and _CONNECT_TCP
SCOPES = 0b11  # LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET and _SIGNAL


class Access(IntFlag):
    """LANDLOCK_ACCESS_FS_*."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_REG = 1 << 8
    REFER = 1 << 13  # names in another directory
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15

    READ_TREE = READ_FILE | READ_DIR
    CHANGE = READ_FILE | WRITE_FILE | TRUNCATE | IOCTL_DEV
    OF_DIRECTORIES = READ_DIR | REMOVE_DIR | REMOVE_FILE | MAKE_REG | REFER


Rule = tuple[str, Access]  # a path, what may be done at or beneath it

# What each version can forbid at all, and what a sandbox lacks without it.
HANDLED = ((1, (1 << 13) - 1), (2, Access.REFER), (3, Access.TRUNCATE), (5, Access.IOCTL_DEV))
LACKS = ((3, "truncation"), (4, "TCP"), (5, "ioctls of devices"), (6, "abstract sockets and signals"))

libc = ctypes.CDLL(None, use_errno=True)


def version() -> int:
    """What the kernel offers; 0: nothing."""
    return max(0, int(libc.syscall(CREATE_RULESET, None, 0, VERSION_FLAG)))


def restrict(rules: Iterable[Rule]) -> None:
    """Let this thread, and those it starts, do with files only what *rules* say, and reach nobody outside.

    Needs no_new_privs. Paths that do not exist are passed over. Raises: OSError.
    """
    known = version()
    handled = sum(access for since, access in HANDLED if known >= since)
    words = [handled, NET_ACCESS, SCOPES][: 3 if known >= 6 else 2 if known >= 4 else 1]
    attributes = struct.pack(f"={len(words)}Q", *words)
    ruleset = _check(libc.syscall(CREATE_RULESET, attributes, len(attributes), 0), "Landlock")
    try:
        for path, access in rules:
            _allow(ruleset, path, access & handled)
        _check(libc.syscall(RESTRICT_SELF, ruleset, 0), "Landlock")
    finally:
        os.close(ruleset)


def lacks() -> list[str]:
    """What this kernel's Landlock does not keep a thread from."""
    return [what for since, what in LACKS if version() < since]


def _allow(ruleset: int, path: str, access: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not os.path.isdir(path):
            access &= ~Access.OF_DIRECTORIES
        if access:
            rule = struct.pack("=Qi", access, fd)
            _check(libc.syscall(ADD_RULE, ruleset, PATH_BENEATH, rule, 0), path)
    finally:
        os.close(fd)


def _check(result: int, subject: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{os.strerror(number)} (sandbox)", subject)
    return result
