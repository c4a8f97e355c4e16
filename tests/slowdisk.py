"""A file system whose operations last as long as the test says: FUSE, spoken to the kernel without a library.

One flat directory that passes everything through to another one. While a kind of operation is *held* those who ask for
it wait, as with a dead NFS server, until it is let go; nobody sleeps and nothing is timed.
"""

import ctypes
import errno
import os
import select
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.patience import TIMEOUT

LOOKUP, FORGET, GETATTR, SETATTR, UNLINK, OPEN, READ, WRITE = 1, 2, 3, 4, 10, 14, 15, 16
STATFS, RELEASE, FSYNC, FLUSH, INIT, CREATE, INTERRUPT, DESTROY = 17, 18, 20, 25, 26, 35, 36, 38
BATCH_FORGET, FALLOCATE = 42, 43
IN_HEADER = struct.Struct("<IIQQIIIHH")  # struct fuse_in_header
OUT_HEADER = struct.Struct("<IiQ")
ATTR = struct.Struct("<6Q10I")
FATTR_SIZE = 1 << 3
ASYNC_READ, BIG_WRITES, ASYNC_DIO, MAX_PAGES = 1 << 0, 1 << 5, 1 << 15, 1 << 22
MAX_WRITE = 128 << 10
ROOT = 1
MNT_DETACH = 2
KEEP = "keep"
ANYWHERE, READS, SYNCS = -1, -2, -3  # in place of a host offset

libc = ctypes.CDLL(None, use_errno=True)


class SlowDisk:
    """Serves *backing* at *mount_point* inside `with`; skips the test where it may not.

    In another process: one that waits for its own file system cannot even be killed.
    """

    def __init__(self, backing: Path, mount_point: Path, *, lacks: Sequence[int] = ()) -> None:
        """*lacks*: opcodes that it does not know."""
        self.path = mount_point
        self._backing = backing
        self._lacks = lacks

    def __enter__(self) -> "SlowDisk":
        command = [sys.executable, "-m", "tests.slowdisk", self._backing, self.path, *map(str, self._lacks)]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        refusal = self._read_line()
        if refusal:
            self.__exit__()
            pytest.skip(refusal)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.communicate(timeout=TIMEOUT)

    def _read_line(self) -> str:
        assert self._server.stdout
        return self._server.stdout.readline().decode().rstrip()  # no more than a line, or `select` would miss the next

    def _tell(self, *words: int | str) -> None:
        assert self._server.stdin
        self._server.stdin.write(" ".join(map(str, words)).encode() + b"\n")
        while self._read_line() != "so be it":  # but that something is held, which nobody asked about
            assert self._server.poll() is None

    @contextmanager
    def holding(self, *opcodes: int) -> Iterator[None]:
        """Whoever asks for one of *opcodes* waits until the end."""
        self._tell(*opcodes)
        try:
            yield
        finally:
            self.let_go()

    def let_go(self) -> None:
        """All go on; only inside `holding`, and `wait_for` is done with."""
        self._tell()

    def let_others_pass(self) -> None:
        """Those that are held wait on, but no more will be; only inside `holding`, and `wait_for` is done with."""
        self._tell(KEEP)

    @contextmanager
    def failing(self, code: int, host_offset: int = ANYWHERE) -> Iterator[None]:
        """The first write that begins at *host_offset* fails with *code*, and so do all after it, until the end."""
        self._tell(f"{code}@{host_offset}")
        try:
            yield
        finally:
            self.let_go()

    @contextmanager
    def unreadable(self, code: int) -> Iterator[None]:
        """What is read, and not in the page cache, fails with *code*, until the end."""
        self._tell(f"{code}@{READS}")
        try:
            yield
        finally:
            self.let_go()

    @contextmanager
    def unsyncable(self, code: int) -> Iterator[None]:
        """What is synced fails with *code*, until the end."""
        self._tell(f"{code}@{SYNCS}")
        try:
            yield
        finally:
            self.let_go()

    def wait_for_one(self) -> None:
        """Return once an operation is held."""
        assert self._server.stdout
        assert select.select([self._server.stdout], [], [], TIMEOUT)[0], "nothing was held"
        assert self._read_line() == "held"


class Server:
    """What answers the kernel: one thread, told by lines on stdin which opcodes to hold."""

    def __init__(self, backing: Path, mount_point: Path) -> None:
        self._backing = backing
        self._names: dict[int, str] = {}
        self._held: set[int] = set()
        self._fault: tuple[int, int] | None = None  # how writes fail, and where the first one does; or reads, or syncs
        self._waiting: list[bytes] = []
        self._fuse = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)  # what is asked may be withdrawn
        options = f"fd={self._fuse},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
        if libc.mount(b"slowdisk", os.fsencode(mount_point), b"fuse", 0, options) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def serve(self) -> None:
        """Until the end of stdin."""
        ready = select.poll()
        ready.register(self._fuse, select.POLLIN)
        ready.register(0, select.POLLIN)
        while True:
            fds = [fd for fd, _ in ready.poll()]
            if 0 in fds:
                line = os.read(0, 4096)
                if not line:
                    return
                self._obey(line.decode().split())
            elif not self._take():
                return

    def _obey(self, words: list[str]) -> None:
        self._fault = None
        if words and "@" in words[0]:
            code, where = words.pop(0).split("@")
            self._fault = int(code), int(where)
        self._held = {int(word) for word in words if word != KEEP}
        if KEEP not in words:
            waiting, self._waiting = self._waiting, []
            for message in waiting:
                self._answer(message)
        print("so be it", flush=True)

    def _take(self) -> bool:
        """Answer or keep what the kernel asks next -> False: it is unmounted."""
        try:
            message = os.read(self._fuse, MAX_WRITE + 8192)
        except OSError as error:
            return error.errno != errno.ENODEV  # else what was asked has been withdrawn
        if IN_HEADER.unpack_from(message)[1] not in self._held:
            self._answer(message)
            return True
        if not self._waiting:
            print("held", flush=True)
        self._waiting.append(message)
        return True

    def _answer(self, message: bytes) -> None:
        _, opcode, unique, node, *_ = IN_HEADER.unpack_from(message)
        if opcode in (FORGET, BATCH_FORGET, INTERRUPT, DESTROY):
            return
        answer = ANSWERS.get(opcode)
        content, error = b"", 0
        try:
            if answer is None:
                raise OSError(errno.ENOSYS, "")
            content = answer(self, node, message[IN_HEADER.size :])
        except OSError as failure:
            error = -(failure.errno or errno.EIO)
        try:
            os.write(self._fuse, OUT_HEADER.pack(OUT_HEADER.size + len(content), error, unique) + content)
        except OSError as failure:
            if failure.errno not in (errno.ENOENT, errno.ENODEV):  # nobody waits for it any more
                raise

    # what the kernel asks; each returns the content of the answer

    def _path(self, node: int) -> Path:
        return self._backing if node == ROOT else self._backing / self._names[node]

    def _attr(self, node: int) -> bytes:
        st = os.stat(self._path(node))
        times = int(st.st_atime), int(st.st_mtime), int(st.st_ctime), 0, 0, 0
        return ATTR.pack(
            node, st.st_size, st.st_blocks, *times, st.st_mode, st.st_nlink, st.st_uid, st.st_gid, 0, 4096, 0
        )

    def _init(self, node: int, body: bytes) -> bytes:
        _, _, readahead, flags = struct.unpack_from("<4I", body)
        flags &= ASYNC_READ | BIG_WRITES | ASYNC_DIO | MAX_PAGES
        return struct.pack("<4I2H2I2H8I", 7, 31, readahead, flags, 64, 48, MAX_WRITE, 1, 32, 0, *[0] * 8)

    def _lookup(self, node: int, body: bytes) -> bytes:
        name = body.rstrip(b"\0").decode()
        number = os.stat(self._backing / name).st_ino + ROOT  # of its own, whatever the name
        self._names[number] = name
        return struct.pack("<4Q2I", number, 0, 1, 0, 0, 0) + self._attr(number)

    def _getattr(self, node: int, body: bytes) -> bytes:
        return struct.pack("<QII", 0, 0, 0) + self._attr(node)  # to be asked for again each time

    def _setattr(self, node: int, body: bytes) -> bytes:
        valid, _, _, size = struct.unpack_from("<IIQQ", body)
        if valid & FATTR_SIZE:
            os.truncate(self._path(node), size)
        return self._getattr(node, body)

    def _unlink(self, node: int, body: bytes) -> bytes:
        os.unlink(self._backing / body.rstrip(b"\0").decode())
        return b""

    def _open(self, node: int, body: bytes) -> bytes:
        (flags,) = struct.unpack_from("<I", body)
        wanted = flags & (os.O_ACCMODE | os.O_TRUNC)
        return struct.pack("<QII", os.open(self._path(node), wanted | os.O_CLOEXEC), 0, 0)

    def _create(self, node: int, body: bytes) -> bytes:
        _, mode = struct.unpack_from("<II", body)
        name = body[16:]
        fd = os.open(self._backing / name.rstrip(b"\0").decode(), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode & 0o777)
        return self._lookup(node, name) + struct.pack("<QII", fd, 0, 0)

    def _read(self, node: int, body: bytes) -> bytes:
        fd, offset, nbytes = struct.unpack_from("<QQI", body)
        if self._fault is not None and self._fault[1] == READS:
            raise OSError(self._fault[0], "")
        return os.pread(fd, nbytes, offset)

    def _write(self, node: int, body: bytes) -> bytes:
        fd, offset, nbytes = struct.unpack_from("<QQI", body)
        if self._fault is not None and self._fault[1] in (offset, ANYWHERE):
            self._fault = self._fault[0], ANYWHERE
            raise OSError(self._fault[0], "")
        return struct.pack("<II", os.pwrite(fd, body[40 : 40 + nbytes], offset), 0)

    def _fallocate(self, node: int, body: bytes) -> bytes:
        fd, offset, nbytes, mode = struct.unpack_from("<QQQI", body)
        if libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(nbytes)) < 0:
            raise OSError(ctypes.get_errno(), "")
        return b""

    def _release(self, node: int, body: bytes) -> bytes:
        os.close(struct.unpack_from("<Q", body)[0])
        return b""

    def _statfs(self, node: int, body: bytes) -> bytes:
        st = os.statvfs(self._backing)
        counts = st.f_blocks, st.f_bfree, st.f_bavail, st.f_files, st.f_ffree
        return struct.pack("<5Q4I24x", *counts, st.f_bsize, st.f_namemax, st.f_frsize, 0)

    def _fsync(self, node: int, body: bytes) -> bytes:
        if self._fault is not None and self._fault[1] == SYNCS:
            raise OSError(self._fault[0], "")
        return b""

    def _nothing(self, node: int, body: bytes) -> bytes:
        return b""


ANSWERS: dict[int, Callable[[Server, int, bytes], bytes]] = {
    INIT: Server._init,
    LOOKUP: Server._lookup,
    GETATTR: Server._getattr,
    SETATTR: Server._setattr,
    UNLINK: Server._unlink,
    OPEN: Server._open,
    CREATE: Server._create,
    READ: Server._read,
    WRITE: Server._write,
    FSYNC: Server._fsync,
    FLUSH: Server._nothing,
    RELEASE: Server._release,
    FALLOCATE: Server._fallocate,
    STATFS: Server._statfs,
}


def main() -> None:
    backing, mount_point = map(Path, sys.argv[1:3])
    for opcode in sys.argv[3:]:
        del ANSWERS[int(opcode)]
    try:
        server = Server(backing, mount_point)
    except OSError as error:
        print(f"no FUSE: {error}", flush=True)
        return
    print(flush=True)
    try:
        server.serve()
    finally:
        libc.umount2(os.fsencode(mount_point), MNT_DETACH)


if __name__ == "__main__":
    main()
