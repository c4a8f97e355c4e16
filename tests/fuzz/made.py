"""Base images that the independent builder cannot make: encrypted ones, and those whose data is in another file."""

import struct
from collections.abc import Callable, Iterator

from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.operation import File
from qcow2.engine.create import Options, create
from qcow2.engine.encryption import Keyring, SectorCipher
from qcow2.engine.image import Image
from qcow2.engine.luks import Vault
from qcow2.engine.opened import OpenOptions
from qcow2.engine.plain import Preallocation
from qcow2.plane.cipher import Cipher
from tests.crash.driver import CrashDriver, SimulatedFile
from tests.engine import ENCRYPTION, noise

CLUSTERS = 24
DATA = noise(CLUSTERS // 2 << 14, 4)  # of every data file
LUKS_FIELDS = [(0, "I"), (6, "H"), (8, "B"), (40, "B"), (72, "B"), (104, "I"), (108, "I"), (112, "I"), (164, "I")]
SLOT_FIELDS = [(0, "I"), (4, "I"), (40, "I"), (44, "I")]
KEY = bytes(range(16))


class OneKey(Keyring):
    """Opens whatever has a header that holds together: what it costs to find a key is not to be fuzzed."""

    async def cipher(self, file: File, host_offset: int, nbytes: int, *, is_detached: bool = False) -> SectorCipher:
        vault = await Vault.read(file, host_offset, nbytes, is_detached=is_detached)
        return Cipher(file.path, vault.luks.spec, KEY * (vault.luks.spec.key_bytes // len(KEY)))


KEYS = OneKey(lambda path: [])


def _encrypted() -> Options:
    return Options(CLUSTERS << 12, cluster_bits=12, encryption=ENCRYPTION)


def _data_file() -> Options:
    return Options(CLUSTERS << 12, cluster_bits=12, data_file_name="data")


def _data_file_parts() -> Options:
    return Options(CLUSTERS << 14, cluster_bits=14, data_file_name="data", has_subclusters=True)


def _data_file_raw() -> Options:
    size, preallocation = CLUSTERS << 12, Preallocation.METADATA
    return Options(size, cluster_bits=12, data_file_name="data", data_file_raw=True, preallocation=preallocation)


def _data_file_encrypted() -> Options:
    return Options(CLUSTERS << 12, cluster_bits=12, data_file_name="data", encryption=ENCRYPTION)


MADE: tuple[Callable[[], Options], ...] = (
    _encrypted,
    _data_file,
    _data_file_parts,
    _data_file_raw,
    _data_file_encrypted,
)


def image_of(options: Options) -> bytes:
    """An image with a bit of everything."""
    file, driver = SimulatedFile("image", {}, 0), CrashDriver()
    data = None if options.data_file_name is None else SimulatedFile.parse("data", DATA)
    driver.run(create(file, options))
    image = driver.run(Image.open(file, data_file=data, options=OpenOptions(writable=True, keys=KEYS)))
    size = options.cluster_size
    for cluster in (0, 1, 4, CLUSTERS - 1):
        driver.run(image.write(cluster * size, MemoryBuffer(memoryview(noise(512, cluster)))))
    driver.run(image.write(6 * size, MemoryBuffer(memoryview(noise(size, 6)))))
    driver.run(image.write_zeroes(8 * size, 2 * size, unmap=True))
    driver.run(image.write_zeroes(size, size, unmap=False))
    driver.run(image.close())
    return file.content()


def places_of(content: bytes, options: Options, luks_offset: int) -> Iterator[tuple[str, int, str]]:
    """Name, offset and struct code of the fields of its tables and of its LUKS header."""
    (l1,) = struct.unpack_from(">Q", content, 40)
    (l1_size,) = struct.unpack_from(">I", content, 36)
    words = 2 if options.has_subclusters else 1
    for index in range(l1_size):
        yield f"L1 {index}", l1 + 8 * index, "Q"
        (entry,) = struct.unpack_from(">Q", content, l1 + 8 * index)
        if table := entry & (1 << 56) - 512:
            yield from ((f"L2 {index}.{i}", table + 8 * i, "Q") for i in range(12 * words))
    (refcount_table,) = struct.unpack_from(">Q", content, 48)
    (block,) = struct.unpack_from(">Q", content, refcount_table)
    yield "refcount table 0", refcount_table, "Q"
    yield from ((f"refcounts {i}", block + 8 * i, "Q") for i in range(6))
    if options.encryption is not None:
        yield from ((f"LUKS +{at}", luks_offset + at, code) for at, code in LUKS_FIELDS)
        for slot in range(3):
            yield from (
                (f"key slot {slot} +{at}", luks_offset + 208 + 48 * slot + at, code) for at, code in SLOT_FIELDS
            )
