"""`qcow2 serve-nbd` before judges that are not ours: QEMU's tools, and libnbd's."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

import qcow2
from tests.nbdclient import Server
from tests.oracle import assert_not_corrupt, qemu_img, qemu_io
from tests.program import TIMEOUT

SIZE = 20 << 20
CLUSTER = 64 << 10
PYTHON = "/usr/bin/python3"  # whose libnbd no virtual environment sees
needs_libnbd = pytest.mark.skipif(shutil.which("nbdcopy") is None, reason="no libnbd-bin here")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An overlay with data, zeros and holes of its own, over a base with data."""
    base, path = tmp_path / "base.qcow2", tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, SIZE // 2)
    qemu_io(base, "write -P 1 1M 3M", "write -c -P 2 5M 64k")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", path, SIZE)
    qemu_io(path, "write -P 3 2M 100k", "write -z 3M 64k", "write -P 4 15M 1M", "write -P 5 20971008 512")
    return path


def run(*command: str | Path) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def content_of(path: Path) -> bytes:
    with qcow2.open(path) as disk:
        return disk.read(0, disk.size)


# -- QEMU


def test_qemu_finds_the_same_disk(image: Path) -> None:
    with Server(image, "-r", "-t") as server:
        assert json.loads(qemu_img("info", "--output=json", server.uri).stdout)["virtual-size"] == SIZE
        qemu_img("compare", "-f", "raw", "-F", "qcow2", server.uri, image)
        for said in json.loads(qemu_img("map", "--output=json", server.uri).stdout):
            start, end = said["start"], said["start"] + said["length"]
            assert said["zero"] == (not any(content_of(image)[start:end]))
        server.stop()


def test_qemu_maps_what_it_maps_itself(image: Path) -> None:
    def stretches(path: str | Path) -> list[tuple[int, int, bool, bool]]:
        said = json.loads(qemu_img("map", "--output=json", path).stdout)
        joined: list[tuple[int, int, bool, bool]] = []
        for each in said:
            here = each["start"], each["length"], each["zero"], each["data"]
            if joined and joined[-1][2:] == here[2:]:
                here = joined[-1][0], joined.pop()[1] + here[1], *here[2:]
            joined.append(here)
        return joined

    with Server(image, "-r") as server:
        found = stretches(server.uri)
        server.end()
    assert found == stretches(image)


@pytest.mark.parametrize("target_format", ["raw", "qcow2"])
def test_qemu_copies_from_and_to(image: Path, tmp_path: Path, target_format: str) -> None:
    copy, back = tmp_path / "copy", tmp_path / "back.qcow2"
    with Server(image, "-r") as server:
        qemu_img("convert", "-O", target_format, server.uri, copy)
        server.end()
    qemu_img("compare", "-f", target_format, "-F", "qcow2", copy, image)
    qcow2.create(back, SIZE)
    with Server(back) as server:
        qemu_img("convert", "-n", "-f", target_format, "-O", "raw", copy, server.uri)
        server.end()
    assert content_of(back) == content_of(image)
    assert_not_corrupt(back)


def test_qemu_writes_and_verifies(image: Path) -> None:
    work = [
        "write -P 7 1000 70000",
        "write -f -P 8 1M 64k",
        "write -z 1M 4k",
        "write -z -u 16M 1M",
        "discard 2M 1M",
        "flush",
    ]
    checks = [
        "read -P 7 1000 70000",
        "read -P 0 1M 4k",
        "read -P 8 1052672 60k",
        "read -P 0 16M 1M",
        "read -P 5 20971008 512",
    ]
    with Server(image) as server:
        commands = [word for each in [*work, *checks] for word in ("-c", each)]
        said = run("qemu-io", "-f", "raw", *commands, server.uri)
        assert "failed" not in said.lower()
        server.end()
    assert_not_corrupt(image)
    qemu_io(image, *checks)


def test_qemu_reads_a_dirty_bitmap(image: Path) -> None:
    qemu_img("bitmap", "--add", image, "b0")
    qemu_io(image, "write -P 9 4M 64k", "write -P 9 9M 1")
    with Server(image, "-r", "-B", "b0") as server:
        options = f"driver=nbd,server.type=unix,server.path={server.path},x-dirty-bitmap=qemu:dirty-bitmap:b0"
        said = json.loads(qemu_img("map", "--output=json", "--image-opts", options).stdout)
        server.end()
    assert [(each["start"], each["length"]) for each in said if not each["data"]] == [
        (4 << 20, CLUSTER),
        (9 << 20, CLUSTER),
    ]


# -- libnbd


@needs_libnbd
def test_nbdinfo_says_what_is_there(image: Path) -> None:
    qemu_img("bitmap", "--add", image, "b0")
    with Server(image, "-r", "-t", "-B", "b0", "-e", "0", "-D", "a disk") as server:
        said = json.loads(run("nbdinfo", "--json", server.uri))["exports"][0]
        assert (said["export-size"], said["description"], said["is_read_only"]) == (SIZE, "a disk", True)
        assert said["contexts"] == ["base:allocation", "qemu:dirty-bitmap:b0"]
        assert said["can_multi_conn"]
        assert run("nbdinfo", "--size", server.uri) == f"{SIZE}\n"
        assert "export-name" in run("nbdinfo", "--list", "--json", server.uri)
        server.stop()


@needs_libnbd
def test_nbdinfo_maps_what_qemu_maps(image: Path) -> None:
    with Server(image, "-r") as server:
        ours = json.loads(run("nbdinfo", "--map", "--json", server.uri))
        server.end()
    for each in ours:
        start, end = each["offset"], each["offset"] + each["length"]
        assert (each["type"] == 3) == (not any(content_of(image)[start:end]))
    assert sum(each["length"] for each in ours) == SIZE


@needs_libnbd
@pytest.mark.parametrize("options", [(), ("--request-size=4194304", "--requests=3"), ("--synchronous",)], ids=" ".join)
def test_nbdcopy_both_ways(image: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    copy, back = tmp_path / "copy", tmp_path / "back.qcow2"
    copy.write_bytes(b"")
    with Server(image, "-r", "-e", "0") as server:
        run("nbdcopy", *options, server.uri, copy)
        server.end()
    assert copy.read_bytes() == content_of(image)
    qcow2.create(back, SIZE)
    with Server(back, "-e", "0") as server:
        run("nbdcopy", "--flush", *options, copy, server.uri)
        server.end()
    assert content_of(back) == content_of(image)
    assert_not_corrupt(back)


@needs_libnbd
def test_nbdinfo_tells_which_file_has_what(image: Path) -> None:
    with Server(image, "-r", "-A") as server:
        said = json.loads(run("nbdinfo", "--map=qemu:allocation-depth", "--json", server.uri))
        server.end()
    depths = {each["offset"]: each["type"] for each in said}
    wanted = {0: 0, 1 << 20: 2, 2 << 20: 1, (2 << 20) + 2 * CLUSTER: 2, 3 << 20: 1, (3 << 20) + CLUSTER: 2, 4 << 20: 0}
    assert depths == {**wanted, 5 << 20: 2, (5 << 20) + CLUSTER: 0, 15 << 20: 1, 16 << 20: 0, SIZE - CLUSTER: 1}


def has_libnbd() -> bool:
    return subprocess.run([PYTHON, "-c", "import nbd; nbd.NBD"], capture_output=True).returncode == 0


@pytest.mark.skipif(not has_libnbd(), reason="no libnbd for /usr/bin/python3 here")
def test_libnbd_and_its_strict_checks(image: Path) -> None:
    """What a backup program in Python does: one connection, everything that the export says it can."""
    before = content_of(image)
    with Server(image, "-A") as server:
        said = json.loads(run(PYTHON, "-c", LIBNBD, server.uri))
        server.end()
    after = content_of(image)
    assert said["can"] == [True] * 8
    assert said["sizes"] == [1, 4096, 32 << 20]
    assert bytes.fromhex(said["read"]) == before[2 << 20 :][:200]
    assert said["flags"] == [[CLUSTER, 0], [(2 << 20) - CLUSTER, 3]]
    assert said["depth"] == [[CLUSTER, 1], [(2 << 20) - CLUSTER, 0]]
    assert after[7 << 20 :][:200] == b"x" * 100 + bytes(100)
    assert after[15 << 20 :][: 1 << 20] == bytes(1 << 20)


LIBNBD = """
import json, sys, nbd
h = nbd.NBD()
h.add_meta_context("base:allocation")
h.add_meta_context("qemu:allocation-depth")
h.connect_uri(sys.argv[1])
found = {"can": [h.can_flush(), h.can_fua(), h.can_trim(), h.can_zero(), h.can_fast_zero(), h.can_df(), h.can_cache(),
                 h.get_structured_replies_negotiated()]}
found["sizes"] = [h.get_block_size(n) for n in (nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED, nbd.SIZE_MAXIMUM)]
chunks = bytearray(200)
def take(data, offset, status, error):
    chunks[offset - (2 << 20):offset - (2 << 20) + len(data)] = data
h.pread_structured(200, 2 << 20, take, nbd.CMD_FLAG_DF)
found["read"] = bytes(chunks).hex()
h.pwrite(b"x" * 100, 7 << 20, nbd.CMD_FLAG_FUA)
h.zero(1 << 20, 15 << 20, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE)
h.trim(1 << 20, 16 << 20, nbd.CMD_FLAG_FUA)
h.cache(1 << 20, 0, 0)
h.flush()
told = {}
def tell(context, offset, entries, error):
    told[context] = [[length, flags] for length, flags in zip(entries[::2], entries[1::2])]
h.block_status(2 << 20, 7 << 20, tell)
found["flags"], found["depth"] = told["base:allocation"], told["qemu:allocation-depth"]
h.shutdown()
print(json.dumps(found))
"""
