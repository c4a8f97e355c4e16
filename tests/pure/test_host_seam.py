"""The worker asks the kernel in one place, which the simulator replaces."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
HOST = {"host.c", "storage.c", "threads.c", "uring.c"}  # what the simulator replaces
BESIDE = {"loss.c", "memory.c", "trace.c", "stop.h"}  # memory; a file for whoever wants a trace; signals
CALLS = re.compile(
    r"(?<![\w.>])(?:p?readv?2?|p?writev?2?|f?stat[xf]?s?|fcntl|ioctl|close|open|f(?:data)?sync|fallocate|ftruncate"
    r"|sync_file_range|eventfd\w*|poll|epoll\w*|mmap|munmap|madvise|clock_gettime|nanosleep|syscall|gettid|tgkill"
    r"|sigaction|pthread_\w+|io_uring_(?!sqe|prep_|cqe)\w+)\s*\("
)


def test_only_the_host_asks_the_kernel() -> None:
    sources = [path for room in ("ring", "virtio") for path in (ROOT / room).glob("*.[ch]")]
    found = [
        f"{path.name}:{number}: {line.strip()}"
        for path in sources
        if path.name not in HOST | BESIDE
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if CALLS.search(line.partition("/*")[0]) and not line.lstrip().startswith("*")
    ]
    assert not found


def test_the_pattern_knows_what_the_host_calls() -> None:
    assert len(CALLS.findall((ROOT / "ring" / "host.c").read_text())) > 15
