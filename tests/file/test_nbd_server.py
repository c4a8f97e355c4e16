"""`qcow2 serve-nbd` as a program: who may come, how it ends, what a hostile client can do, and a kill cannot."""

import errno
import os
import random
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import qcow2
from qcow2.nbd.stream import Stream
from tests import nbdclient as nbd
from tests.nbdclient import Client, NbdError, Server, empty_disk
from tests.nbdzone import Zone
from tests.oracle import assert_clean, assert_not_corrupt, qemu_img
from tests.program import TIMEOUT, TOOL, qcow2_tool
from tests.slowdisk import FSYNC, SlowDisk

ROOT = Path(__file__).resolve().parents[2]
SIZE = 8 << 20
CLUSTER = 64 << 10


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qcow2.create(path, SIZE)
    return path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with empty_disk(tmp_path_factory.mktemp("served"), SIZE) as server:
        yield server


def fd_count(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


# -- coming and going


def test_it_ends_with_its_last_client(image: Path) -> None:
    with Server(image, "-e", "0") as server:
        with server.client(), server.client():
            pass
        server.end()


def test_who_only_asks_does_not_end_it(image: Path) -> None:
    with Server(image) as server:
        with server.client(waits=True) as client:
            client.greet()
            client.option(nbd.ABORT)
        with server.client() as client:
            client.write(0, b"x")
        server.end()


def test_a_persistent_server_ends_by_a_signal(image: Path) -> None:
    with Server(image, "-t") as server:
        for _ in range(3):
            with server.client() as client:
                client.write(0, b"x")
        server.stop()
    assert_not_corrupt(image)


def test_the_end_leaves_the_image_clean_under_a_client(image: Path) -> None:
    with Server(image) as server, server.client() as client:
        client.write(12345, b"x" * CLUSTER)
        server.stop()
        assert client.is_dropped()
    with qcow2.open(image) as disk:
        assert disk.read(12345, CLUSTER) == b"x" * CLUSTER
    assert_not_corrupt(image)


def test_what_a_client_was_sent_is_no_later_content(image: Path) -> None:
    """The server ends, and with it what keeps writers away, when its last replies were read: they may be the file's."""
    with qcow2.open(image, "r+") as disk:
        disk.write(0, b"x" * CLUSTER)
    with Server(image, "-r") as server, server.client() as client:
        assert client.read(0, CLUSTER) == b"x" * CLUSTER
        client.send(nbd.READ, 0, CLUSTER)
        client.socket.recv(1, socket.MSG_PEEK)
        server.process.send_signal(signal.SIGTERM)
        process = os.pidfd_open(server.process.pid)
        if select.select([process], [], [], 1.0)[0]:
            with qcow2.open(image, "r+") as disk:
                disk.write(0, b"y" * CLUSTER)
        os.close(process)
        assert client.reply(CLUSTER).data == b"x" * CLUSTER
        server.end()


def test_a_second_client_waits_for_the_first_to_leave(image: Path) -> None:
    with Server(image, "-t") as server:
        with server.client() as first:
            assert not first.flags & 1 << 8  # CAN_MULTI_CONN
            with server.client(waits=True) as second:
                first.write(0, b"x")
                second.socket.setblocking(False)
                with pytest.raises(BlockingIOError):
                    second.receive(1)
                second.socket.setblocking(True)
                first.socket.close()
                second.greet()


def test_sixty_four_clients(image: Path) -> None:
    with Server(image, "-e", "64", "-t") as server:
        clients = [server.client() for _ in range(64)]
        assert clients[0].flags & 1 << 8
        for number, client in enumerate(clients):
            client.send(nbd.WRITE, number * 4096, 4096, data=bytes([number]) * 4096)
        assert [client.reply().error for client in clients] == [0] * 64
        clients[7].request(nbd.FLUSH)
        for number, client in enumerate(clients):
            other = (number + 13) % 64
            assert client.read(other * 4096, 4096) == bytes([other]) * 4096
            client.socket.close()
        server.stop()
    assert_not_corrupt(image)


def test_a_path_of_its_own(image: Path, tmp_path: Path) -> None:
    path, pid_file = tmp_path / "sock", tmp_path / "pid"
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(path))
    os.mkfifo(pid_file)
    command = [TOOL, "serve-nbd", "-k", path, "-t", "--pid-file", pid_file, image]
    with subprocess.Popen(command) as process:
        assert int(pid_file.read_text()) == process.pid
        with Client(path) as client:
            assert client.read(0, 10) == bytes(10)
            second = qcow2_tool("serve-nbd", "-r", "-k", path, image)
            assert second.returncode == 1
            assert str(path) in second.stderr or str(image) in second.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT) == 0
    assert not path.exists()


def test_a_server_in_the_background(image: Path, tmp_path: Path) -> None:
    path, pid_file = tmp_path / "sock", tmp_path / "pid"
    assert qcow2_tool("serve-nbd", "--fork", "-k", path, "--pid-file", pid_file, image).returncode == 0
    server = os.pidfd_open(int(pid_file.read_text()))
    with Client(path) as client:
        client.write(0, b"x")
    assert select.select([server], [], [], TIMEOUT)[0]  # its last client has left
    os.close(server)
    assert not path.exists()
    failed = qcow2_tool("serve-nbd", "--fork", "-k", path, "-B", "none", image)
    assert (failed.returncode, failed.stderr) == (1, "qcow2: Dirty bitmap 'none' not found\n")


def test_a_server_in_the_background_has_the_sockets_that_were_given(image: Path, tmp_path: Path) -> None:
    """They are said to be the first process's, which is not the one that serves."""
    pid_file = tmp_path / "pid"
    with Server(image, "--fork", f"--pid-file={pid_file}") as server:
        server.end()
        background = os.pidfd_open(int(pid_file.read_text()))
        try:
            with server.client() as client:
                client.write(0, b"x")
            assert select.select([background], [], [], TIMEOUT)[0]
        finally:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(background, signal.SIGKILL)
            os.close(background)
    with qcow2.open(image) as disk:
        assert disk.read(0, 2) == b"x\0"


@pytest.mark.parametrize("options", [("-b", "127.0.0.1"), ("-b", "0.0.0.0", "--no-tls")], ids=" ".join)
def test_tcp(image: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    pid_file = tmp_path / "pid"
    os.mkfifo(pid_file)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [TOOL, "serve-nbd", *options, "-p", str(port), "--pid-file", pid_file, image]
    with subprocess.Popen(command) as process:
        pid_file.read_text()
        said = qemu_img("info", f"nbd://127.0.0.1:{port}").stdout
        assert "8 MiB" in said
        assert process.wait(TIMEOUT) == 0


def test_a_client_whose_host_is_dead_is_found_out() -> None:
    """In minutes, not the two hours of the kernel's: with --shared=1 nobody else is let in before."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()):
        there, _ = listener.accept()
        with there:
            Stream(there)
            assert there.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            idle, step, count = (
                there.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
            assert idle + step * count == 120


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-k", "a", "-p", "1"], "exclude"),
        (["-p", "70000"], "70000"),
        (["-e", "-1"], "-1"),
        (["-B", "none"], "none"),
        (["--tls-creds", "nowhere"], "nowhere"),
        (["-l", "none"], "none"),
        (["-k", "x" * 200], "x" * 200),
        (
            ["-b", "0.0.0.0"],
            "0.0.0.0:10809: others than this host reach it, without TLS: give --tls-creds, or --no-tls",
        ),
        (["-b", "::", "-p", "0"], ":::0: others than this host reach it"),
        (["--tls-creds", "a", "--no-tls"], "exclude"),
    ],
)
def test_what_cannot_be_served_is_one_line(image: Path, options: list[str], said: str) -> None:
    done = qcow2_tool("serve-nbd", *options, image)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert said in done.stderr


def test_no_thread_at_the_start_is_one_line(image: Path) -> None:
    """Later on one of the server's own is enough."""
    refusing = [sys.executable, "-m", "tests.refused", "EAGAIN", "threads"]
    done = subprocess.run(
        [*refusing, TOOL, "serve-nbd", image], capture_output=True, text=True, timeout=TIMEOUT, cwd=ROOT
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "thread" in done.stderr
    assert_clean(image)


def test_an_image_in_use_is_refused(image: Path) -> None:
    with Server(image) as server, server.client():
        done = qcow2_tool("serve-nbd", image)
        assert done.returncode == 1
        assert str(image) in done.stderr


# -- TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, a server and a client, all known by it."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here to make certificates")
    place = tmp_path_factory.mktemp("tls")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=place, check=True, capture_output=True, timeout=TIMEOUT)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca-cert.pem", "-subj", "/CN=authority", "-days", "9")
    for who in ("server", "client"):
        openssl("req", *key, "-keyout", f"{who}-key.pem", "-out", f"{who}.csr", "-subj", f"/CN={who}")
        signed = ("-CA", "ca-cert.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "9")
        openssl("x509", "-req", "-in", f"{who}.csr", *signed, "-out", f"{who}-cert.pem")
    return place


def test_nothing_is_said_without_tls(image: Path, certificates: Path) -> None:
    with Server(image, "-t", "--tls-creds", str(certificates)) as server:
        with server.client(waits=True) as client:
            client.greet()
            assert client.option(nbd.LIST)[0][0] == nbd.TLS_REQD
            with pytest.raises(NbdError, match=str(nbd.TLS_REQD)):
                client.go()
            client.send_option(nbd.EXPORT_NAME)
            assert client.is_dropped()


def test_tls_in_the_middle_of_the_negotiation(image: Path, certificates: Path) -> None:
    context = ssl.create_default_context(cafile=certificates / "ca-cert.pem")
    context.check_hostname = False
    context.load_cert_chain(certificates / "client-cert.pem", certificates / "client-key.pem")
    data = os.urandom(3 << 20)
    with Server(image, "--tls-creds", str(certificates)) as server, server.client(waits=True) as client:
        client.greet()
        assert client.option(nbd.STARTTLS) == [(nbd.ACK, b"")]
        with context.wrap_socket(client.socket) as client.socket:
            assert client.option(nbd.STARTTLS)[0][0] == nbd.INVALID
            client.option(nbd.STRUCTURED)
            client.go()
            cookies = {
                client.send(nbd.WRITE, number << 18, 1 << 18, data=data[number << 18 :][: 1 << 18])
                for number in range(12)
            }
            assert {client.reply().cookie for _ in range(12)} == cookies
            assert client.read(0, 3 << 20) == data


def test_with_tls_others_than_this_host_may_come(image: Path, certificates: Path, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    os.mkfifo(pid_file)
    options = ["-b", "0.0.0.0", "-p", "0", "--tls-creds", certificates, "--pid-file", pid_file]
    with subprocess.Popen([TOOL, "serve-nbd", *options, image]) as process:
        assert int(pid_file.read_text()) == process.pid
        process.terminate()
        assert process.wait(TIMEOUT) == 0


@pytest.mark.parametrize("verifies", ["on", "off"])
def test_a_client_without_a_certificate(image: Path, certificates: Path, verifies: str) -> None:
    context = ssl.create_default_context(cafile=certificates / "ca-cert.pem")
    context.check_hostname = False
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # whose handshake says at once that it failed
    options = ("--tls-creds", str(certificates), "--tls-verify-peer", verifies)
    with Server(image, "-t", *options) as server, server.client(waits=True) as client:
        client.greet()
        client.option(nbd.STARTTLS)
        if verifies == "on":
            with pytest.raises(OSError):
                context.wrap_socket(client.socket)
        else:
            with context.wrap_socket(client.socket) as client.socket:
                client.go()
                assert client.size == SIZE


def test_tls_that_nobody_offers(served: Server) -> None:
    with served.client(waits=True) as client:
        client.greet()
        assert client.option(nbd.STARTTLS)[0][0] == nbd.POLICY


# -- hostile clients


def no_magic(client: Client) -> None:
    client.socket.sendall(bytes(28))


def huge_write(client: Client) -> None:
    client.send(nbd.WRITE, 0, (32 << 20) + 1)


def half_a_request(client: Client) -> None:
    client.socket.sendall(struct.pack(">IHH", 0x25609513, 0, 0))
    client.socket.shutdown(socket.SHUT_WR)


def half_a_write(client: Client) -> None:
    client.send(nbd.WRITE, 0, 5 << 20, data=bytes(3 << 20))
    client.socket.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("attack", [no_magic, huge_write, half_a_request, half_a_write])
def test_who_breaks_the_protocol_loses_its_connection_only(served: Server, attack: Callable[[Client], None]) -> None:
    with served.client() as other:
        with served.client() as client:
            attack(client)
            assert client.is_dropped()
        other.write(0, b"x")
        assert other.read(0, 1) == b"x"


@pytest.mark.parametrize(
    "words",
    [
        struct.pack(">I", 4),  # flags nobody knows
        struct.pack(">I8sII", 3, b"IHAVEOPs", 3, 0),
        struct.pack(">I8sII", 3, b"IHAVEOPT", 3, 1 << 20),
        struct.pack(">I8sII", 0, b"IHAVEOPT", 7, 0),  # GO of a client that is not "fixed"
    ],
)
def test_a_negotiation_that_makes_no_sense_ends(served: Server, words: bytes) -> None:
    with served.client(waits=True) as client:
        client.receive(18)
        client.socket.sendall(words)
        assert client.is_dropped()


@pytest.mark.parametrize(
    ("option", "data"),
    [
        (nbd.LIST, b"x"),
        (nbd.STRUCTURED, b"x"),
        (nbd.GO, b""),
        (nbd.GO, struct.pack(">I", 1 << 31)),
        (nbd.GO, struct.pack(">IHH", 0, 2, 1)),
        (nbd.INFO, struct.pack(">IHHH", 0, 1, 1, 1)),
        (nbd.SET_CONTEXTS, struct.pack(">II", 0, 1 << 31)),
        (nbd.SET_CONTEXTS, struct.pack(">III", 0, 1, 5)),
        (nbd.LIST_CONTEXTS, struct.pack(">III", 0, 0, 0)),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(served: Server, option: int, data: bytes) -> None:
    with served.client(waits=True) as client:
        client.greet()
        if option != nbd.STRUCTURED:
            client.option(nbd.STRUCTURED)
        assert [kind for kind, _ in client.option(option, data)] == [nbd.INVALID]
        client.go()


def test_who_breaks_the_protocol_fills_no_disk_with_what_is_said_of_it(image: Path) -> None:
    with Server(image, "-t", "-e", "0") as server:
        for _ in range(100):
            with server.client(waits=True) as client:
                client.socket.sendall(b"\xff" * 4)
                client.receive(18)
                assert client.is_dropped()
        said = server.stop().splitlines()
    assert said[0] == "a client breaks the protocol: unknown handshake flags 0xffffffff"
    assert len(said) < 50


def test_who_reads_no_replies_keeps_nobody_waiting(image: Path) -> None:
    with Server(image, "-t", "-e", "0") as server, server.client() as other:
        with server.client() as deaf:
            deaf.write(0, b"x" * (4 << 20))
            for _ in range(40):
                deaf.send(nbd.READ, 0, 4 << 20)
            other.write(SIZE - 1, b"y")
            assert other.read(SIZE - 1, 1) == b"y"
            server.stop()


def test_no_client_leaves_a_descriptor_behind(image: Path) -> None:
    with Server(image, "-t", "-e", "0") as server:
        with server.client() as first:
            before = fd_count(server.process.pid)
            for number in range(20):
                client = server.client(waits=number % 2 == 1)
                client.socket.close()
            first.read(0, 1)
            with server.client():  # let in after all of those, which have left or are about to
                pass
            for _ in range(2000):
                if fd_count(server.process.pid) == before:
                    break
                first.read(0, 1)
            assert fd_count(server.process.pid) == before


# -- what is stable, and what a kill takes


@pytest.mark.parametrize(
    ("options", "flags", "flushes"),
    [((), 0, True), ((), nbd.FUA, False), (("--cache=writethrough",), 0, False)],
    ids=["flush", "fua", "writethrough"],
)
def test_an_answer_waits_for_the_sync_that_it_promises(
    tmp_path: Path, options: tuple[str, ...], flags: int, flushes: bool
) -> None:
    """And other requests of the same client do not wait for it."""
    (tmp_path / "backing").mkdir()
    (tmp_path / "slow").mkdir()
    (tmp_path / "backing" / "disk").write_bytes(b"x" * SIZE)
    with SlowDisk(tmp_path / "backing", tmp_path / "slow") as disk:
        (tmp_path / "link").symlink_to(disk.path / "disk")
        with Server(tmp_path / "link", "-f", "raw", *options) as server, server.client() as client:
            client.read(0, 1)
            with disk.holding(FSYNC):
                if flushes:
                    client.write(0, b"y")
                    promise = client.send(nbd.FLUSH)
                else:
                    promise = client.send(nbd.WRITE, 0, 1, flags, data=b"y")
                disk.wait_for_one()
                read = client.send(nbd.READ, 1, 1)
                assert client.reply(1, 1).cookie == read
            assert client.reply().cookie == promise
            client.send(nbd.DISC)
            server.end()
    assert (tmp_path / "backing" / "disk").read_bytes() == b"y" + b"x" * (SIZE - 1)


def test_flushes_share_a_sync_that_began_after_all_of_them(tmp_path: Path) -> None:
    (tmp_path / "backing").mkdir()
    (tmp_path / "slow").mkdir()
    (tmp_path / "backing" / "disk").write_bytes(bytes(SIZE))
    with SlowDisk(tmp_path / "backing", tmp_path / "slow") as disk:
        (tmp_path / "link").symlink_to(disk.path / "disk")
        with Server(tmp_path / "link", "-f", "raw", "-e", "0") as server, server.client() as first:
            first.read(0, 1)
            others = [server.client() for _ in range(5)]
            with disk.holding(FSYNC):
                first.send(nbd.FLUSH)
                disk.wait_for_one()
                flushes = [client.send(nbd.FLUSH) for client in others]
                for client in others:
                    assert client.read(0, 1) == b"\0"  # so its flush has been received, and is not served
                with disk.holding(FSYNC):  # the sync under way ends, another one does not
                    disk.wait_for_one()
                    assert not first.reply().error
                    for client in others:
                        assert client.read(0, 1) == b"\0"
                    with disk.holding(FSYNC):  # this one ends; a third would not
                        assert [client.reply().cookie for client in others] == flushes
            for client in (first, *others):
                client.socket.close()
            server.end()


@pytest.mark.parametrize("ncached", [0, 128 << 10])
def test_a_read_error_ends_a_reply_and_not_the_connection(tmp_path: Path, ncached: int) -> None:
    """Before, or after, some bytes of the chunk were sent from the page cache."""
    (tmp_path / "backing").mkdir()
    (tmp_path / "slow").mkdir()
    image, nbytes = tmp_path / "backing" / "disk", SIZE // 8
    qcow2.create(image, SIZE)
    with qcow2.open(image, "r+") as guest:
        guest.write(0, b"x" * nbytes)
    with SlowDisk(tmp_path / "backing", tmp_path / "slow") as disk:
        (tmp_path / "link").symlink_to(disk.path / "disk")
        with Server(tmp_path / "link", "-r") as server, server.client() as client:
            assert not any(client.read(nbytes, 512))  # which loads the mapping
            assert client.read(0, ncached) == b"x" * ncached
            with disk.unreadable(errno.EIO):
                with pytest.raises(NbdError) as refused:
                    client.read(0, nbytes)
                assert refused.value.number == errno.EIO
            assert client.read(0, nbytes) == b"x" * nbytes
            client.send(nbd.DISC)
            server.end()


@pytest.mark.parametrize("kind", ["overlay", "lazy"])
def test_what_was_answered_survives_a_kill(tmp_path: Path, kind: str) -> None:
    """Of clients side by side, eight requests each; over a backing file links wait in memory, too."""
    top = tmp_path / "top.qcow2"
    if kind == "overlay":
        (tmp_path / "base").write_bytes(b"b" * SIZE)
        qcow2.create(top, backing=tmp_path / "base", backing_format="raw")
    else:
        qcow2.create(top, SIZE, lazy_refcounts=True)
    zones = [Zone(start, SIZE // 4, b"b" if kind == "overlay" else b"\0") for start in range(0, SIZE, SIZE // 4)]
    with Server(top, "-e", "0", "-t") as server:
        clients = [server.client() for _ in zones]
        threads = [
            threading.Thread(target=zone.use, args=(client, random.Random(f"{kind} {zone.start}")))
            for zone, client in zip(zones, clients, strict=True)
        ]
        for thread in threads:
            thread.start()
        while sum(zone.nanswered for zone in zones) < 300 and any(thread.is_alive() for thread in threads):
            zones[0].progress.acquire()
        server.process.kill()
        for thread in threads:
            thread.join()
        for client in clients:
            client.socket.close()
    assert [zone.failure for zone in zones] == [None] * len(zones)
    with qcow2.open(top, "r+") as disk:  # as the next process does, which brings back what the log holds
        for zone in zones:
            zone.compare(disk.read(zone.start, zone.nbytes))
    assert_not_corrupt(top)
