"""Build the cffi extensions: one C wrapper generated from each `.cdef`, compiled with its sources.

``python -m ring.build --asan`` compiles the same sources, without Python, into each program of `tests/c`, and into the
replay of the ring fuzzer's corpus, with the address and undefined behaviour sanitizers, and runs them; ``--tsan`` the
programs of `tests/c` with the thread sanitizer.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
SANITIZERS = {
    "--asan": [
        "-Werror",
        "-DASSERTIONS",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
    ],
    "--tsan": ["-Werror", "-fsanitize=thread", "-fno-omit-frame-pointer", "-Wno-tsan"],  # it warns of fences
}
SOURCES = ("*/*.h", "*/*.c", "*/*.cdef", "*/plane/*.h", "*/plane/*.c")
FUZZ = ROOT / "tests" / "fuzz"
DRIVER_SIDE = ("bench/driver.c", "bench/driver_packed.c", "bench/identity.c")  # for tests and load alone


def expanded(cdef: str, read: Callable[[str], str]) -> str:
    """The declarations *cdef*, with those of the headers that it includes, which *read* gives, in their places."""
    return re.sub(r'#include "(.+)"\n', lambda found: re.sub("(?m)^#.*\n", "", read(found[1])), cdef)


def emit_wrapper(module: str, target: Path) -> None:
    """Write the C file that exposes the declarations of `room/name.cdef`, for the *module* `room._name`.

    What it includes is `room/name.h`. It says which sources it was made of, too: `qcow2.sources` compares.
    """
    room, _, name = module.partition("._")
    # Read as a file: nothing of ours can be imported before it is built.
    fingerprint = runpy.run_path(str(ROOT / "qcow2" / "sources.py"))["fingerprint"]()
    ffi = FFI()
    cdef = expanded((ROOT / room / f"{name}.cdef").read_text(), lambda header: (ROOT / header).read_text())
    ffi.cdef(cdef + "\n#define NATIVE_SOURCES ...\n")
    ffi.set_source(module, f'#define NATIVE_SOURCES {fingerprint}\n#include "{room}/{name}.h"')
    target.parent.mkdir(parents=True, exist_ok=True)
    ffi.emit_c_code(str(target))


class BuildNative(build_ext):
    """build_ext that generates the cffi wrapper of each extension before compiling it, a processor for each file."""

    def build_extensions(self) -> None:
        compile_all = self.compiler.compile
        with ThreadPoolExecutor(os.cpu_count()) as pool:

            def compile_each(sources: list[str], **options: Any) -> list[str]:
                return [made for each in pool.map(lambda one: compile_all([one], **options), sources) for made in each]

            self.compiler.compile = compile_each
            super().build_extensions()

    def build_extension(self, ext: Any) -> None:
        wrapper = Path(self.build_temp) / f"{ext.name}.c"
        emit_wrapper(ext.name, wrapper)
        ext.sources = [str(wrapper), *ext.sources]
        ext.include_dirs = [str(ROOT), *ext.include_dirs]
        ext.extra_compile_args = [*FLAGS, *os.environ.get("NATIVE_CFLAGS", "").split(), *ext.extra_compile_args]
        ext.depends = [
            str(path) for pattern in ("*/*.h", "*/*.c", "*/*.cdef", "*/*/*.h", "*/*/*.c") for path in ROOT.glob(pattern)
        ]
        super().build_extension(ext)


def native_sources() -> list[str]:
    """List the C sources of all extensions, as `pyproject.toml` does, and of the driver's side, which drives them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return [source for ext in project["tool"]["setuptools"]["ext-modules"] for source in ext["sources"]] + [
        *DRIVER_SIDE
    ]


def run_sanitized(directory: Path, option: str) -> None:
    """Compile what *option* names with its sanitizers into *directory* and run it.

    Raises: CalledProcessError if a program does not compile or does not succeed.
    """
    compile_command = [os.environ.get("CC", "gcc"), *FLAGS, *SANITIZERS[option], f"-I{ROOT}"]
    objects: list[str] = []
    for source in native_sources():
        objects.append(str(directory / f"{source.replace('/', '_')}.o"))
        subprocess.run([*compile_command, "-c", source, "-o", objects[-1]], cwd=ROOT, check=True)
    for program in sorted((ROOT / "tests" / "c").glob("*.c")):
        _run_program([*compile_command, str(program), *objects], directory / program.stem)
    if option == "--asan":
        replay = [str(FUZZ / "replay.c"), str(FUZZ / "ring.c")]
        _run_program([*compile_command, *replay, *objects], directory / "replay", str(FUZZ / "corpus" / "ring.hex"))


def _run_program(compile_command: list[str], binary: Path, *arguments: str) -> None:
    print(binary.name, flush=True)
    libraries = ["-luring", "-ldeflate", "-lcrypto", "-pthread"]
    subprocess.run([*compile_command, *libraries, "-o", str(binary)], cwd=ROOT, check=True)
    suppressions = f"suppressions={ROOT / 'tests' / 'c' / 'tsan.supp'}"
    environment = {**os.environ, "TSAN_OPTIONS": f"{suppressions}:halt_on_error=1"}
    subprocess.run([str(binary), *arguments], check=True, timeout=300, env=environment)


def main(arguments: list[str]) -> int:
    """Run the sanitized programs; the exit status of the process."""
    if len(arguments) != 1 or arguments[0] not in SANITIZERS:
        print(f"usage: python -m ring.build {'|'.join(SANITIZERS)}", file=sys.stderr)
        return 2
    if shutil.which(os.environ.get("CC", "gcc")) is None:
        print("no C compiler found: install gcc", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="sanitized-") as directory:
        try:
            run_sanitized(Path(directory), arguments[0])
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
