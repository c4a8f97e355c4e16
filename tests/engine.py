"""The engine on a simulated host: images made, driven and read in memory."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from qcow2.driver.boot import Boot
from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.operation import Operation
from qcow2.engine.create import Options, create
from qcow2.engine.encryption import Keyring
from qcow2.engine.image import Image
from qcow2.engine.opened import OpenOptions
from qcow2.format.luks import CipherSpec, Encryption
from qcow2.judge.check import check
from qcow2.node.raw import RawImage
from qcow2.plane.linklog import MARK_OFFSET, NO_MARK, Link, LinkLog, Mark, Origin, read_log
from tests.crash.driver import CrashDriver, SimulatedFile

ORIGIN, TAG = Origin(Boot(0, bytes(16)), 0, 0, b"disk"), 0xBEEF  # of the link log
MARK = slice(MARK_OFFSET, MARK_OFFSET + len(NO_MARK))  # of the header
PASSPHRASE = b"key"
ENCRYPTION = Encryption(
    CipherSpec("aes", "cbc", "essiv", "sha256", 16), "sha256", PASSPHRASE, 0
)  # costs little to open
KEYS = Keyring(lambda path: [PASSPHRASE])
Fault = Callable[[Operation], OSError | None]


class Breaker:
    """Decides which operations fail; at first none does."""

    def __init__(self) -> None:
        self.fault: Fault | None = None

    def __call__(self, operation: Operation) -> OSError | None:
        return self.fault(operation) if self.fault else None


@dataclass
class Bench:
    """One image under the crash driver."""

    driver: CrashDriver
    breaker: Breaker
    file: SimulatedFile
    base: SimulatedFile | None
    image: Image
    data: SimulatedFile | None = None  # an external data file

    def write(self, guest_offset: int, data: bytes) -> None:
        self.driver.run(self.image.write(guest_offset, MemoryBuffer(memoryview(data))))

    def read(self, guest_offset: int, nbytes: int) -> bytes:
        return read(self.driver, self.image, guest_offset, nbytes)

    def content(self) -> bytes:
        return self.read(0, self.image.size)

    def close(self) -> None:
        self.driver.run(self.image.close())

    def assert_sound(self) -> None:
        """Of a file that was closed."""
        report = self.driver.run(check(self.file))
        assert (report.corruptions, report.leaks, report.check_errors) == (0, 0, 0)

    def reopened_content(self) -> bytes:
        """What a reader finds that knows nothing but the files."""
        driver = CrashDriver()
        backing = driver.run(RawImage.open(self.base)) if self.base else None
        options = OpenOptions(keys=KEYS)
        image = driver.run(Image.open(self.file.copy(), backing=backing, data_file=self.data, options=options))
        return read(driver, image, 0, image.size)


def read(driver: CrashDriver, image: Image, guest_offset: int, nbytes: int) -> bytes:
    target = bytearray(nbytes)
    driver.run(image.read(guest_offset, MemoryBuffer(memoryview(target))))
    return bytes(target)


def set_up(
    size: int,
    *,
    seed: int = 0,
    cluster_bits: int = 9,
    refcount_order: int = 4,
    lazy: bool = False,
    base: bytes | None = None,
    cache_size: int = 1 << 20,
    log_capacity: int = 0,
    version: int = 3,
    has_subclusters: bool = False,
    encrypted: bool = False,
    data: bytes | None = None,
) -> Bench:
    """A new image, over a raw *base* if there is one, open for writing; with a link log if that has a capacity.

    Its data is in a file of its own if there is *data*, what that holds at first.
    """
    breaker = Breaker()
    driver = CrashDriver(seed, fault=breaker)
    file = SimulatedFile("disk", {}, 0)
    options = Options(
        size=size,
        version=version,
        cluster_bits=cluster_bits,
        refcount_order=refcount_order,
        lazy_refcounts=lazy,
        has_subclusters=has_subclusters,
        encryption=ENCRYPTION if encrypted else None,
        data_file_name=None if data is None else "data",
    )
    driver.run(create(file, options))
    below = None if base is None else SimulatedFile.parse("base", base)
    backing = None
    if below is not None:
        below.writable = False
        backing = driver.run(RawImage.open(below))
    log = LinkLog(file.memory, file, ORIGIN, TAG, log_capacity, renew=lambda: TAG + 1) if log_capacity else None
    opened = OpenOptions(writable=True, cache_size=cache_size, keys=KEYS)
    own = None if data is None else SimulatedFile.parse("data", data)
    image = driver.run(Image.open(file, backing=backing, data_file=own, options=opened, log=log))
    return Bench(driver, breaker, file, below, image, own)


def open_again(bench: Bench, *, writable: bool = False) -> Bench:
    """The same files in the hands of a new image; the old one was not closed."""
    driver = CrashDriver(fault=bench.breaker)
    image = driver.run(Image.open(bench.file, data_file=bench.data, options=OpenOptions(writable=writable)))
    return Bench(driver, bench.breaker, bench.file, bench.base, image, bench.data)


def mark_of(file: SimulatedFile) -> Mark:
    """What the header of *file* says of its log."""
    return Mark.parse(int.from_bytes(file.read(MARK_OFFSET, len(NO_MARK)), "big"))


def waiting(file: SimulatedFile) -> list[Link] | None:
    """The links that wait, by the mark in the header of *file* and the log in its memory; None: it has no such log."""
    word = int.from_bytes(file.read(MARK_OFFSET, len(NO_MARK)), "big")
    if not word:
        return []
    mark, found = Mark.parse(word), read_log(bytes(file.memory.content))
    return None if found is None or found.tag != mark.tag else found.links_at(mark.stamp)


def noise(nbytes: int, seed: int = 0) -> bytes:
    """Bytes unlike any others."""
    return random.Random(seed).randbytes(nbytes)
