"""A snapshot whose links below find no room: FLUSH fails, and the next one tries again; a host that breaks is final."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import qcow2
from tests.frontend import FLUSH, IOERR, OK, OUT, FrontEnd
from tests.load import Load
from tests.oracle import assert_clean
from tests.program import Daemon, qcow2_tool_ok
from tests.realfault.host import WRITE, Fault, Host
from vhost.client import Control, ControlError

SIZE = 16 << 20
BLOCK = 4096


class Bench:
    """A daemon whose disk has just become an overlay, and no link of what is below could be brought in."""

    def __init__(self, image: Path, daemon: Daemon, guest: FrontEnd, host: Host) -> None:
        self.image, self.frozen = image, image.with_name("frozen")
        self.daemon, self.guest, self.host = daemon, guest, host
        self.load = Load(guest, SIZE // BLOCK, base=b"\1" * SIZE)
        with Control(f"{image}.control") as client:
            client.ask("snapshot-begin", name="frozen")
            self.load.run(100)
            self.load.drain()  # whose links wait
            client.ask("snapshot-next")
            host.aim(1)  # after the sync that comes first
            host.arm()
            client.ask("snapshot-next")
            with pytest.raises(ControlError, match="may not survive a power loss"):
                client.ask("snapshot-next")
        assert host.hit == WRITE
        self.held = self.load.expected()

    def ask(self, command: str, **arguments: str) -> object:
        with Control(f"{self.image}.control") as client:
            return client.ask(command, **arguments)

    def flush(self) -> int:
        return self.guest.do(FLUSH).status


@contextmanager
def bench(tmp_path: Path, code: int, *options: str) -> Iterator[Bench]:
    image, base = tmp_path / "disk.qcow2", tmp_path / "base"
    base.write_bytes(b"\1" * SIZE)  # or no link would wait
    qcow2_tool_ok("create", "-b", base, "-F", "raw", "-o", "lazy_refcounts=on", image, str(SIZE))
    host = Host(image, Fault(code, for_good=True), tmp_path / "told")
    with (
        Daemon(image, f"--control={image}.control", *options, under=host.under) as daemon,
        FrontEnd(daemon.socket_path) as guest,
    ):
        yield Bench(image, daemon, guest, host)


def content(path: Path) -> bytes:
    with qcow2.open(path) as disk:
        return disk.read(0, disk.size)


def assert_held(here: Bench) -> None:
    """Nothing was lost, in what is frozen or since."""
    assert_clean(here.frozen)
    assert_clean(here.image)
    assert content(here.frozen) == here.held
    assert content(here.image) == here.load.expected()


@pytest.mark.parametrize("option", ["--cache=writeback", "--aio=threads"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_flush_that_finds_no_room_below_is_tried_again(tmp_path: Path, code: int, option: str) -> None:
    with bench(tmp_path, code, option) as here:
        here.load.run(50)
        here.load.drain()
        assert [here.flush(), here.flush()] == [IOERR, IOERR]
        here.host.arm(False)
        assert [here.flush(), here.flush()] == [OK, OK]
        assert content(here.frozen) == here.held  # others may read it
        assert here.ask("snapshot", name="again") == {"snapshot": "again"}
        here.load.run(50)
        here.load.drain()
        here.daemon.stop()
    assert_held(here)


def test_broken_host_is_final(tmp_path: Path) -> None:
    with bench(tmp_path, errno.EIO) as here:
        here.host.arm(False)
        assert [here.flush(), here.flush()] == [IOERR, IOERR]
        assert here.guest.do(OUT, 0, b"a" * BLOCK).status == IOERR
        assert here.guest.read(0, BLOCK) == here.held[:BLOCK]


def test_daemon_that_ends_brings_in_what_waits_below(tmp_path: Path) -> None:
    with bench(tmp_path, errno.ENOSPC) as here:
        here.load.run(50)
        here.load.drain()
        here.host.arm(False)
        here.daemon.stop()
    assert_held(here)


def test_daemon_killed_without_room_loses_nothing(tmp_path: Path) -> None:
    with bench(tmp_path, errno.ENOSPC) as here:
        here.load.run(50)
        here.load.drain()
        assert here.flush() == IOERR
        here.daemon.kill()
    with Daemon(here.image) as daemon, FrontEnd(daemon.socket_path) as guest:
        assert guest.do(FLUSH).status == OK
        daemon.stop()
    assert content(here.frozen) == here.held  # whose refcounts nobody has counted anew
    assert content(here.image) == here.load.expected()


def test_nothing_else_is_done_to_the_chain_before(tmp_path: Path) -> None:
    with bench(tmp_path, errno.ENOSPC) as here:
        for command, arguments in (("snapshot", {"name": "again"}), ("stream", {}), ("commit", {})):
            with pytest.raises(ControlError, match=r"stable|No space"):
                here.ask(command, **arguments)
        here.host.arm(False)
        assert here.ask("snapshot", name="again") == {"snapshot": "again"}
        here.daemon.stop()
    assert_held(here)
