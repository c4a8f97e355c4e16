"""Build the cffi extensions: one C wrapper generated from each room's `native.cdef`, compiled with its sources."""

import os
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
        room = ROOT / ext.name.partition(".")[0]
        ext.depends = [str(path) for pattern in ("*.h", "*.c", "*.cdef") for path in room.glob(pattern)]
        super().build_extension(ext)
