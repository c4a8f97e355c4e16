"""Programs of this host."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

# A child started through this dies with us, also when we are killed.
LEASH = ("setpriv", "--pdeathsig", "KILL")


class Failure(Exception):
    """Something around us is not as it must be; the message is for people."""


class MissingProgram(Failure):
    """The host lacks a program; the message names it and the Debian package that brings it."""


def find_program(name: str, package: str) -> Path:
    """Find *name* on PATH or where Debian keeps administrators' programs."""
    path = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if path is None:
        raise MissingProgram(f"{name} not found: install the package {package}")
    return Path(path)


def installed_program(name: str) -> Path:
    """Find a program of this project in the Python environment that runs us."""
    path = Path(sysconfig.get_path("scripts"), name)
    if not path.exists():
        raise MissingProgram(f"{path} not found: install this project into the environment of {sys.executable}")
    return path
