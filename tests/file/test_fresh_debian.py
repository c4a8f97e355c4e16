"""What README says works in a Debian 12 that has nothing yet: committed files only, `make install-test` runs it."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MIRROR = "http://deb.debian.org/debian"
TIMEOUT = 900
NAMESPACES = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
ENTER = """
mount -t proc proc "$ROOT/proc"
mount --rbind /dev "$ROOT/dev"
exec chroot "$ROOT" sh -euc "$1"
"""
# What a shell finds at once, below each PREFIX that Debian looks at.
IN_PLACE = """
cd /
qcow2 --version
vhost-user-qcow2 --version
qcow2 create disk.qcow2 1G && qcow2 info disk.qcow2 | grep -q '1 GiB'
timeout --preserve-status -s TERM 2 vhost-user-qcow2 --socket-path=/disk.sock --blk-file=disk.qcow2 --sandbox
rm -f disk.qcow2 disk.sock
systemd-analyze verify vhost-user-qcow2@disk.socket vhost-user-qcow2@disk.service
man -P cat qcow2 | grep -q 'qcow2 - '
bash -c '. /usr/share/bash-completion/bash_completion; _completion_loader qcow2; complete -p qcow2' | grep -q _whole
"$(sed -n 's/.*"binary": "\\(.*\\)".*/\\1/p' $DISCOVERY/vhost-user/50-vhost-user-qcow2.json)" --print-capabilities
"""
LIST = "find / -xdev -newer /before ! -type d | grep -vE '^/(proc|root|run|tmp|var)/' || true"

pytestmark = [
    pytest.mark.xdist_group("fresh debian"),  # one at a time
    pytest.mark.skipif("INSTALL" not in os.environ, reason="takes minutes: make install-test"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who makes a root"),
    pytest.mark.skipif(shutil.which("debootstrap") is None, reason="no debootstrap here"),
]


class Debian:
    """A root file system with a clone of this repository in /root/clone."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._environment = {"ROOT": str(root), "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}

    def build(self) -> None:
        subprocess.run(
            ["debootstrap", "--variant=minbase", "bookworm", self._root, MIRROR], check=True, timeout=TIMEOUT
        )
        shutil.copy("/etc/resolv.conf", self._root / "etc/resolv.conf")
        if certificates := os.environ.get("PIP_CERT"):
            shutil.copy(certificates, self._root / "etc/certificates.pem")
            self._environment["PIP_CERT"] = "/etc/certificates.pem"
        subprocess.run(["git", "clone", "-q", ROOT, self._root / "root/clone"], check=True)

    def run(self, script: str, **variables: str) -> str:
        """Run *script* in the root, as root; it must succeed."""
        command = [*NAMESPACES, "sh", "-euc", ENTER, "sh", script]
        environment = {"HOME": "/root", "DEBIAN_FRONTEND": "noninteractive", **self._environment, **variables}
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT
        )
        assert done.returncode == 0, f"{script}: status {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Debian]:
    root = tmp_path_factory.mktemp("debian")
    debian = Debian(root)
    debian.build()
    debian.run("apt-get -qq update; apt-get -qq install git make >/dev/null")  # README's first line
    debian.run("apt-get -qq install systemd bash-completion man-db >/dev/null")
    debian.run("cd /root/clone; make .venv/installed")
    yield debian
    shutil.rmtree(root)


@pytest.mark.parametrize(
    ("prefix", "discovery"), [("/usr/local", "/etc/qemu"), ("/usr", "/usr/share/qemu"), ("/opt/disk", "")]
)
def test_make_install_works_and_uninstall_leaves_nothing(debian: Debian, prefix: str, discovery: str) -> None:
    debian.run("touch /before")
    debian.run(f"cd /root/clone; make install PREFIX={prefix}")
    debian.run("mv /root/clone /root/away")  # nothing may need it
    if discovery:
        debian.run(IN_PLACE, DISCOVERY=discovery)
    else:
        debian.run(f"{prefix}/bin/qcow2 --version; {prefix}/bin/vhost-user-qcow2 --version")
    debian.run("mv /root/away /root/clone")
    debian.run(f"cd /root/clone; make uninstall PREFIX={prefix}")
    assert debian.run(LIST).split() == []


def test_pip_installs_into_a_virtual_environment(debian: Debian) -> None:
    debian.run("cd /root/clone; make build-packages; python3 -m venv /tmp/venv; /tmp/venv/bin/pip install -q .")
    debian.run("cd /; /tmp/venv/bin/qcow2 --version; /tmp/venv/bin/python -c 'import qcow2; qcow2.open'")
