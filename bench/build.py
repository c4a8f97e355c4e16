"""Compile the driver's side and the load generator when they are older than their sources.

They are no part of the installed product.
"""

import contextlib
import io
import shlex
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from ring.build import DRIVER_SIDE, FLAGS, emit_wrapper

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (*DRIVER_SIDE, "bench/content.c", "bench/load.c", "bench/pattern.c")
READ_BY_THE_COMPILER = ("bench/*.[ch]", "bench/native.cdef", "ring/*.h", "bench/build.py")


def build() -> None:
    """Bring `bench._native` up to date. Raises: CalledProcessError, with the compiler's complaint on stderr."""
    target = ROOT / f"bench/_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    if target.exists() and target.stat().st_mtime >= _newest_source():
        return
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as directory:
        wrapper, library = Path(directory, "native.c"), Path(directory, "native.so")
        with contextlib.redirect_stdout(io.StringIO()):  # cffi tells what it does; stdout is for results
            emit_wrapper("bench._native", wrapper)
        compiler = shlex.split(sysconfig.get_config_var("CC"))
        includes = [f"-I{ROOT}", f"-I{sysconfig.get_path('include')}"]
        command = [*compiler, "-shared", "-fPIC", *FLAGS, *includes, str(wrapper), *SOURCES, "-o", str(library)]
        subprocess.run(command, cwd=ROOT, check=True)
        library.replace(target)


def _newest_source() -> float:
    return max(path.stat().st_mtime for pattern in READ_BY_THE_COMPILER for path in ROOT.glob(pattern))
