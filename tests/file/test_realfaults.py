"""Law 7 on the real thing: a system call of the daemon on its image fails; `make realfaults` lets each of them fail.

A failure names setting and fault; `python -m tests.realfault --kind ... --phase ... --option ...` is where to look.
"""

import errno
import random
from pathlib import Path

import pytest

from qcow2.format.layout import ENTRY_SIZE, HEADER_L1, HEADER_L1_OFFSET
from qcow2.plane.entry import l1_table, words_of
from tests.frontend import FLUSH, IOERR, OK, OUT, FrontEnd
from tests.kill.images import KINDS
from tests.program import TIMEOUT, Daemon, qcow2_tool_ok
from tests.realfault.campaign import calls_of, faults, settings
from tests.realfault.host import WRITE, Fault, Host
from tests.realfault.trial import live

LIVES = 2
CLUSTER = 65536


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", KINDS)
def test_a_host_that_fails_is_answered_honestly(tmp_path: Path, kind: str) -> None:
    draw = random.Random(f"1 {kind}")
    setting = draw.choice([s for s in settings(tmp_path, 1) if s.kind == kind and s.phase == "work"])
    calls = calls_of(setting, tmp_path)
    assert len(calls) > 20
    for _ in range(LIVES):
        live(setting, draw.choice(list(faults(calls, draw.randint(1, len(calls))))), tmp_path)


def entry_of(image: Path, cluster: int) -> range:
    """Where the L2 entry of one of the first guest clusters lies."""
    content = image.read_bytes()
    _, l1_offset = HEADER_L1.unpack_from(content, HEADER_L1_OFFSET)
    at = l1_table(words_of(content[l1_offset : l1_offset + ENTRY_SIZE])[0]) + cluster * ENTRY_SIZE
    return range(at, at + ENTRY_SIZE)


@pytest.mark.parametrize("backing", [True, False], ids=["mark", "entry"])
def test_a_name_that_the_data_plane_cannot_write_is_the_last(tmp_path: Path, backing: bool) -> None:
    """The log's mark in the header, for a link that waits, or else the L2 entry: written right after the data."""
    image, base = tmp_path / "disk", tmp_path / "base"
    base.write_bytes(b"b" * 32 * CLUSTER)
    qcow2_tool_ok("create", *(("-b", base, "-F", "raw") if backing else ()), image, str(32 * CLUSTER))
    host = Host(image, Fault(), tmp_path / "told")
    with Daemon(image, under=host.under) as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            host.arm()
            cluster = 0
            while host.seen[-6:] != [WRITE] * 6:  # of three requests: the data plane needs nobody
                guest.write(cluster * CLUSTER, b"x" * 512)
                cluster += 1
            host.aim_at(range(512) if backing else entry_of(image, cluster))  # a reservation may come between
            assert guest.do(OUT, cluster * CLUSTER, b"x" * 512).status == IOERR
            assert host.hit == WRITE
            host.arm(False)
            assert guest.do(FLUSH).status == IOERR
        daemon.process.terminate()
        _, said = daemon.process.communicate(timeout=TIMEOUT)
    assert daemon.process.returncode == 1
    assert "a write of metadata failed, no more writes" in said


def test_an_entry_that_a_commit_could_not_write_is_the_last(tmp_path: Path) -> None:
    """Many are written in one go; the one that fails is not tried again, as if it had not."""
    image, base = tmp_path / "disk", tmp_path / "base"
    base.write_bytes(b"b" * 64 * CLUSTER)
    qcow2_tool_ok("create", "-b", base, "-F", "raw", image)
    host = Host(image, Fault(), tmp_path / "told")
    with Daemon(image, under=host.under) as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            for cluster in range(0, 32, 2):
                guest.write(cluster * CLUSTER, b"x" * 512)
            host.arm()
            assert guest.do(FLUSH).status == OK
            first = host.seen.index(WRITE)
            host.arm(False)
            for cluster in range(32, 64, 2):
                guest.write(cluster * CLUSTER, b"x" * 512)
            host.arm()
            host.aim(first + 3)
            assert guest.do(FLUSH).status == IOERR
            assert host.hit == WRITE
            host.arm(False)
            assert guest.do(FLUSH).status == IOERR
        daemon.process.terminate()
        daemon.process.communicate(timeout=TIMEOUT)
    assert daemon.process.returncode == 1


def test_a_place_that_cannot_be_filled_is_not_tried_for_ever(tmp_path: Path) -> None:
    """Two fresh places in one cluster: the second waits for the first, which the host refuses for good."""
    image, base, part = tmp_path / "disk", tmp_path / "base", 8192
    base.write_bytes(b"b" * 64 * 32 * part)
    qcow2_tool_ok("create", "-b", base, "-F", "raw", "-o", "extended_l2=on,cluster_size=256K", image)
    host = Host(image, Fault(errno.ENOSPC, 1, for_good=True), tmp_path / "told")
    with Daemon(image, under=host.under) as daemon, FrontEnd(daemon.socket_path) as guest:
        for cluster in range(1, 8):
            guest.write(cluster * 32 * part, b"x" * part)
        guest.write(10 * part, b"x" * part)
        host.arm()
        assert guest.do(OUT, 0, b"y" * 16 * part).status == IOERR
        host.arm(False)
        guest.write(0, b"z" * 16 * part)
        guest.flush()
        assert guest.read(0, 16 * part) == b"z" * 16 * part
