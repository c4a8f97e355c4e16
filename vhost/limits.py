"""The limits that a process is born with and may raise itself."""

import resource

DESCRIPTORS_MAX = 1 << 16


def raise_descriptor_limit() -> None:
    """Raise the soft limit of descriptors, usually 1024, to the hard one: 256 queues want four each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS_MAX)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
