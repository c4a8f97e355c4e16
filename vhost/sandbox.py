"""`--sandbox`: give up what a daemon that has its image and its sockets does not need, before it meets a guest.

New privileges; capabilities; by Landlock every file but those it may have to open again (the chain of images, its own
link logs, what the interpreter loads late), and whom it could reach; by seccomp every system call but those it makes.
All of that is a thread's own, so it comes before there is any other thread.
"""

import ctypes
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from vhost import landlock
from vhost.capabilities import drop_capabilities
from vhost.landlock import Access, Rule
from vhost.seccomp import forbid_new_rings, restrict_calls

PR_SET_NO_NEW_PRIVS = 38
KEEP_LOG = Access.CHANGE | Access.READ_DIR | Access.MAKE_REG | Access.REMOVE_FILE
NAME_FILES = KEEP_LOG | Access.REFER
FIND_LOGS = Access.READ_DIR | Access.REMOVE_DIR  # an empty one

log = logging.getLogger("vhost")
libc = ctypes.CDLL(None, use_errno=True)


def confine(
    *, images: list[str], changed: list[str], log_directory: str, sockets: list[str], directories: Sequence[str] = ()
) -> None:
    """Confine this thread, and those it starts, for good.

    *images* are the files of the chain, of which *changed* are written to. What lies in *log_directory* is all its own,
    others beside it may be found, and not opened. So is all that lies in *directories*, where files are made.
    *sockets* are removed at the end. Says what the kernel has no means for. Raises: OSError.
    """
    parents = [os.path.dirname(os.path.abspath(path)) for path in sockets]
    wanted = [(image, os.R_OK) for image in images] + [(parent, os.W_OK | os.X_OK) for parent in parents]
    wanted += [(path, os.R_OK | os.W_OK) for path in changed]
    for path in drop_capabilities(wanted):
        log.warning("%s: root may use it only by overriding permissions: CAP_DAC_OVERRIDE is kept", path)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "no_new_privs")
    rules = [(image, Access.READ_FILE | Access.IOCTL_DEV) for image in images]
    if changed:
        rules += [*((path, Access.CHANGE) for path in changed), (log_directory, KEEP_LOG)]
        rules += [(os.path.dirname(os.path.abspath(log_directory)), FIND_LOGS)]
    rules += [(path, NAME_FILES) for path in directories]
    rules += [(parent, Access.REMOVE_FILE) for parent in parents]
    _restrict_files([*rules, *_of_the_interpreter()])


def seal() -> None:
    """Take away what was needed to start: this process has its io_uring, if it is to have one."""
    forbid_new_rings()


def _restrict_files(rules: list[Rule]) -> None:
    if landlock.version() < 1:
        log.warning("the kernel offers no Landlock: the sandbox keeps no file from being opened")
    else:
        landlock.restrict(rules)
    if not restrict_calls() and landlock.lacks():
        log.warning("the kernel's Landlock keeps the sandbox from no %s", ", ".join(landlock.lacks()))


def _of_the_interpreter() -> Iterator[Rule]:
    """Where modules and libraries are loaded from when they are needed first, and where the boot is named."""
    prefixes = (sys.prefix, sys.base_prefix)
    for path in {*sys.path, *(f"{prefix}/lib" for prefix in prefixes), "/usr/lib", "/lib"}:
        if path:
            yield path, Access.READ_TREE
    for room in ("ring", "virtio", "vhost", "qcow2"):
        yield str(Path(__file__).parents[1] / room), Access.READ_TREE
    yield "/proc/sys/kernel/random", Access.READ_TREE
