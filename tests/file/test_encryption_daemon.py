"""An encrypted disk, served: the key comes by file or descriptor, and what the guest wrote is nowhere in plain."""

import json
import os
import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

import qcow2
from tests.frontend import IN, OUT, WRITABLE, FrontEnd
from tests.oracle import qemu_img
from tests.program import TIMEOUT, Daemon, complaints, qcow2_tool_ok

KEY = b"correct horse\n"
LUKS = "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10"
PATTERN = b"plaintext of the guest's, and never to be found by anyone else."
SIZE = 8 << 20


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_bytes(KEY)
    return path


@pytest.fixture
def image(tmp_path: Path, key: Path) -> Path:
    """An encrypted overlay of an encrypted base that is full of the pattern's reverse."""
    base, path = tmp_path / "base.qcow2", tmp_path / "disk.qcow2"
    words = ["--object", f"secret,id=s0,file={key}", "-o", LUKS]
    qcow2_tool_ok("create", "-q", *words, base, str(SIZE))
    with qcow2.open(base, key=KEY, writable=True) as disk:
        disk.write(0, (PATTERN[::-1] * (2 << 14))[: 2 << 20])
    qcow2_tool_ok("create", "-q", *words, "-b", base, "-F", "qcow2", path)
    return path


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[Path]:
    """On a file system in memory, where the link log is kept."""
    path = Path(f"/dev/shm/test-encryption-{os.getpid()}")
    path.mkdir()
    yield path
    shutil.rmtree(path)


def holds_pattern(path: Path) -> bool:
    """Whether a sector's worth of the guest's, or of the base's, is there as it is."""
    content = path.read_bytes()
    return PATTERN[8:40] in content or PATTERN[::-1][8:40] in content


def use(front_end: FrontEnd, model: bytearray, seed: int) -> None:
    """Every path there is: fresh clusters, copies of the base, overwrites, zeros, discards."""
    chance = random.Random(seed)
    for _ in range(60):
        offset = chance.randrange(SIZE // 512) * 512
        nbytes = min(chance.choice((512, 4096, 65536, 128 << 10)), SIZE - offset)
        kind = chance.random()
        if kind < 0.7:
            model[offset : offset + nbytes] = data = (PATTERN * (nbytes // len(PATTERN) + 1))[:nbytes]
            front_end.write(offset, data)
        elif kind < 0.8:
            front_end.write_zeroes(offset, nbytes, unmap=kind < 0.75)
            model[offset : offset + nbytes] = bytes(nbytes)
        elif kind < 0.9:
            front_end.flush()
        assert front_end.read(offset, nbytes) == model[offset : offset + nbytes]


@pytest.mark.parametrize("options", [(), ("--cache=none",), ("--cache=writethrough", "--sandbox")])
def test_nothing_the_guest_wrote_is_found_in_plain_anywhere(
    tmp_path: Path, image: Path, key: Path, logs: Path, options: tuple[str, ...]
) -> None:
    model = bytearray((PATTERN[::-1] * (2 << 14))[: 2 << 20]) + bytes(SIZE - (2 << 20))
    with Daemon(image, f"--key-file={key}", f"--link-log={logs}", *options) as daemon:
        assert KEY.strip().decode() not in Path(f"/proc/{daemon.process.pid}/cmdline").read_text()
        with FrontEnd(daemon.socket_path) as front_end:
            use(front_end, model, 1)
            files = [*tmp_path.iterdir(), *(path for path in logs.rglob("*") if path.is_file())]
            plain = [path for path in files if path.is_file() and holds_pattern(path)]
            assert plain == []
            kept = [front_end.submit(OUT, offset, PATTERN[:64] * 8) for offset in range(0, 4 << 20, 256 << 10)]
            assert len(kept) == 16
        daemon.kill()
    assert not any(holds_pattern(path) for path in [*tmp_path.iterdir(), *logs.rglob("*")] if path.is_file())
    with Daemon(image, f"--key-file={key}", f"--link-log={logs}", *options) as daemon:
        with FrontEnd(daemon.socket_path) as front_end:
            found = front_end.read(0, 128 << 10)
            assert found[512:] == model[512 : 128 << 10]
            assert found[:512] in (model[:512], PATTERN[:64] * 8)
        daemon.stop()
    opts = f"driver=qcow2,file.filename={image},encrypt.key-secret=s0,backing.encrypt.key-secret=s0"
    done = qemu_img("check", "--object", f"secret,id=s0,file={key}", "--image-opts", opts, check=False)
    assert done.returncode in (0, 3), done.stdout  # a killed daemon may leak clusters


def test_a_key_comes_by_descriptor_and_is_kept_for_the_next_visit(image: Path, key: Path) -> None:
    descriptor = ["sh", "-c", f'exec "$@" 9<{key}', "sh"]
    with Daemon(image, "--key-fd=9", under=descriptor) as daemon:
        for fill in (b"1", b"2"):
            with FrontEnd(daemon.socket_path) as front_end:
                front_end.write(0, fill * 512)
                assert front_end.read(0, 512) == fill * 512
        daemon.stop()
    with qcow2.open(image, key=KEY) as disk:
        assert disk.read(0, 1024) == b"2" * 512 + (PATTERN[::-1] * 20)[512:1024]


@pytest.mark.parametrize("options", [(), ("--cache=none", "--sandbox")])
def test_a_raw_luks_image_is_served(tmp_path: Path, key: Path, options: tuple[str, ...]) -> None:
    path, model = tmp_path / "disk.luks", bytearray(SIZE)
    words = ["--object", f"secret,id=s0,file={key}", "-o", "key-secret=s0,iter-time=10"]
    qcow2_tool_ok("create", "-q", "-f", "luks", *words, path, str(SIZE))
    with qcow2.open(path, format="luks", key=KEY, writable=True) as disk:
        disk.write_zeroes(0, SIZE)
    with Daemon(path, "--format=luks", f"--key-file={key}", *options) as daemon:
        with FrontEnd(daemon.socket_path) as front_end:
            use(front_end, model, 4)
        daemon.stop()
    with qcow2.open(path, format="luks", key=KEY) as disk:
        assert disk.read(0, SIZE) == model
    assert not holds_pattern(path)


@pytest.mark.parametrize("is_below", [False, True])
def test_a_trace_of_an_encrypted_disk_is_refused(tmp_path: Path, image: Path, key: Path, is_below: bool) -> None:
    if is_below:
        qcow2.create(tmp_path / "plain", backing=image, backing_format="qcow2")
    with Daemon(
        tmp_path / "plain" if is_below else image, f"--key-file={key}", f"--trace-io={tmp_path}/trace"
    ) as daemon:
        _, said = daemon.process.communicate(timeout=TIMEOUT)
    assert daemon.process.returncode == 1
    assert "--trace-io" in said
    assert not (tmp_path / "trace").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="sees who owns the files of a process of another user")
def test_a_daemon_with_a_key_leaves_no_core_dump(tmp_path: Path, image: Path, key: Path) -> None:
    """/proc says whether a process may be dumped: its files are its user's, or root's."""
    for path in (tmp_path, image, tmp_path / "base.qcow2", key, *tmp_path.parents):
        if path.stat().st_uid == 0 and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o077)
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    with Daemon(image, f"--key-file={key}", under=user) as daemon, FrontEnd(daemon.socket_path) as front_end:
        assert front_end.read(4 << 20, 512) == bytes(512)
        assert os.stat(f"/proc/{daemon.process.pid}/environ").st_uid == 0
        daemon.stop()


@pytest.mark.parametrize("options", [(), ("--cache=none",), ("--aio=threads",)])
def test_sectors_in_many_pieces_are_ciphered_as_a_whole(image: Path, key: Path, options: tuple[str, ...]) -> None:
    """Buffers that end anywhere: a sector lies in two, three or a hundred of them; the data plane serves it alone."""
    chance = random.Random(3)
    with Daemon(image, f"--key-file={key}", "--stats", *options) as daemon:
        with FrontEnd(daemon.socket_path) as front_end:
            front_end.write(0, bytes(256 << 10))  # places for what is written over below
            front_end.flush()
            for lengths in (
                [512],
                [1, 511],
                [100, 900, 24, 3072, 7, 505],
                [5] * 100 + [12],
                [300] * 128,
                [70_000, 144],
            ):
                data = chance.randbytes(sum(lengths))
                offset = chance.randrange(100) * 512
                assert pieces(front_end, OUT, offset, lengths, data) == b""
                assert front_end.read(offset, len(data)) == data
                assert pieces(front_end, IN, offset, lengths[::-1]) == data
        daemon.process.terminate()
        told, _ = daemon.process.communicate(timeout=TIMEOUT)
    counters = json.loads(told)
    assert counters["python_requests"] < counters["requests"] // 2
    with qcow2.open(image, key=KEY) as disk:
        assert disk.read(offset, len(data)) == data


def pieces(front_end: FrontEnd, kind: int, offset: int, lengths: list[int], data: bytes = b"") -> bytes:
    """One request whose data lies in buffers of *lengths*, apart from each other; what a read found."""
    queue = front_end.queues[0]
    taken = sorted(queue.free)[: len(lengths) // 3 + 1]
    assert taken == list(range(len(taken)))
    for slot in taken[1:]:
        queue.free.remove(slot)
    queue.free.remove(0)
    chain = [(queue._header_at(0), 16, 0)]
    queue.bytes[queue._header_at(0) : queue._header_at(0) + 16] = struct.pack("<IIQ", kind, 0, offset // 512)
    place, places = queue._data_at(0), []
    for nbytes in lengths:
        places.append((place, nbytes))
        chain.append((place, nbytes, 0 if kind == OUT else WRITABLE))
        place += nbytes + 3
    done = 0
    for place, nbytes in places if kind == OUT else []:
        queue.bytes[place : place + nbytes] = data[done : done + nbytes]
        done += nbytes
    chain.append((queue._status_at(0), 1, WRITABLE))
    queue._publish(0, chain)
    (completion,) = front_end.wait()
    queue.free.extend(taken[1:])
    assert completion.status == 0
    return b"".join(bytes(queue.bytes[place : place + nbytes]) for place, nbytes in places) if kind == IN else b""


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "the image is encrypted, and no key was given"),
        (b"wrong", "the key opens no key slot"),
        (b"", "holds no key"),
        (b"x" * 65537, "holds more than 65536 bytes"),
    ],
)
def test_without_the_right_key_the_daemon_says_so_in_a_line(
    tmp_path: Path, image: Path, content: bytes | None, text: str
) -> None:
    option = []
    if content is not None:
        (tmp_path / "wrong").write_bytes(content)
        option = [f"--key-file={tmp_path}/wrong"]
    with Daemon(image, *option) as daemon:
        _, said = daemon.process.communicate(timeout=TIMEOUT)
    assert daemon.process.returncode == 1
    assert text in said
    assert complaints(said).count("\n") == 1
