"""The host's tools, run to success: ours make the images, QEMU's and e2fsprogs' judge them."""

import hashlib
from pathlib import Path

from guest import find_program, installed_program

from tests.oracle import ask_qemu

PACKAGES = {
    "qemu-img": "qemu-utils",
    "mke2fs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "dumpe2fs": "e2fsprogs",
}


def run(name: str, *arguments: str | Path) -> str:
    """Run one of *PACKAGES*, insist on exit status 0, return what it printed."""
    return _succeed(find_program(name, PACKAGES[name]), *arguments)


def qcow2(*arguments: str | Path) -> str:
    """Run our image tool, insist on exit status 0, return what it printed."""
    return _succeed(installed_program("qcow2"), *arguments)


def _succeed(program: Path, *arguments: str | Path) -> str:
    done = ask_qemu([program, *arguments])
    command = " ".join([program.name, *map(str, arguments)])
    assert done.returncode == 0, f"{command}: status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def make_image(path: Path, size: str, options: str) -> Path:
    qcow2("create", "-o", options, path, size)
    return path


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def host_bytes(path: Path) -> int:
    """Return the space the file takes on the host, holes left out."""
    return path.stat().st_blocks * 512
