"""Write what a system wants beside the programs: man pages, bash completion, systemd units, QEMU's discovery file.

``python share/generate.py DIRECTORY --bindir=/usr/bin``: into DIRECTORY, laid out as under /usr. Pages and completion
come from the programs' own argparse parsers, by argparse-manpage and shtab.
"""

import argparse
import os
import sys
from pathlib import Path

import shtab
from argparse_manpage.manpage import Manpage

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from qcow2.tool import build_parser as qcow2_parser  # noqa: E402 - after the path
from vhost.option import whole_parser as daemon_parser  # noqa: E402

VERSION = "0.1.0"
TITLE = "vhost-user-qcow2 manual"
PROGRAMS = {
    "vhost-user-qcow2": (daemon_parser, "serve a disk image to a virtual machine over vhost-user"),
    "qcow2": (qcow2_parser, "create, inspect and repair qcow2 images"),
}


def page(parser: argparse.ArgumentParser, caption: str) -> str:
    """The man page of a program."""
    parser.man_short_description = caption  # type: ignore[attr-defined]
    return str(Manpage(parser, {"manual_title": TITLE, "project_name": parser.prog, "version": VERSION}))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def generate(target: Path, bindir: str) -> None:
    """Write everything below *target*."""
    for name, (parser, caption) in PROGRAMS.items():
        write(target / "share/man/man1" / f"{name}.1", page(parser(), caption))
        completion = shtab.complete(parser(), shell="bash")
        write(target / "share/bash-completion/completions" / name, completion)
    for source, directory in {
        "50-vhost-user-qcow2.json.in": "share/qemu/vhost-user",
        "vhost-user-qcow2@.service.in": "lib/systemd/system",
        "vhost-user-qcow2@.socket": "lib/systemd/system",
    }.items():
        text = (HERE / source).read_text().replace("@bindir@", bindir)
        write(target / directory / source.removesuffix(".in"), text)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("directory", type=Path)
    options.add_argument("--bindir", default="/usr/local/bin")
    given = options.parse_args()
    os.environ.setdefault("COLUMNS", "100")
    generate(given.directory, given.bindir)
