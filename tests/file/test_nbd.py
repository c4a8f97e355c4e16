"""`qcow2 serve-nbd`: what the NBD protocol promises, asked by a client of the tests' own."""

import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import qcow2
from qcow2.driver.file import HostFile
from qcow2.driver.operation import Buffer
from qcow2.driver.shared import SharedDriver
from qcow2.nbd.export import Export, Terms
from qcow2.nbd.listening import listening_on_path
from qcow2.nbd.server import Server as NbdServer
from qcow2.node.raw import RawImage
from tests import nbdclient as nbd
from tests.nbdclient import NbdError, Server, empty_disk
from tests.oracle import assert_not_corrupt, qemu_img, qemu_io
from tests.program import qcow2_tool_ok

SIZE = 8 << 20
CLUSTER = 64 << 10
EPERM, EIO, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP = 1, 5, 22, 28, 75, 95
HOLE_AND_ZERO = 3


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Data in cluster 1 and 2, zeros in 4."""
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, SIZE)
    qemu_io(path, "write -P 1 64k 128k", "write -z 256k 64k")
    return path


def break_mapping(image: Path, *, cluster: int) -> None:
    """Let the entry of *cluster* lead past every file."""
    with image.open("r+b") as file:
        file.seek(40)
        file.seek(struct.unpack(">Q", file.read(8))[0])
        l2 = struct.unpack(">Q", file.read(8))[0] & ((1 << 56) - 512)
        file.seek(l2 + 8 * cluster)
        file.write(struct.pack(">Q", 1 << 63 | 1 << 55 | 512))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with empty_disk(tmp_path_factory.mktemp("served"), SIZE) as server:
        yield server


def content_of(path: Path) -> bytes:
    with qcow2.open(path) as disk:
        return disk.read(0, disk.size)


@pytest.mark.parametrize("is_structured", [False, True])
def test_what_is_written_is_read(image: Path, is_structured: bool) -> None:
    with Server(image) as server:
        with server.client(structured=is_structured) as client:
            client.write(100, b"x" * 100_000)
            assert client.read(0, 200) == bytes(100) + b"x" * 100
            assert client.read(100_000, 60_000) == b"x" * 100 + b"\1" * 59_900
            client.send(nbd.DISC)
        server.end()
    assert content_of(image)[:196608] == bytes(100) + b"x" * 100_000 + b"\1" * (196608 - 100_100)
    assert_not_corrupt(image)


@pytest.mark.parametrize("is_structured", [False, True])
def test_requests_of_many_pieces(image: Path, is_structured: bool) -> None:
    data = bytes(range(256)) * 4096 * 3 + b"end"
    with Server(image) as server, server.client(structured=is_structured) as client:
        client.write(4321, data)
        assert client.read(4321, len(data)) == data
        assert client.read(0, SIZE)[4321 : 4321 + len(data)] == data


def test_holes_are_told_and_not_sent(image: Path) -> None:
    with Server(image, "-r") as server, server.client() as client:
        reply = client.request(nbd.READ, 0, SIZE)
        assert reply.data == content_of(image)
        assert 2 in reply.kinds
        assert client.request(nbd.READ, 0, 1 << 20, flags=nbd.DF).kinds == [1]


def test_what_the_export_is(image: Path) -> None:
    with Server(image, "-t", "-x", "disk", "-D", "a disk", "-e", "3") as server:
        with server.client(name="disk") as client:
            assert client.size == SIZE
            assert client.flags == 0b1101_1110_1101
        with server.client(waits=True) as client:
            client.greet()
            told = client.go("disk", 1, 2, 3, option=nbd.INFO)
            assert client.flags == 0b1101_0110_1101  # DF needs structured replies
            assert (told[1], told[2]) == (b"disk", b"a disk")
            assert struct.unpack(">III", told[3]) == (1, 4096, 32 << 20)
            name = struct.pack(">I", 4) + b"diska disk"
            assert client.option(nbd.LIST) == [(nbd.SERVER, name), (nbd.ACK, b"")]
            with pytest.raises(NbdError, match=str(nbd.UNKNOWN)):
                client.go("other")
            assert client.option(99)[0][0] == nbd.UNSUP
            assert client.option(nbd.ABORT) == [(nbd.ACK, b"")]
            assert client.is_dropped()


def test_a_client_of_the_old_way(image: Path) -> None:
    with Server(image, "-t", "-x", "disk") as server:
        with server.client(waits=True, structured=False) as client:
            client.greet(flags=0)
            client.send_option(nbd.EXPORT_NAME, b"disk")
            size, _, zeroes = struct.unpack(">QH124s", client.receive(134))
            assert (size, zeroes) == (SIZE, bytes(124))
            assert client.read(CLUSTER, 10) == b"\1" * 10
        with server.client(waits=True) as client:
            client.greet(flags=3)
            client.send_option(nbd.EXPORT_NAME, b"other")
            assert client.is_dropped()


def test_allocation(image: Path) -> None:
    with Server(image, "-r") as server, server.client(contexts=("base:allocation",)) as client:
        found = client.status(0, SIZE)["base:allocation"]
        assert found == [(CLUSTER, 3), (2 * CLUSTER, 0), (SIZE - 3 * CLUSTER, 3)]
        assert client.status(CLUSTER + 1, SIZE - CLUSTER - 1, flags=nbd.REQ_ONE) == {
            "base:allocation": [(2 * CLUSTER - 1, 0)]
        }
        with pytest.raises(NbdError, match=str(EINVAL)):
            client.status(0, 0)


def test_who_wants_one_stretch_is_told_before_the_others_are_looked_at(image: Path) -> None:
    break_mapping(image, cluster=3)
    with Server(image, "-r") as server, server.client(contexts=("base:allocation",)) as client:
        assert client.status(0, SIZE, flags=nbd.REQ_ONE) == {"base:allocation": [(CLUSTER, 3)]}
        with pytest.raises(NbdError, match=f"^{EIO}$"):
            client.status(0, SIZE)


def test_a_disk_in_many_pieces_is_told_part_by_part(tmp_path: Path) -> None:
    """Who asks for all of it at once would keep everybody else waiting."""
    path, cluster, nbytes = tmp_path / "pieces.qcow2", 512, 4 << 20
    qcow2.create(path, nbytes, cluster_size=cluster)
    with qcow2.open(path, "r+") as disk:
        for offset in range(nbytes - cluster, -1, -cluster):
            disk.write(offset, b"x" * cluster)
    with Server(path, "-r") as server, server.client(contexts=("base:allocation",)) as client:
        told = 0
        while told < nbytes:
            ((length, flags),) = client.status(told, nbytes - told)["base:allocation"]
            assert flags == 0
            assert cluster <= length <= nbytes // 2
            told += length


def test_the_status_of_a_bitmap(image: Path) -> None:
    qemu_img("bitmap", "--add", "-g", "32k", image, "b0")
    qemu_io(image, "write 1M 32k", "write 1060k 1", "write 8388096 512")
    wanted = [((1 << 20), 0), (65536, 1), (SIZE - (1 << 20) - 65536 - 32768, 0), (32768, 1)]
    with Server(image, "-r", "-B", "b0") as server:
        with server.client(contexts=("base:allocation", "qemu:dirty-bitmap:b0")) as client:
            found = client.status(0, SIZE)["qemu:dirty-bitmap:b0"]
            assert found == wanted
            part = client.status((1 << 20) + 100, 65536)["qemu:dirty-bitmap:b0"]
            assert part == [(65436, 1), (100, 0)]
            assert client.status(7, 1)["qemu:dirty-bitmap:b0"] == [(1, 0)]


def test_a_bitmap_of_a_disk_that_is_written(image: Path) -> None:
    qemu_img("bitmap", "--add", image, "b0")
    with Server(image, "-B", "b0") as server, server.client(contexts=("qemu:dirty-bitmap:b0",)) as client:
        assert client.status(0, SIZE) == {"qemu:dirty-bitmap:b0": [(SIZE, 0)]}
        client.write(CLUSTER, b"x")
        found = client.status(0, SIZE)["qemu:dirty-bitmap:b0"]
        assert found == [(CLUSTER, 0), (CLUSTER, 1), (SIZE - 2 * CLUSTER, 0)]


def test_contexts_are_found_by_query(image: Path) -> None:
    qemu_img("bitmap", "--add", image, "b0")
    with Server(image, "-r", "-B", "b0") as server, server.client(waits=True) as client:
        client.greet()
        assert client.option(nbd.LIST_CONTEXTS, nbd.context_query(""))[0][0] == nbd.INVALID
        client.option(nbd.STRUCTURED)
        for queries, found in [
            ((), [b"base:allocation", b"qemu:dirty-bitmap:b0"]),
            (("qemu:",), [b"qemu:dirty-bitmap:b0"]),
            (("qemu:dirty-bitmap:", "base:allocation"), [b"base:allocation", b"qemu:dirty-bitmap:b0"]),
            (("other:",), []),
        ]:
            *names, last = client.option(nbd.LIST_CONTEXTS, nbd.context_query("", *queries))
            assert ([data[4:] for _, data in names], last) == (found, (nbd.ACK, b""))
        assert client.option(nbd.SET_CONTEXTS, nbd.context_query("other", "base:allocation"))[0][0] == nbd.UNKNOWN
        client.set_contexts("", ("base:", "nothing:here"))
        assert client.contexts == {}
        client.go()
        with pytest.raises(NbdError, match=str(EINVAL)):
            client.status(0, 512)


def test_zeroes_and_trim(image: Path) -> None:
    with Server(image) as server, server.client(contexts=("base:allocation",)) as client:
        client.request(nbd.WRITE_ZEROES, CLUSTER + 100, 1000, flags=nbd.NO_HOLE | nbd.FUA)
        assert client.read(CLUSTER, 1200) == b"\1" * 100 + bytes(1000) + b"\1" * 100
        client.request(nbd.WRITE_ZEROES, CLUSTER, CLUSTER, flags=nbd.FAST_ZERO)
        client.request(nbd.TRIM, 2 * CLUSTER, CLUSTER)
        assert client.read(CLUSTER, 2 * CLUSTER) == bytes(2 * CLUSTER)
        assert client.status(0, SIZE) == {"base:allocation": [(SIZE, HOLE_AND_ZERO)]}
        client.request(nbd.CACHE, 0, SIZE)


def test_zeroing_a_raw_disk_is_not_fast(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(b"x" * SIZE)
    with Server(raw, "-f", "raw") as server, server.client() as client:
        with pytest.raises(NbdError, match=str(ENOTSUP)):
            client.request(nbd.WRITE_ZEROES, 0, CLUSTER, flags=nbd.FAST_ZERO)
        client.request(nbd.WRITE_ZEROES, 0, CLUSTER)
        server.stop()
    assert raw.read_bytes() == bytes(CLUSTER) + b"x" * (SIZE - CLUSTER)


@pytest.mark.parametrize(
    ("command", "offset", "nbytes", "flags", "error"),
    [
        (nbd.READ, SIZE - 1, 2, 0, EINVAL),
        (nbd.READ, 1 << 63, 1, 0, EINVAL),
        (nbd.READ, 0, 33 << 20, 0, EINVAL),
        (nbd.READ, 0, 2 << 20, nbd.DF, EOVERFLOW),
        (nbd.READ, 0, 1, nbd.NO_HOLE, EINVAL),
        (nbd.WRITE, SIZE - 1, 2, 0, ENOSPC),
        (nbd.WRITE, (1 << 64) - 1, 3 << 20, 0, ENOSPC),
        (nbd.WRITE, 0, 2, nbd.REQ_ONE, EINVAL),
        (nbd.WRITE_ZEROES, SIZE, 1, 0, ENOSPC),
        (nbd.TRIM, SIZE, 1, 0, EINVAL),
        (nbd.CACHE, SIZE, 1, 0, EINVAL),
        (nbd.BLOCK_STATUS, SIZE, 1, 0, EINVAL),
        (8, 0, 0, 0, EINVAL),
    ],
)
def test_what_makes_no_sense_is_refused(
    served: Server, command: int, offset: int, nbytes: int, flags: int, error: int
) -> None:
    with served.client(contexts=("base:allocation",)) as client:
        with pytest.raises(NbdError, match=f"^{error}$"):
            client.request(command, offset, nbytes, flags=flags, data=bytes(nbytes if command == nbd.WRITE else 0))
        assert client.read(CLUSTER, 1) == b"\0"


@pytest.mark.parametrize("command", [nbd.WRITE, nbd.TRIM, nbd.WRITE_ZEROES])
def test_a_read_only_export_is_not_written(image: Path, command: int) -> None:
    before = image.read_bytes()
    with Server(image, "-r") as server, server.client() as client:
        assert client.flags & 2
        with pytest.raises(NbdError, match=f"^{EPERM}$"):
            client.request(command, 0, 512, data=bytes(512 if command == nbd.WRITE else 0))
        client.request(nbd.FLUSH)
        server.stop()
    assert image.read_bytes() == before


def test_requests_of_nothing(image: Path) -> None:
    with Server(image) as server, server.client() as client:
        for flags in (0, nbd.DF):  # a chunk of data has some
            assert client.request(nbd.READ, 0, 0, flags=flags).kinds == [0]
        for command in (nbd.WRITE, nbd.WRITE_ZEROES, nbd.TRIM, nbd.CACHE, nbd.FLUSH):
            client.request(command, 0, 0)


def test_an_unreadable_cluster_is_an_error_and_no_end(image: Path) -> None:
    break_mapping(image, cluster=1)
    with Server(image, "-r") as server, server.client() as client:
        for nbytes in (512, CLUSTER):
            with pytest.raises(NbdError, match=f"^{EIO}$"):
                client.read(CLUSTER, nbytes)
        assert client.read(2 * CLUSTER, 512) == b"\1" * 512


def test_an_internal_snapshot(image: Path) -> None:
    qemu_img("snapshot", "-c", "one", image)
    qemu_io(image, "write -P 9 64k 64k")
    with Server(image, "-l", "one") as server, server.client() as client:
        assert client.flags & 2
        assert client.read(CLUSTER, CLUSTER) == b"\1" * CLUSTER


@pytest.mark.parametrize(
    ("image_format", "wanted"),
    [("luks", "key-secret=s,iter-time=10"), ("qcow2", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10")],
)
def test_an_encrypted_disk(tmp_path: Path, image_format: str, wanted: str) -> None:
    """Clients are told to send whole sectors; one that does not is served."""
    path, secret = tmp_path / "disk", ("--object", "secret,id=s,data=abc")
    qcow2_tool_ok("create", *secret, "-f", image_format, "-o", wanted, path, SIZE)
    with Server(path, *secret, "-f", image_format) as server, server.client(waits=True) as client:
        client.greet()
        assert client.option(nbd.STRUCTURED) == [(nbd.ACK, b"")]
        assert struct.unpack(">III", client.go("", 3)[3]) == (512, 4096, 32 << 20)
        client.request(nbd.WRITE_ZEROES, 0, 128 << 10)
        client.write(1000, b"x" * 70_000)
        assert client.read(0, 128 << 10)[999:71_001] == b"\0" + b"x" * 70_000 + b"\0"
        client.request(nbd.FLUSH)
    with qcow2.open(path, key=b"abc", format=image_format) as disk:
        assert disk.read(999, 70_002) == b"\0" + b"x" * 70_000 + b"\0"


class Forgetful(RawImage):
    """It finds no memory to read what lies behind the first MiB."""

    async def read(self, guest_offset: int, target: Buffer) -> None:
        if guest_offset >= 1 << 20:
            raise MemoryError
        await super().read(guest_offset, target)


@pytest.mark.parametrize("is_structured", [False, True])
def test_no_memory_in_the_midst_of_a_reply_is_never_taken_for_data(tmp_path: Path, is_structured: bool) -> None:
    """A simple reply that has begun well has no way to say so: there the connection ends."""
    path, end = tmp_path / "disk", os.eventfd(0)
    path.write_bytes(b"x" * SIZE)
    with HostFile.open(str(path), writable=True) as file, listening_on_path(str(tmp_path / "nbd")) as listener:
        driver = SharedDriver()
        export = Export(Forgetful(file, SIZE, read_only=False), driver, Terms())
        server = threading.Thread(target=NbdServer(export, [listener]).run, args=(end,))
        server.start()
        try:
            with nbd.Client(tmp_path / "nbd", structured=is_structured) as client:
                with pytest.raises(NbdError if is_structured else EOFError):
                    client.read(0, 2 << 20)
                if is_structured:
                    assert client.read(0, 1) == b"x"
        finally:
            os.eventfd_write(end, 1)
            server.join()
            driver.close()
            os.close(end)
