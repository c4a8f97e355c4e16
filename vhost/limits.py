"""The limits that a process is born with and may raise itself."""

import ctypes
import resource

DESCRIPTORS_MAX = 1 << 16
M_ARENA_MAX = -8  # of mallopt(3)


def raise_descriptor_limit() -> None:
    """Raise the soft limit of descriptors, usually 1024, to the hard one: 256 queues want four each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS_MAX)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def share_the_heap() -> None:
    """All threads use one heap where address space is limited: each further one of glibc's reserves 64 MiB."""
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
