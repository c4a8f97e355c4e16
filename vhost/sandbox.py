"""`--sandbox`: give up what a daemon that has its image and its sockets does not need, before it meets a guest.

New privileges, capabilities, and by Landlock every file but the ones it may have to open again: the chain of images,
what is in the link log's directory, and what the interpreter loads late. Before any other thread exists, because all
of that is a thread's own. There is no seccomp filter: the library for it that pip has was last released in 2021.
"""

import ctypes
import errno
import logging
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on every architecture
VERSION_FLAG, PATH_BENEATH = 1, 1
PR_SET_NO_NEW_PRIVS, PR_CAPBSET_DROP = 38, 24
CAP_DAC_OVERRIDE, CAPABILITY_VERSION_3 = 1, 0x20080522

WRITE_FILE, READ_FILE, READ_DIR = 1 << 1, 1 << 2, 1 << 3  # LANDLOCK_ACCESS_FS_*
REMOVE_FILE, MAKE_REG, TRUNCATE = 1 << 5, 1 << 8, 1 << 14
FILE_ACCESS = ((1, (1 << 13) - 1), (2, 1 << 13), (3, TRUNCATE))  # what each version of Landlock can forbid
NET_ACCESS = 0b11  # LANDLOCK_ACCESS_NET_BIND_TCP and _CONNECT_TCP, from version 4

READ_TREE = READ_FILE | READ_DIR
CHANGE = READ_FILE | WRITE_FILE | TRUNCATE
KEEP_LOG = CHANGE | READ_DIR | MAKE_REG | REMOVE_FILE

Rule = tuple[str, int]  # a path, what may be done at or beneath it

log = logging.getLogger("vhost")
libc = ctypes.CDLL(None, use_errno=True)


def confine(*, images: list[str], writable: bool, log_directory: str, sockets: list[str]) -> None:
    """Confine this thread, and those it starts, for good.

    *images* is the chain, the one that may be *writable* first. *sockets* are removed at the end.
    Raises: OSError. Says so, once, if the kernel has no Landlock.
    """
    _drop_capabilities()
    _check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    rules = [(image, READ_FILE) for image in images]
    if writable:
        rules += [(images[0], CHANGE), (log_directory, KEEP_LOG)]
    rules += [(os.path.dirname(os.path.abspath(path)), REMOVE_FILE) for path in sockets]
    rules += [(path, READ_TREE) for path in _of_the_interpreter()]
    _restrict_files(rules)


def _of_the_interpreter() -> Iterator[str]:
    """Where modules and libraries are loaded from when they are needed first, and where the boot is named."""
    for path in {*sys.path, *(f"{prefix}/lib" for prefix in (sys.prefix, sys.base_prefix)), "/usr/lib", "/lib"}:
        if path and os.path.exists(path):
            yield path
    yield from (str(Path(__file__).parents[1] / room) for room in ("ring", "virtio", "vhost", "qcow2"))
    yield "/proc/sys/kernel/random"


def _restrict_files(rules: list[Rule]) -> None:
    version = libc.syscall(CREATE_RULESET, None, 0, VERSION_FLAG)
    if version < 1:
        log.warning("the kernel offers no Landlock: the sandbox keeps no file from being opened")
        return
    handled = sum(access for since, access in FILE_ACCESS if version >= since)
    attributes = struct.pack("=QQ", handled, NET_ACCESS) if version >= 4 else struct.pack("=Q", handled)
    ruleset = _check(libc.syscall(CREATE_RULESET, attributes, len(attributes), 0), "Landlock")
    try:
        for path, access in rules:
            _allow(ruleset, path, access & handled)
        _check(libc.syscall(RESTRICT_SELF, ruleset, 0), "Landlock")
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, access: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not os.path.isdir(path):
            access &= ~(READ_DIR | MAKE_REG | REMOVE_FILE)
        rule = struct.pack("=Qi", access, fd)
        _check(libc.syscall(ADD_RULE, ruleset, PATH_BENEATH, rule, 0), path)
    finally:
        os.close(fd)


def _drop_capabilities() -> None:
    """Keep none, but for root the one by which it may open an image of any owner again: Landlock says which."""
    keep = 1 << CAP_DAC_OVERRIDE if os.geteuid() == 0 else 0
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    for capability in range(last + 1):
        if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0 and ctypes.get_errno() != errno.EPERM:
            raise OSError(ctypes.get_errno(), "capabilities")  # EPERM: who is not root has nothing to drop
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    held = _permitted()
    sets = struct.pack("=6I", keep & held, keep & held, 0, 0, 0, 0)  # effective, permitted, inheritable; high words
    _check(libc.capset(header, sets), "capabilities")


def _permitted() -> int:
    status = Path("/proc/thread-self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("CapPrm:")).split()[1], 16)


def _check(result: int, subject: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{os.strerror(number)} (sandbox)", subject)
    return result
