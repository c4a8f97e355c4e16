"""Build the cffi extensions: one C wrapper generated from each room's `native.cdef`, compiled with its sources.

``python -m ring.build --asan`` compiles the same sources, without Python, into each program of `tests/c` with the
address and undefined behaviour sanitizers, and runs it.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from cffi import FFI
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [
    "-std=gnu11",
    "-D_GNU_SOURCE",
    "-O2",
    "-g",
    "-Wall",
    "-Wextra",
    "-Wshadow",
    "-Wno-unused-parameter",
    "-fno-strict-aliasing",
]
SANITIZERS = [
    "-Werror",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
]


def emit_wrapper(module: str, target: Path) -> None:
    """Write the C file that exposes *module*'s `native.cdef` (declarations) over `native.h` (what it includes)."""
    room = module.partition(".")[0]
    ffi = FFI()
    ffi.cdef((ROOT / room / "native.cdef").read_text())
    ffi.set_source(module, f'#include "{room}/native.h"')
    target.parent.mkdir(parents=True, exist_ok=True)
    ffi.emit_c_code(str(target))


class BuildNative(build_ext):
    """build_ext that generates the cffi wrapper of each extension before compiling it."""

    def build_extension(self, ext: Any) -> None:
        wrapper = Path(self.build_temp) / f"{ext.name}.c"
        emit_wrapper(ext.name, wrapper)
        ext.sources = [str(wrapper), *ext.sources]
        ext.include_dirs = [str(ROOT), *ext.include_dirs]
        ext.extra_compile_args = [*FLAGS, *os.environ.get("NATIVE_CFLAGS", "").split(), *ext.extra_compile_args]
        ext.depends = [str(path) for pattern in ("*/*.h", "*/*.c", "*/*.cdef") for path in ROOT.glob(pattern)]
        super().build_extension(ext)


def native_sources() -> list[str]:
    """List the C sources of all extensions, as `pyproject.toml` does."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return [source for ext in project["tool"]["setuptools"]["ext-modules"] for source in ext["sources"]]


def run_sanitized(directory: Path) -> None:
    """Compile every program of `tests/c` with the sanitizers into *directory* and run it.

    Raises: CalledProcessError if one does not compile or does not succeed.
    """
    compiler = os.environ.get("CC", "gcc")
    objects: list[str] = []
    for source in native_sources():
        objects.append(str(directory / f"{source.replace('/', '_')}.o"))
        subprocess.run([compiler, *FLAGS, *SANITIZERS, "-I.", "-c", source, "-o", objects[-1]], cwd=ROOT, check=True)
    for program in sorted((ROOT / "tests" / "c").glob("*.c")):
        binary = str(directory / program.stem)
        print(f"{program.relative_to(ROOT)}", flush=True)
        build = [
            compiler,
            *FLAGS,
            *SANITIZERS,
            "-I.",
            str(program),
            *objects,
            "-luring",
            "-ldeflate",
            "-pthread",
            "-o",
            binary,
        ]
        subprocess.run(build, cwd=ROOT, check=True)
        subprocess.run([binary], check=True, timeout=300)


def main(arguments: list[str]) -> int:
    """Run the sanitized programs; the exit status of the process."""
    if arguments != ["--asan"]:
        print("usage: python -m ring.build --asan", file=sys.stderr)
        return 2
    if shutil.which(os.environ.get("CC", "gcc")) is None:
        print("no C compiler found: install gcc", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="asan-") as directory:
        try:
            run_sanitized(Path(directory))
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
