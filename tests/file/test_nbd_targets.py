"""NBD exports as targets of backups and mirrors: what a good server gets, and what a bad one costs."""

import errno
import json
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import pytest

import qcow2
from qcow2.driver import operation as op
from qcow2.driver.file import perform
from tests.file.test_backup import BLOCK, KIB, MIB, SIZE, dirty, make, read, written_while
from tests.file.test_jobs import control, ctl, start
from tests.file.test_mirror import get_ready, until
from tests.file.test_nbd import CLUSTER, break_mapping
from tests.frontend import FrontEnd
from tests.libnbd import binding, needs_binding
from tests.load import Load
from tests.nbdclient import FLUSH, Server
from tests.nbdfake import ALL, HAS_FLAGS, READ_ONLY, SEND_FLUSH, FakeServer
from tests.oracle import assert_not_corrupt, assert_same_bytes
from tests.patience import TIMEOUT
from tests.program import SERIAL, TOOL, qcow2_tool, qcow2_tool_ok
from vhost import ControlError

if TYPE_CHECKING:
    from qcow2.driver.nbdconnection import Completion

__all__ = ["binding"]  # a fixture
pytestmark = [needs_binding, pytest.mark.usefixtures("binding")]


@contextmanager
def qemu_nbd(image: Path, image_format: str) -> Iterator[str]:
    """QEMU's server of *image*, for one client; gone when that has left. -> its URI."""
    socket, pid_file = (image.with_name(f"{next(SERIAL)}.{ending}") for ending in ("qemu", "pid"))
    command = ["qemu-nbd", "--fork", "-k", socket, "-f", image_format, "--pid-file", pid_file, image]
    subprocess.run([*map(str, command)], check=True, timeout=TIMEOUT)
    yield f"nbd+unix:///?socket={socket}"
    subprocess.run(["tail", f"--pid={pid_file.read_text().strip()}", "-f", "/dev/null"], check=True, timeout=TIMEOUT)


@contextmanager
def served(directory: Path, server: str) -> Iterator[tuple[str, Path]]:
    """An export with something in it already, of this *server* -> its URI, and the file that is served."""
    image_format = "raw" if server == "qemu-nbd raw" else "qcow2"
    image = directory / "export"
    qcow2.create(image, SIZE, format=image_format)
    with qcow2.open(image, "r+", format=image_format) as disk:
        disk.write(0, b"o" * SIZE)
    if server == "ours":
        with Server(image) as ours:
            yield ours.uri, image
            ours.end()
    else:
        with qemu_nbd(image, image_format) as uri:
            yield uri, image


SERVERS = ("ours", "qemu-nbd raw", "qemu-nbd qcow2")


@pytest.mark.sample(3)
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("kind", ["backup", "mirror"])
def test_the_export_is_the_disk(tmp_path: Path, server: str, kind: str) -> None:
    image, held = make(tmp_path, "overlay")
    with served(tmp_path, server) as (uri, target), start(image) as daemon:
        with FrontEnd(daemon.socket_path) as guest, control(image) as client:
            load = Load(guest, SIZE // BLOCK, zeroes=True, base=held)
            load.run(60)
            if kind == "backup":
                load.drain()
                moment = load.expected()
                job = client.backup(uri, existing=True, rate=4 * MIB).job
                load.run(100)
                client.set_rate(job, 0)
                written_while(load, client, job)
            else:
                job = client.mirror(uri, existing=True).job
                get_ready(client, job, load)
                load.run(100)
                load.drain()
                moment = load.expected()
                with pytest.raises(ControlError, match="not served from an export: the copy can be left only"):
                    client.complete(job)
                client.cancel(job)
                ended = client.wait(job)
                assert (ended.state, ended.error) == ("cancelled", "")
            load.run(20)
            load.drain()
            daemon.stop()
    assert_same_bytes(read(target, "raw" if server == "qemu-nbd raw" else "qcow2"), moment)
    assert_same_bytes(read(image), load.expected())


def test_info_tells_of_an_image_in_an_export(tmp_path: Path) -> None:
    qcow2.create(tmp_path / "disk", MIB)
    with qemu_nbd(tmp_path / "disk", "raw") as uri:
        done = qcow2_tool("info", "-f", "qcow2", uri)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"virtual size: 1 MiB ({MIB} bytes)\n" in done.stdout


def test_zeros_at_the_end_of_the_disk_are_in_the_export_too(tmp_path: Path) -> None:
    qcow2.create(tmp_path / "disk", 1 << 30)  # four stretches of zeros
    with FakeServer(tmp_path / "server", 1 << 30) as server, start(tmp_path / "disk") as daemon:
        with FrontEnd(daemon.socket_path), control(tmp_path / "disk") as client:
            assert client.wait(client.backup(server.uri, existing=True).job).state == "completed"
        daemon.stop()
        assert server.content.count(0) == 1 << 30


def test_what_a_bitmap_says_goes_over_what_is_there(tmp_path: Path) -> None:
    image, _ = make(tmp_path, "plain")
    shutil.copy(image, tmp_path / "full")
    qcow2_tool_ok("create", "-b", "full", "-F", "qcow2", tmp_path / "night")
    with start(image) as daemon, FrontEnd(daemon.socket_path) as guest, control(image) as client:
        guest.write(0, b"w" * BLOCK)
        guest.write(3 * MIB, b"w" * BLOCK)
        guest.discard(2 * MIB, 64 * KIB)
        with Server(tmp_path / "night") as server:
            ended = client.wait(client.backup(server.uri, existing=True, bitmap="nightly").job)
            assert (ended.state, ended.total) == ("completed", 192 * KIB)
            server.end()
        daemon.stop()
    assert dirty(image, "nightly") == []
    assert_same_bytes(read(tmp_path / "night"), read(image))
    with qcow2.open(tmp_path / "night") as disk:
        assert sum(extent.nbytes for extent in disk.extents(0, disk.size) if extent.depth == 0) == 192 * KIB


def test_daemon_refuses_by_name_what_it_cannot_do(tmp_path: Path) -> None:
    image, _ = make(tmp_path, "plain")
    uri = f"nbd+unix:///?socket={tmp_path}/nobody"
    with start(image) as daemon, FrontEnd(daemon.socket_path), control(image) as client:
        for options, why in (
            ({}, "an export is there already"),
            ({"existing": True, "format": "qcow2"}, "an export is a raw disk"),
            ({"existing": True, "bitmap": "nightly", "backing": "full"}, "an export is a raw disk"),
        ):
            with pytest.raises(ControlError, match=why):
                client.backup(uri, **options)
        for options, why in (
            ({}, "an export is there already"),
            ({"existing": True, "image_format": "qcow2"}, "an export is a raw disk"),
            ({"existing": True, "top": True}, "has a top|has no top"),
        ):
            with pytest.raises(ControlError, match=why):
                client.mirror(uri, **options)
        for begin in (client.backup, client.mirror):
            ended = client.wait(begin(uri, existing=True).job)
            assert (ended.state, "No such file" in ended.error, uri in ended.error) == ("failed", True, True), ended
        daemon.stop()


@pytest.mark.parametrize("kind", ["backup", "mirror"])
def test_servers_that_are_no_target(tmp_path: Path, kind: str) -> None:
    image, _ = make(tmp_path, "plain")
    with start(image) as daemon, FrontEnd(daemon.socket_path) as guest, control(image) as client:
        for size, flags, why in (
            (SIZE, ALL | READ_ONLY, "the export is read-only"),
            (SIZE, HAS_FLAGS, "offers no FLUSH"),
            (SIZE - BLOCK, ALL, f"{SIZE - BLOCK} bytes"),
        ):
            with FakeServer(tmp_path / "server", size, flags=flags) as server:
                ended = client.wait(getattr(client, kind)(server.uri, existing=True).job)
                assert (ended.state, why in ended.error) == ("failed", True), ended
                assert server.content == b"o" * size
        guest.write(0, b"w" * BLOCK)
        daemon.stop()
    assert read(image)[:BLOCK] == b"w" * BLOCK


def test_server_that_cannot_zero_gets_zeros(tmp_path: Path) -> None:
    image, held = make(tmp_path, "plain")
    with FakeServer(tmp_path / "server", SIZE, flags=HAS_FLAGS | SEND_FLUSH) as server, start(image) as daemon:
        with FrontEnd(daemon.socket_path), control(image) as client:
            assert client.wait(client.backup(server.uri, existing=True).job).state == "completed"
        daemon.stop()
        assert_same_bytes(bytes(server.content), held)
        assert server.commands[-1] == FLUSH


def test_sandbox_connects_to_nobody(tmp_path: Path) -> None:
    image, _ = make(tmp_path, "plain")
    with start(image, "--sandbox") as daemon, FrontEnd(daemon.socket_path), control(image) as client:
        for begin in (client.backup, client.mirror):
            with pytest.raises(ControlError, match="a daemon with --sandbox connects to nobody"):
                begin("nbd://localhost", existing=True)
        daemon.stop()


def test_without_libnbd_what_to_install_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH")
    image, _ = make(tmp_path, "plain")
    with start(image) as daemon, FrontEnd(daemon.socket_path):
        said = ctl(image, "backup", "--existing", "nbd://localhost")
        daemon.stop()
    assert (said.returncode, said.stderr.count("\n"), "python3-libnbd" in said.stderr) == (1, 1, True), said.stderr
    said = qcow2_tool("info", "nbd://localhost")
    assert (said.returncode, said.stderr.count("\n"), "python3-libnbd" in said.stderr) == (1, 1, True), said.stderr


# -- servers that hang, or die


@pytest.mark.sample(2)
@pytest.mark.parametrize("nanswered", [0, 2, 9])
@pytest.mark.parametrize("kind", ["backup", "mirror"])
def test_server_that_hangs_keeps_nobody_who_cancels(tmp_path: Path, kind: str, nanswered: int) -> None:
    image, held = make(tmp_path, "plain")
    with FakeServer(tmp_path / "server", SIZE, nanswered=nanswered) as server, start(image) as daemon:
        with FrontEnd(daemon.socket_path) as guest, control(image) as client:
            load = Load(guest, SIZE // BLOCK, base=held)
            job = getattr(client, kind)(server.uri, existing=True).job
            server.wait_for_one()
            if kind == "backup":
                load.run(100)  # which waits for no server
                assert not client.job(job).has_ended
            client.cancel(job)
            ended = client.wait(job)
            assert (ended.state, ended.error) == ("cancelled", "")
            load.run(100)
            load.drain()
            daemon.stop()
    assert_same_bytes(read(image), load.expected())


@pytest.mark.parametrize(
    "words",
    [("convert", "-f", "raw"), ("compare", "-f", "raw", "-F", "raw"), ("dd", "-f", "raw")],
    ids=lambda words: words[0],
)
def test_server_that_hangs_keeps_no_tool_that_is_told_to_end(tmp_path: Path, words: tuple[str, ...]) -> None:
    target = tmp_path / "target"
    if words[0] == "compare":
        target.write_bytes(bytes(SIZE))
    with FakeServer(tmp_path / "server", SIZE, nanswered=0) as server:
        names = [f"if={server.uri}", f"of={target}"] if words[0] == "dd" else [server.uri, str(target)]
        with subprocess.Popen([TOOL, *words, *names], stderr=subprocess.PIPE, text=True) as process:
            server.wait_for_one()
            process.terminate()
            _, said = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, said) == (-signal.SIGTERM, "")
    assert target.exists() is (words[0] == "compare")


@pytest.mark.parametrize("kind", ["backup", "mirror"])
def test_daemon_ends_beside_a_server_that_hangs(tmp_path: Path, kind: str) -> None:
    image, held = make(tmp_path, "plain")
    with FakeServer(tmp_path / "server", SIZE, nanswered=5) as server, start(image) as daemon:
        with FrontEnd(daemon.socket_path), control(image) as client:
            getattr(client, kind)(server.uri, existing=True)
            server.wait_for_one()
            daemon.stop()
    assert_same_bytes(read(image), held)


def test_cancel_at_the_last_flush_is_a_cancel(tmp_path: Path) -> None:
    image, _ = make(tmp_path, "plain")
    with start(image) as daemon, FrontEnd(daemon.socket_path), control(image) as client:
        with FakeServer(tmp_path / "server", SIZE) as server:
            assert client.wait(client.backup(server.uri, existing=True).job).state == "completed"
            last = len(server.commands) - 1
        with FakeServer(tmp_path / "again", SIZE, nanswered=last) as server:
            job = client.backup(server.uri, existing=True, bitmap=None).job
            server.wait_for_one()
            client.cancel(job)
            ended = client.wait(job)
            assert (ended.state, ended.error) == ("cancelled", "")
            assert server.commands.count(FLUSH) == 2  # of three: the first bytes are not stable
        daemon.stop()


@pytest.mark.parametrize("on_error", ["report", "stop"])
def test_server_that_dies_ends_a_backup(tmp_path: Path, on_error: str) -> None:
    image, _ = make(tmp_path, "plain")
    with qcow2.open(image, "r+") as disk:
        disk.write(0, b"w" * MIB)
    before = dirty(image, "nightly")
    with FakeServer(tmp_path / "server", SIZE, nanswered=2) as server, start(image) as daemon:
        with FrontEnd(daemon.socket_path) as guest, control(image) as client:
            job = client.backup(server.uri, existing=True, bitmap="nightly", on_error=on_error).job
            server.wait_for_one()
            server.hang_up()
            if on_error == "stop":
                until(client, job, "paused")
                assert "closed the connection" in client.job(job).error
                client.resume(job)
            ended = client.wait(job)
            why = "the connection is lost, and what" if on_error == "stop" else "closed the connection"
            assert (ended.state, why in ended.error) == ("failed", True), ended
            guest.read(0, BLOCK)
            daemon.stop()
    assert dirty(image, "nightly") == before != []


@pytest.mark.parametrize("kind", ["backup", "mirror"])
def test_server_that_comes_later_is_found_when_it_is_told_to_go_on(tmp_path: Path, kind: str) -> None:
    image, held = make(tmp_path, "plain")
    with start(image) as daemon, FrontEnd(daemon.socket_path) as guest, control(image) as client:
        uri = f"nbd+unix:///?socket={tmp_path}/server"
        job = getattr(client, kind)(uri, existing=True, on_error="stop").job
        until(client, job, "paused")
        guest.write(0, b"w" * BLOCK)
        with FakeServer(tmp_path / "server", SIZE) as server:
            client.resume(job)
            until(client, job, "completed" if kind == "backup" else "ready")
            if kind == "mirror":
                client.cancel(job)
                assert client.wait(job).error.endswith("No such file or directory")
            assert_same_bytes(bytes(server.content), held if kind == "backup" else b"w" * BLOCK + held[BLOCK:])
        daemon.stop()


def test_mirror_whose_server_dies_while_it_is_ready_begins_anew(tmp_path: Path) -> None:
    image, held = make(tmp_path, "plain")
    with FakeServer(tmp_path / "server", SIZE) as server, start(image) as daemon:
        with FrontEnd(daemon.socket_path) as guest, control(image) as client:
            job = client.mirror(server.uri, existing=True, on_error="stop").job
            until(client, job, "ready")
            server.hang_up()
            until(client, job, "paused")  # though nobody writes
            assert "closed the connection" in client.job(job).error
            guest.write(0, b"w" * BLOCK)
            server.content[:] = b"p" * SIZE  # what it was given it has lost
            client.resume(job)
            until(client, job, "ready")
            client.cancel(job)
            client.wait(job)
            assert_same_bytes(bytes(server.content), b"w" * BLOCK + held[BLOCK:])
            assert server.commands[-1] == FLUSH
            job = client.mirror(server.uri, existing=True).job
            until(client, job, "ready")
            server.hang_up()
            until(client, job, "failed")
            guest.write(0, b"v" * BLOCK)
            daemon.stop()
    assert_same_bytes(read(image), b"v" * BLOCK + held[BLOCK:])


def test_mirror_begins_anew_where_the_image_was_let_go(tmp_path: Path) -> None:
    image, _ = make(tmp_path, "plain")
    with FakeServer(tmp_path / "server", SIZE) as server, start(image) as daemon:
        with FrontEnd(daemon.socket_path) as guest, control(image) as client:
            job = client.mirror(server.uri, existing=True).job
            until(client, job, "ready")
            queue = guest.stop_queue()
            until(client, job, "waiting")
            guest.start_queue(queue)
            until(client, job, "ready")
            guest.write(MIB, b"w" * BLOCK)
            client.cancel(job)
            client.wait(job)
            daemon.stop()
        assert_same_bytes(bytes(server.content), read(image))


def test_mirror_that_cannot_leave_a_whole_copy_any_more_has_failed(tmp_path: Path) -> None:
    image, _ = make(tmp_path, "plain")
    with FakeServer(tmp_path / "server", SIZE) as server, start(image) as daemon:
        with FrontEnd(daemon.socket_path), control(image) as client:
            job = client.mirror(server.uri, existing=True).job
            until(client, job, "ready")
            server.hold()
            client.cancel(job)
            server.wait_for_one()
            client.resize(SIZE + MIB)
            server.let_go()
            ended = client.wait(job)
            assert (ended.state, "no copy is left" in ended.error) == ("failed", True), ended
        daemon.stop()


# -- the connection, in this process


def test_server_that_answers_nothing_is_lost_when_patience_ends(tmp_path: Path) -> None:
    from qcow2.driver.nbdexport import NbdExport

    with FakeServer(tmp_path / "server", MIB, nanswered=1) as server:
        export, lost = NbdExport(server.uri, writable=True, patience=0.01).connect(), threading.Event()
        export.connection.on_lost = lambda error: lost.set()
        with export:
            assert perform(op.Read(export, 0, BLOCK)) == b"o" * BLOCK
            with pytest.raises(OSError, match=r"answers nothing for 0\.01 s") as raised:
                perform(op.Write(export, 0, b"w"))
            assert (raised.value.errno, raised.value.filename) == (errno.ETIMEDOUT, server.uri)
            assert lost.wait(TIMEOUT)
            with pytest.raises(OSError, match="answers nothing"):
                perform(op.Sync(export))


def test_no_memory_ends_the_connection_and_all_that_was_asked_for(tmp_path: Path) -> None:
    from qcow2.driver.nbdconnection import Command, NbdConnection

    def wait(handle: Any, completion: "Completion") -> None:
        came.set()
        go_on.wait()
        handle.aio_flush(completion=completion)

    def find_no_memory(handle: Any, completion: "Completion") -> None:
        raise MemoryError

    def flush(handle: Any, completion: "Completion") -> None:
        handle.aio_flush(completion=completion)

    came, go_on, ended, lost = threading.Event(), threading.Event(), SimpleQueue[Any](), SimpleQueue[OSError]()
    with FakeServer(tmp_path / "server", MIB) as server:
        connection = NbdConnection(server.uri)
        connection.open(lambda handle: None)
        connection.on_lost = lost.put
        connection.begin(Command(wait, lambda error: None))
        came.wait()
        for issue in (find_no_memory, flush):  # which are taken together
            connection.begin(Command(issue, ended.put))
        go_on.set()
        assert [ended.get(timeout=TIMEOUT).errno for _ in range(2)] == [errno.ENOMEM] * 2
        assert lost.get(timeout=TIMEOUT).errno == errno.ENOMEM
        connection.close()


def test_a_size_that_no_disk_has_is_said_to_be_wrong(tmp_path: Path) -> None:
    """The error that libnbd raises has no text."""
    with FakeServer(tmp_path / "server", MIB, told_size=(1 << 64) - 1) as server:
        said = qcow2_tool("info", server.uri)
    assert (said.returncode, said.stdout, said.stderr) == (1, "", f"qcow2: {server.uri}: Input/output error\n")


@needs_binding
@pytest.mark.parametrize(
    ("entries", "run"),
    [([0, 2], (True, 4096)), ([0, 0, 512, 2], (True, 4096)), ([0, 2, 512, 2], (False, 512)), ([], (True, 4096))],
)
def test_an_extent_without_bytes_is_no_reason_to_ask_again(entries: list[int], run: tuple[bool, int]) -> None:
    from qcow2.driver.nbdexport import _first_run

    assert _first_run(entries, 4096) == run


def test_no_more_than_one_run_is_asked_for(tmp_path: Path) -> None:
    """The server would have to look for the others: one of them cannot be told."""
    from qcow2.driver.nbdexport import NbdExport

    image = tmp_path / "broken"
    qcow2.create(image, MIB)
    with qcow2.open(image, "r+") as disk:
        disk.write(CLUSTER, b"x" * CLUSTER)
    break_mapping(image, cluster=3)
    with Server(image, "-r") as server, NbdExport(server.uri, writable=False).connect() as export:
        assert perform(op.Occupied(export, 0, MIB)) == (False, CLUSTER)
        assert perform(op.Occupied(export, CLUSTER, MIB - CLUSTER)) == (True, CLUSTER)
        with pytest.raises(OSError, match="Input/output error"):
            perform(op.Occupied(export, 3 * CLUSTER, CLUSTER))


def test_a_large_disk_is_looked_through_in_large_steps(tmp_path: Path) -> None:
    from qcow2.driver.nbdexport import NbdExport

    image, size = tmp_path / "large", 5 << 40
    qcow2.create(image, size, cluster_size=2 << 20)
    with Server(image, "-r") as server, NbdExport(server.uri, writable=False).connect() as export:
        assert perform(op.Occupied(export, 0, size)) == (False, 2 << 30)
        assert perform(op.Occupied(export, size - 512, 1 << 40)) == (False, 512)


def test_what_lies_past_the_end_is_zeros_or_no_space(tmp_path: Path) -> None:
    from qcow2.driver.nbdexport import NbdExport

    with FakeServer(tmp_path / "server", 1000) as server, NbdExport(server.uri, writable=True).connect() as export:
        assert perform(op.Read(export, 900, 200)) == b"o" * 100 + bytes(100)
        perform(op.Zero(export, 990, 100))
        perform(op.Write(export, 0, b"a", b"bc"))
        assert server.content == b"abc" + b"o" * 987 + bytes(10)
        for operation in (op.Write(export, 999, b"ab"), op.Resize(export, 1001)):
            with pytest.raises(OSError, match="the export has 1000 bytes") as raised:
                perform(operation)
            assert raised.value.errno == errno.ENOSPC


# -- the tool


@pytest.mark.sample(1)
@pytest.mark.parametrize("server", SERVERS)
def test_tool_copies_to_and_from_an_export(tmp_path: Path, server: str) -> None:
    image, held = make(tmp_path, "overlay")
    with served(tmp_path, server) as (uri, target):
        qcow2_tool_ok("convert", image, uri)
    assert_same_bytes(read(target, "raw" if server == "qemu-nbd raw" else "qcow2"), held)
    with Server(image, "-r", "-t") as ours:
        qcow2_tool_ok("convert", "-O", "qcow2", ours.uri, tmp_path / "back")
        assert qcow2_tool_ok("compare", "-F", "qcow2", ours.uri, tmp_path / "back") == "Images are identical.\n"
        told = json.loads(qcow2_tool_ok("info", "--output=json", ours.uri))
        assert (told["virtual-size"], told["format"], "actual-size" in told) == (SIZE, "raw", False)
        assert "disk size: unavailable\n" in qcow2_tool_ok("info", ours.uri)
        with qcow2.open(ours.uri, format="raw") as disk:
            assert_same_bytes(disk.read(0, SIZE), held)
            zeros = [extent for extent in disk.extents() if extent.is_zero]
            assert sum(extent.nbytes for extent in zeros) > SIZE // 4  # which the server tells of
            assert not any(disk.read(zeros[0].guest_offset, zeros[0].nbytes))
            extents = [(extent.guest_offset, extent.nbytes, extent.is_zero) for extent in disk.extents()]
        mapped = json.loads(qcow2_tool_ok("map", "--output=json", ours.uri))
        assert [(each["start"], each["length"], each["zero"]) for each in mapped] == extents
        for refused in ("convert", "-O", "qcow2", image, ours.uri), ("convert", image, ours.uri):
            assert qcow2_tool(*refused).returncode == 1
        ours.stop()
    assert_not_corrupt(tmp_path / "back")
    assert_same_bytes(read(tmp_path / "back"), held)


@pytest.mark.parametrize("words", [("convert", "-n"), ("convert",)], ids=" ".join)
def test_an_export_is_not_converted_onto_itself(tmp_path: Path, words: tuple[str, ...]) -> None:
    image, held = make(tmp_path, "overlay")
    with Server(image, "-t", "-e", "2") as ours:
        done = qcow2_tool(*words, "-f", "raw", "-O", "raw", ours.uri, ours.uri)
        ours.stop()
    assert done.returncode == 1
    assert done.stderr.endswith("the target is the source, or under it\n")
    assert_same_bytes(read(image), held)
