"""The system calls that a daemon in its sandbox may still make; every other one fails with EPERM.

It has met its sockets, its files and its service manager by then. What it still does: read and write, take a
front-end's descriptors, map memory, start threads, use io_uring, open its images and its link log again (Landlock says
which files), load modules late. It makes no socket, connects to nobody, starts no program, sends no signal to others.
"""

import ctypes
import errno
import logging
import os
import platform
import struct
from collections.abc import Iterable, Iterator

# Numbers on x86-64 and on aarch64, which lacks some of the older calls.
CALLS: dict[str, tuple[int, int | None]] = {
    # files
    "read": (0, 63),
    "write": (1, 64),
    "open": (2, None),
    "close": (3, 57),
    "stat": (4, None),
    "fstat": (5, 80),
    "lstat": (6, None),
    "lseek": (8, 62),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "readv": (19, 65),
    "writev": (20, 66),
    "access": (21, None),
    "dup": (32, 23),
    "fcntl": (72, 25),
    "flock": (73, 32),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "ftruncate": (77, 46),
    "getcwd": (79, 17),
    "rename": (82, None),
    "mkdir": (83, None),
    "rmdir": (84, None),
    "link": (86, None),
    "unlink": (87, None),
    "readlink": (89, None),
    "fchmod": (91, 52),
    "fchown": (93, 55),
    "umask": (95, 166),
    "statfs": (137, 43),
    "fstatfs": (138, 44),
    "getdents64": (217, 61),
    "fadvise64": (221, 223),
    "openat": (257, 56),
    "mkdirat": (258, 34),
    "newfstatat": (262, 79),
    "unlinkat": (263, 35),
    "renameat": (264, 38),
    "linkat": (265, 37),
    "readlinkat": (267, 78),
    "renameat2": (316, 276),
    "faccessat": (269, 48),
    "sync_file_range": (277, 84),
    "fallocate": (285, 47),
    "dup3": (292, 24),
    "preadv": (295, 69),
    "pwritev": (296, 70),
    "preadv2": (327, 286),
    "pwritev2": (328, 287),
    "statx": (332, 291),
    "close_range": (436, 436),
    "faccessat2": (439, 439),
    # sockets that exist, and waiting
    "poll": (7, None),
    "select": (23, None),
    "accept": (43, 202),
    "sendto": (44, 206),
    "recvfrom": (45, 207),
    "sendmsg": (46, 211),
    "recvmsg": (47, 212),
    "shutdown": (48, 210),
    "listen": (50, 201),
    "getsockname": (51, 204),
    "getpeername": (52, 205),
    "setsockopt": (54, 208),
    "getsockopt": (55, 209),
    "epoll_wait": (232, None),
    "epoll_ctl": (233, 21),
    "pselect6": (270, 72),
    "ppoll": (271, 73),
    "epoll_pwait": (281, 22),
    "accept4": (288, 242),
    "eventfd2": (290, 19),
    "epoll_create1": (291, 20),
    "pipe2": (293, 59),
    "memfd_create": (319, 279),
    "io_uring_setup": (425, 425),  # until `seal`
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "epoll_pwait2": (441, 441),
    # memory
    "munmap": (11, 215),
    "brk": (12, 214),
    "mremap": (25, 216),
    "msync": (26, 227),
    "mincore": (27, 232),
    "madvise": (28, 233),
    # threads, signals to ourselves, time
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sched_yield": (24, 124),
    "nanosleep": (35, 101),
    "getpid": (39, 172),
    "exit": (60, 93),
    "uname": (63, 160),
    "gettimeofday": (96, 169),
    "getrlimit": (97, 163),
    "getrusage": (98, 165),
    "sysinfo": (99, 179),
    "times": (100, 153),
    "getuid": (102, 174),
    "getgid": (104, 176),
    "geteuid": (107, 175),
    "getegid": (108, 177),
    "getppid": (110, 173),
    "getresuid": (118, 148),
    "getresgid": (120, 150),
    "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137),
    "sigaltstack": (131, 132),
    "gettid": (186, 178),
    "time": (201, None),
    "futex": (202, 98),
    "sched_getaffinity": (204, 123),
    "set_tid_address": (218, 96),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "set_robust_list": (273, 99),
    "getcpu": (309, 168),
    "seccomp": (317, 277),  # it can only take away
    "getrandom": (318, 278),
    "membarrier": (324, 283),
    "rseq": (334, 293),
    "futex_waitv": (449, 449),
}
MMAP, MPROTECT, IOCTL, CLONE, PRCTL = (9, 222), (10, 226), (16, 29), (56, 220), (157, 167)
TGKILL, PRLIMIT64, CLONE3 = (234, 131), (302, 261), (435, 435)
IO_URING_SETUP, IO_URING_REGISTER = 425, 427

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_*
X32 = 0x40000000  # numbers from here on are those of another interface of x86-64

WRITE_AND_EXECUTE = 0b110  # PROT_WRITE | PROT_EXEC
CLONE_THREAD = 0x10000
PR_SET_NAME, PR_GET_NAME, PR_SET_VMA = 15, 16, 0x53564D41
FIONBIO, FIOCLEX, FIONCLEX, TCGETS = 0x5421, 0x5451, 0x5450, 0x5401  # of setblocking, set_inheritable, isatty
BLKSSZGET, BLKPBSZGET, BLKGETSIZE64 = 0x1268, 0x127B, 0x80081272

LOAD, JUMP, EQUAL, AT_LEAST, ANY, AND, RETURN = 0x20, 0x05, 0x15, 0x35, 0x45, 0x54, 0x06  # BPF_*
ALLOW, FAIL = 0x7FFF0000, 0x00050000  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # where they are in struct seccomp_data; words are little-endian
SET_MODE_FILTER, TSYNC = 1, 1

Instruction = tuple[int, int, int, int]
YES: Instruction = (RETURN, 0, 0, ALLOW)
NO: Instruction = (RETURN, 0, 0, FAIL | errno.EPERM)
ABSENT: Instruction = (RETURN, 0, 0, FAIL | errno.ENOSYS)

log = logging.getLogger("vhost")
libc = ctypes.CDLL(None, use_errno=True)


class Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def restrict_calls() -> bool:
    """Let this thread, and those it starts, make only the calls above; whether the kernel takes the filter.

    Needs no_new_privs.
    """
    if platform.machine() not in MACHINES:
        log.warning("no filter of system calls is known for %s: the sandbox forbids none", platform.machine())
        return False
    column, _ = MACHINES[platform.machine()]
    return _install([*_frame(), *_rules(column), NO], 0)


def forbid_new_rings() -> None:
    """Let no thread of this process make another io_uring: its operations are no system calls."""
    if platform.machine() in MACHINES:
        rules = [i for number in (IO_URING_SETUP, IO_URING_REGISTER) for i in _call(number, [NO])]
        _install([*_frame(), *rules, YES], TSYNC)


def _frame() -> list[Instruction]:
    """Refuse calls of another architecture, then load the number of the call."""
    _, architecture = MACHINES[platform.machine()]
    return [
        (LOAD, 0, 0, ARCHITECTURE),
        (EQUAL, 1, 0, architecture),
        NO,
        (LOAD, 0, 0, NUMBER),
        (AT_LEAST, 0, 1, X32),
        NO,
    ]


def _rules(column: int) -> Iterator[Instruction]:
    for numbers in CALLS.values():
        number = numbers[column]
        if number is not None:
            yield from _call(number, [YES])
    yield from _call(MMAP[column], _never_both(2, WRITE_AND_EXECUTE))
    yield from _call(MPROTECT[column], _never_both(2, WRITE_AND_EXECUTE))
    yield from _call(CLONE[column], [_argument(0), (ANY, 0, 1, CLONE_THREAD), YES, NO])
    yield from _call(CLONE3[column], [ABSENT])  # its flags are in memory; the C library falls back to clone
    yield from _call(PRCTL[column], _one_of(0, (PR_SET_NAME, PR_GET_NAME, PR_SET_VMA)))
    yield from _call(TGKILL[column], _one_of(0, (os.getpid(),)))
    yield from _call(PRLIMIT64[column], _one_of(0, (0,)))
    allowed = (FIONBIO, FIOCLEX, FIONCLEX, TCGETS, BLKSSZGET, BLKPBSZGET, BLKGETSIZE64)
    yield from _call(IOCTL[column], _one_of(1, allowed))


def _call(number: int, body: list[Instruction]) -> list[Instruction]:
    """*body*, which returns, for the call of that *number*."""
    return [(EQUAL, 0, len(body), number), *body]


def _argument(index: int) -> Instruction:
    return (LOAD, 0, 0, ARGUMENTS + 8 * index)


def _one_of(index: int, values: Iterable[int]) -> list[Instruction]:
    return [_argument(index), *(i for value in values for i in ((EQUAL, 0, 1, value), YES)), NO]


def _never_both(index: int, bits: int) -> list[Instruction]:
    return [_argument(index), (AND, 0, 0, bits), (EQUAL, 0, 1, bits), NO, YES]


def _install(instructions: list[Instruction], flags: int) -> bool:
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)
    program = Program(len(instructions), code)
    number = CALLS["seccomp"][MACHINES[platform.machine()][0]]
    if libc.syscall(number, SET_MODE_FILTER, flags, ctypes.byref(program)) == 0:
        return True
    reason = os.strerror(ctypes.get_errno())
    log.warning("the kernel takes no seccomp filter: %s: the sandbox forbids no system call", reason)
    return False
