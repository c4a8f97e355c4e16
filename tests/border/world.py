"""Run a command in a world: ``python -m tests.border.world no-shm qcow2 check disk.qcow2``. Linux; most need root.

Each world is one thing about a host that is not as on the developer's machine. A world is entered for good: the
command replaces this process.
"""

import ctypes
import os
import resource
import sys
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path

STRANGER = 65534  # user and group
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x00020000, 0x08000000, 0x10000000
PR_SET_DUMPABLE = 4
MS_RDONLY, MS_BIND, MS_REC, MS_PRIVATE = 1, 4096, 16384, 1 << 18
libc = ctypes.CDLL(None, use_errno=True)


def _require(result: int, what: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), what)


def _unshare(flags: int) -> None:
    _require(libc.unshare(flags), "unshare")


def _mount(source: str, target: str, kind: str, flags: int = 0, data: str = "") -> None:
    words = (source.encode(), target.encode(), kind.encode(), flags, data.encode())
    _require(libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[4]), f"mount {target}")


def _own_mounts() -> None:
    _unshare(CLONE_NEWNS)
    _mount("none", "/", "", MS_REC | MS_PRIVATE)


def root() -> None:
    """The machine as it is."""


def stranger() -> None:
    """A user who owns the image's directory and nothing else."""
    os.setgroups([])
    os.setgid(STRANGER)
    os.setuid(STRANGER)


def container() -> None:
    """Own mounts and IPC, a boot id of its own; /dev/shm is a volume that outlives it."""
    _own_mounts()
    _unshare(CLONE_NEWIPC)
    with tempfile.NamedTemporaryFile("w") as file:
        print(uuid.uuid4(), file=file, flush=True)
        _mount(file.name, "/proc/sys/kernel/random/boot_id", "", MS_BIND)


def rootless() -> None:
    """A container without privileges: root there, the stranger outside."""
    stranger()
    libc.prctl(PR_SET_DUMPABLE, 1)  # or /proc/self is root's
    _unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWIPC)
    for name, text in {"setgroups": "deny", "uid_map": f"0 {STRANGER} 1", "gid_map": f"0 {STRANGER} 1"}.items():
        Path("/proc/self", name).write_text(text)


def own_shm() -> None:
    """A container without a volume: its /dev/shm begins empty and ends with it."""
    container()
    _mount("none", "/dev/shm", "tmpfs")


def no_proc_sys() -> None:
    """/proc/sys is empty."""
    _own_mounts()
    _mount("none", "/proc/sys", "tmpfs", MS_RDONLY)


def no_proc() -> None:
    """/proc is empty."""
    _own_mounts()
    _mount("none", "/proc", "tmpfs", MS_RDONLY)


def no_shm() -> None:
    """/dev/shm takes no file."""
    _own_mounts()
    _mount("none", "/dev/shm", "tmpfs", MS_RDONLY)


def small_shm() -> None:
    """/dev/shm has room for a page."""
    _own_mounts()
    _mount("none", "/dev/shm", "tmpfs", 0, "size=4096")


def few_descriptors() -> None:
    """A soft limit far too low, below a hard one that is not."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (12, 4096))


def no_descriptors() -> None:
    """A hard limit that is too low for a daemon."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12))


def no_threads() -> None:
    """A user who may have this one process."""
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
    stranger()


def little_memory() -> None:
    """128 MiB of address space."""
    resource.setrlimit(resource.RLIMIT_AS, (128 << 20, 128 << 20))


def scarce_memory() -> None:
    """Hardly more than a program takes to start."""
    resource.setrlimit(resource.RLIMIT_AS, (72 << 20, 72 << 20))


def small_files() -> None:
    """No file may grow past 1 MiB (RLIMIT_FSIZE)."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))


def closed_stdio() -> None:
    """Descriptors 0 to 2 are free."""
    os.closerange(0, 3)


WORLDS: dict[str, Callable[[], None]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        root,
        stranger,
        container,
        rootless,
        own_shm,
        no_proc_sys,
        no_proc,
        no_shm,
        small_shm,
        few_descriptors,
        no_descriptors,
        no_threads,
        little_memory,
        scarce_memory,
        small_files,
        closed_stdio,
    )
}


def command(world: str, *words: str | Path) -> list[str]:
    """What to run for *words* to run in *world*."""
    return [sys.executable, "-m", "tests.border.world", world, *map(str, words)]


if __name__ == "__main__":
    program = sys.argv[2:]
    WORLDS[sys.argv[1]]()
    os.execvp(program[0], program)
