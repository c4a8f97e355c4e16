"""Write what a system wants beside the programs: man pages, bash completion, systemd units, QEMU's discovery file.

``python share/generate.py DIRECTORY --bindir=/usr/bin``: into DIRECTORY, laid out as under /usr. Pages and completion
come from the programs' own argparse parsers, by argparse-manpage and shtab.
"""

import argparse
import os
import sys
from importlib.metadata import version
from pathlib import Path

import shtab
from argparse_manpage.manpage import Manpage

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from qcow2.tool.command import build_parser as qcow2_parser  # noqa: E402 - after the path
from vhost.option import whole_parser as daemon_parser  # noqa: E402

TITLE = "vhost-user-qcow2 manual"
PROGRAMS = {
    "vhost-user-qcow2": (daemon_parser, "serve a disk image to a virtual machine over vhost-user"),
    "qcow2": (qcow2_parser, "create, inspect and repair qcow2 images"),
}
FILES = {"PATH", "IMAGE", "FILE"}  # metavars of what is a file; no parser completes those of another kind
FILE_NAMES = {"filename", "backing_file", "image", "path"}  # the same of arguments without a metavar
WRAPPER = r"""
# Bash splits "--option=value" into three words; the function above knows two.
# Nor does it know quoted words: without an answer of ours readline completes them, as names of files.
_whole{function}() {{
  COMPREPLY=()
  [[ "${{COMP_WORDS[COMP_CWORD]}}" != *[\\\"\']* ]] || return 0
  local -a words=()
  local index last=$COMP_CWORD count=0
  for index in "${{!COMP_WORDS[@]}}"; do
    (( index == last )) && count=${{#words[@]}}
    if [[ "${{COMP_WORDS[index]}}" != "=" ]]; then
      words+=("${{COMP_WORDS[index]}}")
    elif (( index == last )); then
      words+=("")
    fi
  done
  local -a COMP_WORDS=("${{words[@]}}")
  local COMP_CWORD=$count
  {function} "$1" "${{words[count]}}" "${{words[count - 1]}}"
}}
complete -o bashdefault -o default -F _whole{function} {program}
"""


def page(parser: argparse.ArgumentParser, caption: str) -> str:
    """The man page of a program."""
    parser.man_short_description = caption  # type: ignore[attr-defined]
    return str(
        Manpage(parser, {"manual_title": TITLE, "project_name": parser.prog, "version": version("vhost-user-qcow2")})
    )


def completion(program: str, parser: argparse.ArgumentParser) -> str:
    """Bash completion of options, choices and the names of files."""
    _complete_files(parser)
    function = "_shtab_" + program.replace("-", "_")
    generated = shtab.complete(parser, shell="bash")
    if f"{function}()" not in generated:
        raise SystemExit(f"shtab gives {program} no function {function}")
    return generated + WRAPPER.format(function=function, program=program)


def _complete_files(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_files(command)
        elif action.metavar == "DIR":
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.metavar in FILES or (action.nargs != 0 and action.metavar is None and action.dest in FILE_NAMES):
            action.complete = shtab.FILE  # type: ignore[attr-defined]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def generate(target: Path, *, bindir: str, units: Path, discovery: Path) -> None:
    """Write everything below *target*, units and discovery file into their own directories."""
    for name, (parser, caption) in PROGRAMS.items():
        write(target / "share/man/man1" / f"{name}.1", page(parser(), caption))
        write(target / "share/bash-completion/completions" / name, completion(name, parser()))
    for source, directory in {
        "50-vhost-user-qcow2.json.in": discovery,
        "vhost-user-qcow2@.service.in": units,
        "vhost-user-qcow2@.socket": units,
    }.items():
        text = (HERE / source).read_text().replace("@bindir@", bindir)
        write(directory / source.removesuffix(".in"), text)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("directory", type=Path)
    options.add_argument("--bindir", default="/usr/local/bin")
    options.add_argument("--units", type=Path, help="directory of the systemd units")
    options.add_argument("--discovery", type=Path, help="directory of QEMU's discovery file")
    given = options.parse_args()
    os.environ.setdefault("COLUMNS", "100")
    generate(
        given.directory,
        bindir=given.bindir,
        units=given.units or given.directory / "lib/systemd/system",
        discovery=given.discovery or given.directory / "share/qemu/vhost-user",
    )
