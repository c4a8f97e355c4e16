"""What is installed beside the programs: generated from their own parsers, and accepted by who is to read it."""

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import IO
from xml.etree import ElementTree

import pytest

from tests.frontend import FrontEnd
from tests.program import DAEMON, TIMEOUT, qcow2_tool_ok

pytestmark = pytest.mark.xdist_group("packaging")  # generated once

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
    assert expected in completed(usr, program, words)


def completed(usr: Path, program: str, words: list[str], cwd: Path | None = None) -> set[str]:
    """What bash offers after *words*, which are split as it splits them."""
    completion = usr / "share/bash-completion/completions" / program
    line = " ".join(f"'{word}'" for word in [program, *words])
    script = f"""
        source {completion}
        COMP_WORDS=({line}); COMP_CWORD={len(words)}
        handler=$(complete -p {program} | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        $handler {program} '{words[-1]}' '{words[-2] if len(words) > 1 else program}'
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    return {word.strip() for word in run("bash", "--norc", "-c", script, cwd=cwd).stdout.splitlines()}


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("vhost-user-qcow2", ["--blk-file", "di"]),
        ("vhost-user-qcow2", ["--blk-file", "=", "di"]),
        ("vhost-user-qcow2", ["libvirt-xml", "--socket-path", "=", "di"]),
        ("vhost-user-qcow2", ["ctl", "--control", "=", "di"]),
        ("qcow2", ["info", "di"]),
        ("qcow2", ["check", "-r", "all", "di"]),
        ("qcow2", ["create", "-b", "di"]),
        ("qcow2", ["rebase", "-u", "-b", "di"]),
    ],
)
def test_bash_completes_names_of_files(usr: Path, tmp_path: Path, program: str, words: list[str]) -> None:
    (tmp_path / "disk one.qcow2").touch()
    assert "disk one.qcow2" in completed(usr, program, words, cwd=tmp_path)


@pytest.mark.parametrize("words", [["--cache", "=", "direct"], ["--cache", "="], ["--cache", "=", "dir", "--sandbox"]])
def test_bash_completes_what_follows_an_equals_sign(usr: Path, words: list[str]) -> None:
    assert completed(usr, "vhost-user-qcow2", words) & {"directsync", "--sandbox"}


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("qcow2 info pl", "plain.qcow2 #"),
        ("qcow2 info di", "directory/#"),
        ("qcow2 info a", r"a\ name.qcow2 #"),
        (r"qcow2 info a\ ", r"a\ name.qcow2 #"),
        ("vhost-user-qcow2 --blk-file=pl", "--blk-file=plain.qcow2 #"),
        (r"vhost-user-qcow2 --blk-file=a\ n", r"--blk-file=a\ name.qcow2 #"),
        ("vhost-user-qcow2 --link-log 'the d", "'the directory'/#"),
        ("vhost-user-qcow2 --cache=directs", "--cache=directsync #"),
        ("vhost-user-qcow2 ctl --control pl", "plain.qcow2 #"),
    ],
)
def test_tab_key_completes(usr: Path, tmp_path: Path, typed: str, expected: str) -> None:
    for name in ("plain.qcow2", "a name.qcow2"):
        (tmp_path / name).touch()
    for name in ("directory", "the directory"):
        (tmp_path / name).mkdir()
    assert expected in typed_in_bash(usr, typed, cwd=tmp_path)


def typed_in_bash(usr: Path, typed: str, cwd: Path) -> str:
    """What an interactive bash shows for *typed* with the tab key after it, then a "#"."""
    program = typed.split()[0]
    ready = "".join(("re", "ady"))
    keyboard, screen = pty.openpty()
    fcntl.ioctl(keyboard, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 1000, 0, 0))
    setting = f"source {usr}/share/bash-completion/completions/{program}; bind 'set bell-style none'; PS1='re''ady '\n"
    with subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"],
        stdin=screen,
        stdout=screen,
        stderr=screen,
        cwd=cwd,
        start_new_session=True,
        env={"PATH": os.defpath, "TERM": "dumb", "INPUTRC": "/dev/null", "HISTFILE": ""},
    ) as bash:
        os.close(screen)
        with open(keyboard, "r+b", buffering=0) as terminal:
            terminal.write(setting.encode())
            _read_until(terminal, ready)
            terminal.write(f"{typed}\t#".encode())
            seen = _read_until(terminal, "#")
            bash.kill()
    return seen


def _read_until(terminal: IO[bytes], text: str) -> str:
    seen = ""
    while text not in seen:
        assert select.select([terminal], [], [], TIMEOUT)[0], seen
        seen += terminal.read(4096).decode()
    return seen


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


def libvirt_xml() -> str:
    done = run(DAEMON, "libvirt-xml", "--socket-path=/run/a&'b.sock", "--blk-file=disk.qcow2", "--num-queues=4")
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_libvirt_xml_is_a_device_that_names_the_socket() -> None:
    disk = ElementTree.fromstring(libvirt_xml())
    source, driver = disk.find("source"), disk.find("driver")
    assert disk.tag == "disk"
    assert source is not None
    assert driver is not None
    assert (source.get("type"), source.get("path")) == ("unix", "/run/a&'b.sock")
    assert (driver.get("type"), driver.get("queues")) == ("raw", "4")
    # With it QEMU waits for a socket that it may not open, and `virsh start` hangs.
    assert source.find("reconnect") is None


def test_libvirt_xml_says_that_memory_must_be_shared() -> None:
    builder = ElementTree.TreeBuilder(insert_comments=True)
    parser = ElementTree.XMLParser(target=builder)
    assert "<access mode='shared'/>" in libvirt_xml()
    assert ElementTree.fromstring(libvirt_xml(), parser).tag == "disk"


@pytest.mark.skipif(None in map(shutil.which, ("virt-xml-validate", "xmllint")), reason="no virt-xml-validate, xmllint")
def test_libvirt_accepts_the_xml(tmp_path: Path) -> None:
    domain = f"""<domain type='qemu'><name>guest</name><memory>65536</memory><os><type>hvm</type></os>
    <devices>{libvirt_xml()}</devices></domain>"""
    (tmp_path / "domain.xml").write_text(domain)
    done = run("virt-xml-validate", tmp_path / "domain.xml", "domain")
    assert done.returncode == 0, done.stderr


def test_libvirt_xml_names_a_relative_socket_by_its_whole_path(tmp_path: Path) -> None:
    done = run(DAEMON, "libvirt-xml", "--socket-path=disk.sock", "--blk-file=disk.qcow2", cwd=tmp_path)
    source = ElementTree.fromstring(done.stdout).find("source")
    assert source is not None
    assert source.get("path") == str(tmp_path / "disk.sock")


def test_libvirt_xml_needs_a_path() -> None:
    done = run(DAEMON, "libvirt-xml", "--fd=3", "--blk-file=disk.qcow2")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The sources with the extensions that were built of them, all of one age."""
    for room in ("ring", "virtio", "vhost", "qcow2"):
        shutil.copytree(ROOT / room, tmp_path / "tree" / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "tree")
    return tmp_path / "tree"


def run_in(tree: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = "import sys, qcow2.tool, vhost.command; sys.exit(vars(eval(sys.argv.pop(1)))[sys.argv.pop(1)]())"
    return run(sys.executable, "-c", program, *arguments, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)})


OLD = [
    ("qcow2/plane/stock.h", ["qcow2.tool", "program", "check"], "qcow2"),
    ("ring/worker.c", ["vhost.command", "main", "--fd=0", "--blk-file"], "vhost-user-qcow2"),
]


@pytest.mark.parametrize(("source", "words", "program"), OLD)
def test_extensions_of_other_sources_are_refused_in_a_line_that_says_what_to_run(
    tree: Path, tmp_path: Path, source: str, words: list[str], program: str
) -> None:
    """Else each half may wait for what the other does not say."""
    qcow2_tool_ok("create", tmp_path / "disk", "1M")
    with (tree / source).open("a") as file:
        file.write("/* newer */\n")
    os.utime(tree / source, (1 << 32, 1 << 32))
    done = run_in(tree, *words, tmp_path / "disk")
    assert done.returncode == 1
    assert re.fullmatch(
        rf"{program}: \S+\.so was compiled from other sources: run make \.venv/installed\n", done.stderr
    )
    os.unlink(tree / "pyproject.toml")  # as it is where it was installed
    assert "sources" not in run_in(tree, *words, tmp_path / "disk").stderr


def test_sources_that_are_only_younger_do_no_harm(tree: Path, tmp_path: Path) -> None:
    qcow2_tool_ok("create", tmp_path / "disk", "1M")
    for source in ("ring/worker.c", "qcow2/native.cdef"):
        os.utime(tree / source, (1 << 32, 1 << 32))
    assert run_in(tree, "qcow2.tool", "program", "check", tmp_path / "disk").returncode == 0


def test_the_other_commands_are_told_of() -> None:
    assert "ctl --help" in run(DAEMON, "--help").stdout
    assert "libvirt domain" in " ".join(run(DAEMON, "libvirt-xml", "--help").stdout.split())
    done = subprocess.run([DAEMON, "serve", "--blk-file=a"], capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 1
    assert "'serve' is no command: those are ctl, libvirt-xml" in done.stderr
