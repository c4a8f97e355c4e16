"""The data plane over the simulated host: variants of both extensions, compiled outside of the product.

A variant is a list of edits to the C sources, each a text that must be there once and what replaces it: a mutant, or
an instrument that the product does not carry. Objects are kept by the hash of all that goes into them.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from cffi import FFI

from ring.build import DRIVER_SIDE, FLAGS, expanded

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = ROOT / ".cache" / "sim"
REPLACED = {"ring/host.c", "ring/storage.c", "ring/uring.c", "ring/threads.c"}
LIBRARIES = {"ring": [], "qcow2": ["-ldeflate"]}


class Edit(NamedTuple):
    """In *file*, *old*, which is there once, becomes *new*."""

    file: str
    old: str
    new: str


STORED = """    __atomic_store_n(shared, value, __ATOMIC_RELEASE);
"""
INSTRUMENTS = [  # a death strikes between any two stores to rings and in-flight regions
    Edit(
        "ring/shared.h",
        f"static inline void shared_store_release{width}({kind} *shared, {kind} value)\n{{\n{STORED}}}",
        f"void host_point(void);\nstatic inline void shared_store_release{width}({kind} *shared, {kind} value)\n"
        f"{{\n    host_point();\n{STORED}    host_point();\n}}",
    )
    for width, kind in ((8, "uint8_t"), (16, "uint16_t"), (64, "uint64_t"))
]


def build(edits: Iterable[Edit] = ()) -> dict[str, Path]:
    """Compile both extensions with *edits* -> module name to file.

    Raises: ValueError if an edit does not apply; CalledProcessError.
    """
    sources = _edited([*INSTRUMENTS, *edits])
    key = _hash(*(text for _, text in sorted(sources.items())))
    place = CACHE / key
    modules = {f"{room}._native": place / f"{room}_native.so" for room in LIBRARIES}
    if not all(path.exists() for path in modules.values()):
        _write(place / "include", sources)
        for room, path in ((name.partition(".")[0], path) for name, path in modules.items()):
            _link(room, sources, place, path)
    for path in modules.values():
        os.utime(path)  # it is of these sources, whenever they were touched: `qcow2.sources` goes by times
    return modules


def load(edits: Iterable[Edit] = ()) -> None:
    """Let `ring.native` and `qcow2.native`, which nobody has imported yet, find the variant."""
    for name, path in build(edits).items():
        if name in sys.modules:
            raise RuntimeError(f"{name} is imported already: a variant needs a process of its own")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)


def _edited(edits: Iterable[Edit]) -> dict[str, str]:
    names = [path.relative_to(ROOT) for room in ("ring", "virtio", "qcow2") for path in (ROOT / room).rglob("*.[ch]")]
    names += [Path("tests/sim/host.c"), Path("tests/sim/host.h"), *map(Path, DRIVER_SIDE)]
    names += [path.relative_to(ROOT) for path in (ROOT / "bench").glob("*.h")]
    names += [Path(f"{place}/native.cdef") for place in (*LIBRARIES, "tests/sim", "bench")]
    sources = {str(name): (ROOT / name).read_text() for name in names}
    for file, old, new in edits:
        if sources[file].count(old) != 1:
            raise ValueError(f"{file}: an edit's text is there {sources[file].count(old)} times: {old!r}")
        sources[file] = sources[file].replace(old, new)
    return sources


def _write(directory: Path, sources: dict[str, str]) -> None:
    for name, text in sources.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        put(path, text)


def put(path: Path, text: str) -> None:
    """Bring *text* to *path* as a whole: a compiler of another process may be reading what is there."""
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(text)
    partial.rename(path)


def _link(room: str, sources: dict[str, str], place: Path, target: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extensions = project["tool"]["setuptools"]["ext-modules"]
    listed = next(one["sources"] for one in extensions if one["name"] == f"{room}._native")
    files = [name for name in listed if name not in REPLACED]
    if room == "ring":
        files += ["tests/sim/host.c", *DRIVER_SIDE]
    headers = _hash(*(text for name, text in sorted(sources.items()) if name.endswith(".h")))
    wrapper = _wrapper(room, sources)
    jobs = [(name, sources[name]) for name in files] + [(f"{room}_native.c", wrapper)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: _object(*job, headers, place / "include"), jobs))
    partial = target.with_suffix(f".{os.getpid()}")
    subprocess.run([_cc(), "-shared", *map(str, objects), *LIBRARIES[room], "-o", str(partial)], check=True)
    partial.rename(target)


def _object(name: str, text: str, headers: str, include: Path) -> Path:
    path = CACHE / "objects" / f"{_hash(name, text, headers)}.o"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    source = include / name
    put(source, text)
    partial = path.with_suffix(f".{os.getpid()}")
    includes = [f"-I{include}", f"-I{sysconfig.get_path('include')}"]
    flags = [*FLAGS, "-g0", "-O1", "-fPIC", "-Wno-unused", "-DASSERTIONS"]
    command = [_cc(), *flags, *includes, "-c", str(source), "-o", str(partial)]
    subprocess.run(command, check=True)
    partial.rename(path)
    return path


def _wrapper(room: str, sources: dict[str, str]) -> str:
    ffi = FFI()
    declarations = sources[f"{room}/native.cdef"]
    includes = f'#include "{room}/native.h"'
    if room == "ring":
        declarations += sources["tests/sim/native.cdef"] + _driver_side(sources["bench/native.cdef"])
        includes += '\n#include "tests/sim/host.h"\n#include "bench/driver.h"\n#include "bench/identity.h"'
    ffi.cdef(expanded(declarations, sources.__getitem__))
    ffi.set_source(f"{room}._native", includes)
    path = CACHE / f"wrapper-{room}-{os.getpid()}.c"
    path.parent.mkdir(parents=True, exist_ok=True)
    ffi.emit_c_code(str(path))
    text = path.read_text()
    path.unlink()
    return text


def _driver_side(declarations: str) -> str:
    return declarations.partition("/* driver.h,")[2].partition("*/")[2].partition("/* load.h */")[0]


def _cc() -> str:
    return os.environ.get("CC", "gcc")


def _hash(*texts: str) -> str:
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=12).hexdigest()
