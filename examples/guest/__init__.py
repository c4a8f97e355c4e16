"""A small Linux guest: Debian's kernel, an initramfs made on the spot, a job to run, QEMU without KVM."""

from guest.backend import Backend
from guest.kernel import Kernel, debian_kernel
from guest.machine import Guest, GuestFailure, Result, builtin_disk, reconnect_option, vhost_user_disk
from guest.program import Failure, find_program, installed_program
from guest.system import initramfs, root_tree
from guest.tree import Tree, write_directory

__all__ = [
    "Backend",
    "Failure",
    "Guest",
    "GuestFailure",
    "Kernel",
    "Result",
    "Tree",
    "builtin_disk",
    "debian_kernel",
    "find_program",
    "initramfs",
    "installed_program",
    "reconnect_option",
    "root_tree",
    "vhost_user_disk",
    "write_directory",
]
