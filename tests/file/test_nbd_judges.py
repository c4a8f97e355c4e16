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
