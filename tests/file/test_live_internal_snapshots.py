"""Internal snapshots of a disk that is in use: what they hold, also after a kill, and what is refused."""

import errno
import json
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

import qcow2
from tests.bitmapreader import bitmaps_of
from tests.ctl import ctl, told
from tests.frontend import FLUSH, OK, FrontEnd
from tests.load import Load
from tests.oracle import assert_clean, assert_not_corrupt, peers, qemu_img
from tests.program import DAEMON, Daemon, qcow2_tool_ok
from tests.realfault.host import WRITE, Fault, Host
from vhost.client import Control, ControlError

MIB = 1 << 20
SIZE = 8 * MIB
BLOCK = 4096
CALLS = 48  # more than a snapshot takes of the host


def start(image: Path, *options: str) -> Daemon:
    return Daemon(image, f"--control={image}.control", f"--link-log={image.parent}", *options)


def content(image: Path, snapshot: str | None = None) -> bytes:
    with qcow2.open(image, snapshot=snapshot) as disk:
        return disk.read(0, disk.size)


KINDS = {
    "lazy, over a base": ["lazy_refcounts=on"],
    "accurate, small clusters": ["cluster_size=4k"],
    "subclusters": ["extended_l2=on,cluster_size=128k"],
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", KINDS)
def test_snapshots_hold_what_the_disk_held_also_after_a_kill(tmp_path: Path, kind: str) -> None:
    image, base = tmp_path / "disk", b"old!" * (SIZE // 4)
    (tmp_path / "base").write_bytes(base)
    qcow2_tool_ok("create", "-b", tmp_path / "base", "-F", "raw", "-o", *KINDS[kind], image, str(SIZE))
    qcow2_tool_ok("bitmap", "--add", image, "all")
    moments: dict[str, bytes] = {}
    load = None
    for name, ends_by_kill in (("one", True), ("two", False)):
        with start(image) as daemon, FrontEnd(daemon.socket_path) as guest:
            if load is None:
                load = Load(guest, SIZE // BLOCK, zeroes=True, base=base)
            load.guest = guest
            load.run(100)
            load.drain()
            made = json.loads(told(image, "snapshot-internal", "create", name, "--json"))
            assert made["name"] == name
            moments[name] = load.expected()
            load.run(100)
            load.drain()
            if name == "two":
                told(image, "snapshot-internal", "delete", "one")
                del moments["one"]
            assert [each["name"] for each in json.loads(told(image, "snapshot-internal", "list", "--json"))] == [
                *moments
            ]
            if ends_by_kill:
                daemon.kill()
            else:
                load.run(100)
                load.drain()
                daemon.stop()
        if ends_by_kill:
            qcow2.open(image, writable=True, log_directory=str(tmp_path)).close()
        assert_not_corrupt(image)
        assert content(image) == load.expected()
        for each, held in moments.items():
            assert content(image, each) == held
    recorded = bitmaps_of(image)["all"]
    assert recorded.dirty == {block * BLOCK // recorded.granularity for block in load.held}
    for program in peers():
        info = json.loads(qemu_img("info", "--output=json", image, program=program).stdout)
        assert [each["name"] for each in info["snapshots"]] == [*moments]
        assert qemu_img("check", image, program=program, check=False).returncode in (0, 3), "a kill may leak"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    qcow2_tool_ok("create", path, str(SIZE))
    return path


def test_the_load_goes_on_beside_it(image: Path) -> None:
    with start(image) as daemon, FrontEnd(daemon.socket_path, queues=2) as guest:
        load = Load(guest, SIZE // BLOCK, base=bytes(SIZE))
        load.run(100)
        for index in range(4):
            with subprocess.Popen(
                [DAEMON, "ctl", f"--control={image}.control", "snapshot-internal", "create", f"s{index}"],
                stdout=subprocess.DEVNULL,
            ) as taker:
                while taker.poll() is None:
                    load.run(20)
            assert taker.returncode == 0
        load.drain()
        daemon.stop()
    assert content(image) == load.expected()
    assert_clean(image)


def test_what_is_refused(image: Path, tmp_path: Path) -> None:
    with start(image) as daemon, FrontEnd(daemon.socket_path) as guest:
        guest.write(0, b"x" * BLOCK)
        told(image, "snapshot-internal", "create", "s")
        for arguments, text in (
            (("create", "s"), "there is a snapshot 's'"),
            (("create", ""), "snapshot name of 0 bytes"),
            (("delete", "t"), "snapshot 't' not found"),
            (("apply", "t"), "snapshot 't' not found"),
            (("apply", "s"), "a front-end uses the disk"),
        ):
            done = ctl(image, "snapshot-internal", *arguments)
            assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
            assert text in done.stderr
        assert told(image, "snapshot-internal", "list").startswith("1: s, 20")
        told(image, "snapshot-internal", "delete", "s")
        assert told(image, "snapshot-internal", "list") == ""


def test_going_back_while_no_guest_is_there(image: Path) -> None:
    with start(image) as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            guest.write(0, b"a" * BLOCK)
            told(image, "snapshot-internal", "create", "before")
            told(image, "resize", "16M")
            guest.write(0, b"b" * BLOCK)
            guest.write(SIZE, b"c" * BLOCK)
        while (done := ctl(image, "snapshot-internal", "apply", "before")).returncode:
            assert "a front-end uses the disk" in done.stderr  # its end has not come through
        assert json.loads(told(image, "status"))["size"] == SIZE
        with FrontEnd(daemon.socket_path) as guest:
            assert guest.size == SIZE
            assert guest.read(0, BLOCK) == b"a" * BLOCK
        daemon.stop()
    assert_clean(image)


@pytest.mark.parametrize("for_good", [False, True])
@pytest.mark.parametrize("options", ["refcount_bits=2", "refcount_bits=2,lazy_refcounts=on"])
def test_a_snapshot_that_finds_no_room_changes_nothing(tmp_path: Path, options: str, for_good: bool) -> None:
    """Whichever write fails: no count stays raised, which would end at the limit of refcounts of 2 bits."""
    image = tmp_path / "disk"
    qcow2_tool_ok("create", "-o", options, image, str(SIZE))
    host = Host(image, Fault(errno.ENOSPC, for_good=for_good), tmp_path / "told")
    daemon = Daemon(image, f"--control={image}.control", "--aio=threads", f"--link-log={tmp_path}", under=host.under)
    with daemon, FrontEnd(daemon.socket_path) as guest, Control(f"{image}.control") as client:
        load = Load(guest, SIZE // BLOCK)
        load.run(100)
        load.drain()
        assert guest.do(FLUSH).status == OK
        hits = []
        for at in range(CALLS):
            host.aim(at)
            host.arm()
            with suppress(ControlError):
                client.internal_snapshots.create(f"of {at}")
            host.arm(False)
            hits.append(host.hit)
            for made in client.internal_snapshots:
                client.internal_snapshots.delete(made["name"])
        assert hits.count(WRITE) > 4
        assert host.hit == 0  # what is behind the last call has been tried
        load.run(100)
        load.drain()
        daemon.stop()
    qcow2.open(image, writable=True).close()  # what could not be taken back is repaired
    assert_clean(image)
    assert content(image) == load.expected()
