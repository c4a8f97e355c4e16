"""What is installed beside the programs: generated from their own parsers, and accepted by who is to read it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.frontend import FrontEnd
from tests.program import DAEMON, TIMEOUT, qcow2_tool_ok

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ["vhost-user-qcow2", "qcow2"]


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False, **options)  # type: ignore[call-overload, no-any-return]


@pytest.fixture(scope="module")
def usr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("usr")
    done = run(sys.executable, ROOT / "share/generate.py", target, f"--bindir={DAEMON.parent}")
    assert (done.returncode, done.stderr) == (0, "")
    return target


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.skipif(shutil.which("man") is None, reason="no man here")
def test_man_page_renders_without_a_warning_and_names_every_option(usr: Path, program: str) -> None:
    page = usr / "share/man/man1" / f"{program}.1"
    done = run("man", "--warnings", "-E", "UTF-8", "-l", page, env={**os.environ, "MANWIDTH": "100", "MANPAGER": "cat"})
    assert (done.returncode, done.stderr) == (0, "")
    usage = run(DAEMON.with_name(program), "--help").stdout
    for word in set(usage.split()) - {"--help"}:
        if word.startswith("--") and word.strip("-]").replace("-", "").isalpha():
            assert word.strip("],") in done.stdout, word


@pytest.mark.parametrize(
    ("program", "words", "expected"),
    [
        ("vhost-user-qcow2", ["--cac"], "--cache"),
        ("vhost-user-qcow2", ["--cache", "direct"], "directsync"),
        ("vhost-user-qcow2", ["ct"], "ctl"),
        ("vhost-user-qcow2", ["ctl", "--con"], "--control"),
        ("qcow2", ["cre"], "create"),
        ("qcow2", ["check", "--out"], "--output"),
    ],
)
def test_bash_completes(usr: Path, program: str, words: list[str], expected: str) -> None:
    completion = usr / "share/bash-completion/completions" / program
    line = " ".join(f"'{word}'" for word in [program, *words])
    script = f"""
        source {completion}
        COMP_WORDS=({line}); COMP_CWORD={len(words)}
        handler=$(complete -p {program} | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        $handler {program} '{words[-1]}' '{words[-2] if len(words) > 1 else program}'
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = run("bash", "--norc", "-c", script)
    assert expected in [word.strip() for word in done.stdout.splitlines()], done.stderr


def test_discovery_file_names_a_program_of_that_type(usr: Path) -> None:
    found = json.loads((usr / "share/qemu/vhost-user/50-vhost-user-qcow2.json").read_text())
    capabilities = json.loads(run(found["binary"], "--print-capabilities").stdout)
    assert found["type"] == capabilities["type"] == "block"
    assert found["description"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_units_verify(usr: Path) -> None:
    units = usr / "lib/systemd/system"
    done = run(
        "systemd-analyze",
        "verify",
        "--man=no",
        units / "vhost-user-qcow2@disk.socket",
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{units}:"},
    )
    complaints = [line for line in done.stderr.splitlines() if "vhost-user-qcow2" in line]
    assert (done.returncode, complaints) == (0, [])


def test_socket_activation_serves_and_tells_when_it_is_ready(tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    qcow2_tool_ok("create", image, "1M")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        listener.bind(str(tmp_path / "sock"))
        listener.listen()
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(TIMEOUT)
        # As systemd does: the socket is descriptor 3 of the process whose number LISTEN_PID is.
        script = 'exec 3<&"$1"; export LISTEN_PID=$$ LISTEN_FDS=1; exec "$2" --blk-file="$3"'
        command = ["bash", "-c", script, "bash", str(listener.fileno()), str(DAEMON), str(image)]
        environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        with subprocess.Popen(command, pass_fds=[listener.fileno()], env=environment) as process:
            assert manager.recv(100) == b"READY=1"
            with FrontEnd(tmp_path / "sock") as front_end:
                front_end.write(0, b"x" * 512)
            process.send_signal(signal.SIGTERM)
            assert manager.recv(100) == b"STOPPING=1"
            assert process.wait(TIMEOUT) == 0
    assert (tmp_path / "sock").exists()  # it is the service manager's


def test_sockets_for_another_process_are_left_alone(tmp_path: Path) -> None:
    environment = {**os.environ, "LISTEN_PID": "1", "LISTEN_FDS": "1"}
    done = run(DAEMON, f"--blk-file={tmp_path / 'disk'}", env=environment)
    assert done.returncode == 1
    assert "--socket-path" in done.stderr


def test_libvirt_xml_shares_memory_and_names_the_socket() -> None:
    done = run(DAEMON, "libvirt-xml", "--socket-path=/run/a&'b.sock", "--blk-file=disk.qcow2", "--num-queues=4")
    domain = ElementTree.fromstring(done.stdout)
    source, driver = domain.find("devices/disk/source"), domain.find("devices/disk/driver")
    assert source is not None
    assert driver is not None
    assert (source.get("type"), source.get("path")) == ("unix", "/run/a&'b.sock")
    assert (driver.get("type"), driver.get("queues")) == ("raw", "4")
    access = domain.find("memoryBacking/access")
    assert access is not None
    assert access.get("mode") == "shared"


def test_libvirt_xml_needs_a_path() -> None:
    done = run(DAEMON, "libvirt-xml", "--fd=3", "--blk-file=disk.qcow2")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
