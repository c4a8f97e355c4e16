"""What the Python half of a worker takes from the operating system; its C half has `ring/host.h`."""

import os
from concurrent.futures import Executor, ThreadPoolExecutor


class Host:
    """Eventfds and pools of threads; the simulator of the tests has its own."""

    def eventfd(self) -> int:
        """A new one, which never makes anybody wait. Raises: OSError."""
        return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def signal(self, fd: int) -> None:
        """Wake who waits for *fd*."""
        os.eventfd_write(fd, 1)

    def close(self, fd: int) -> None:
        """Give *fd* back."""
        os.close(fd)

    def pool(self, nthreads: int, name: str) -> Executor:
        """Threads for what would hold up the worker."""
        return ThreadPoolExecutor(nthreads, name)


HOST = Host()
