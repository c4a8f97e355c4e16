"""Run a command where the kernel refuses some system calls, by a real seccomp filter that its children inherit.

``python -m tests.refused EPERM io_uring pytest tests/file``: what containers (EPERM) or kernels without io_uring
(ENOSYS) do.
"""

import ctypes
import errno
import os
import platform
import struct
import sys

# Of x86-64 and aarch64, where they differ: a number that is another call there would be refused as well.
CALLS = {
    "io_uring": (425, 426, 427),  # io_uring_setup, _enter, _register
    "io_uring_setup": (425,),
    "io_uring_enter": (426,),
    "threads": (435, 56 if platform.machine() == "x86_64" else 220),  # clone3, clone
}
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*
LOAD_WORD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
ALLOW, FAIL = 0x7FFF0000, 0x00050000  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO
NUMBER_AT, ARCHITECTURE_AT = 0, 4  # in struct seccomp_data
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, MODE_FILTER = 22, 38, 2


class Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def refuse(number: int, calls: tuple[int, ...]) -> None:
    """Let system *calls* fail with errno *number*, for this process and its children, for good."""
    count = len(calls)
    instructions = [
        (LOAD_WORD, 0, 0, ARCHITECTURE_AT),
        (JUMP_IF_EQUAL, 0, 1 + count, ARCHITECTURES[platform.machine()]),
        (LOAD_WORD, 0, 0, NUMBER_AT),
        *((JUMP_IF_EQUAL, count - i, 0, call) for i, call in enumerate(calls)),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, FAIL | number),
    ]
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)
    program = Program(len(instructions), code)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(PR_SET_SECCOMP, MODE_FILTER, ctypes.byref(program)):
        raise OSError(ctypes.get_errno(), "the kernel takes no seccomp filter")


if __name__ == "__main__":
    refuse(getattr(errno, sys.argv[1]), CALLS[sys.argv[2]])
    os.execvp(sys.argv[3], sys.argv[3:])
