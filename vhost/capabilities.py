"""Capabilities: root's powers, one by one. A daemon that serves one image needs none, or one."""

import ctypes
import errno
import os
import struct
from collections.abc import Iterable

PR_CAPBSET_READ, PR_CAPBSET_DROP = 23, 24
CAP_DAC_OVERRIDE, VERSION_3 = 1, 0x20080522

libc = ctypes.CDLL(None, use_errno=True)


def drop_capabilities(wanted: Iterable[tuple[str, int]]) -> list[str]:
    """Give all capabilities of this thread up, for good.

    *wanted* are paths with what must stay possible there, as `os.access` takes it. Those that root may use only by
    overriding permissions are returned, and that capability is kept.
    """
    for capability in _known():
        if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0 and ctypes.get_errno() != errno.EPERM:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "capabilities")  # EPERM: none to drop
    override = _permitted() & 1 << CAP_DAC_OVERRIDE
    _set(effective=0, permitted=override)
    foreign = [path for path, mode in wanted if not os.access(path, mode, effective_ids=True)] if override else []
    keep = override if foreign else 0
    _set(effective=keep, permitted=keep)
    return foreign


def _known() -> Iterable[int]:
    """The numbers of this kernel's capabilities."""
    capability = 0
    while libc.prctl(PR_CAPBSET_READ, capability, 0, 0, 0) >= 0:
        yield capability
        capability += 1


def _permitted() -> int:
    sets = ctypes.create_string_buffer(24)
    _check(libc.capget(struct.pack("=Ii", VERSION_3, 0), sets))
    words: tuple[int, ...] = struct.unpack("=6I", sets.raw)  # effective, permitted, inheritable, low words first
    return words[1] | words[4] << 32


def _set(*, effective: int, permitted: int) -> None:
    _check(libc.capset(struct.pack("=Ii", VERSION_3, 0), struct.pack("=6I", effective, permitted, 0, 0, 0, 0)))


def _check(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "capabilities")
