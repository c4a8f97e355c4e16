"""Imports and C includes go one way: vhost -> virtio -> ring, and qcow2 knows none of the three."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.patience import TIMEOUT

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("ring", "virtio", "vhost", "qcow2")
MAY_IMPORT = {
    "ring": {"ring"},
    "virtio": {"virtio", "ring"},
    "vhost": {"vhost", "virtio", "ring"},
    "qcow2": {"qcow2"},
}
GLUE = {  # where an image meets a device
    "vhost/disk.py",
    "vhost/ringdriver.py",
    "vhost/held.py",
    "vhost/heldfiles.py",
    "vhost/leftcopies.py",
    "vhost/direct.py",
    "vhost/past.py",
    "vhost/snapshot.py",
    "vhost/job.py",
    "vhost/jobs.py",
    "vhost/jobthread.py",
    "vhost/beside.py",
    "vhost/frozen.py",
    "vhost/backup.py",
    "vhost/backuptarget.py",
    "vhost/backupexport.py",
    "vhost/exportline.py",
    "vhost/mirrorcopy.py",
    "vhost/streaming.py",
    "vhost/committing.py",
    "vhost/mirroring.py",
    "vhost/problem.py",
    "vhost/servedchain.py",
    "vhost/imagecommands.py",
    "vhost/jobcommands.py",
    "vhost/bitmapaction.py",
    "vhost/overlaybitmaps.py",
    "vhost/overlaywish.py",
    "vhost/argument.py",
    "vhost/command.py",
}
# The seam between a device and an image; what both rely on; what a signal is to who waits for one.
NEUTRAL = {"ring/extent.h", "ring/assertion.h", "ring/stop.h"}
COMPOSITION = {"ring/native.h"}  # what the extension's wrapper includes: all of the data plane
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def python_arrows() -> Iterator[tuple[str, str]]:
    """Yield (file, imported room) for each import, also those inside functions."""
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or room] if isinstance(node, ast.ImportFrom) else []
                yield from ((str(path.relative_to(ROOT)), name.partition(".")[0]) for name in names)


def c_arrows() -> Iterator[tuple[str, str]]:
    """Yield (file, included file) for each include of our own."""
    for room in ROOMS:
        for path in sorted([*(ROOT / room).rglob("*.c"), *(ROOT / room).rglob("*.h")]):
            for included in INCLUDE.findall(path.read_text()):
                near = (path.parent / included).resolve()
                target = near if near.exists() else ROOT / included
                yield str(path.relative_to(ROOT)), str(target.relative_to(ROOT))


def room_of(path: str) -> str:
    return path.partition("/")[0]


def test_python_imports_follow_the_arrows() -> None:
    wrong = {
        (path, room)
        for path, room in python_arrows()
        if room in ROOMS and room not in MAY_IMPORT[room_of(path)] and (path, room) not in {(g, "qcow2") for g in GLUE}
    }
    assert wrong == set()


# Of qcow2, highest first; imports go down, and C is included by no floor but its own.
FLOORS = ("tool", "library", "job", "nbd", "node", "engine", "judge", "plane", "format", "driver")
ROOTS = {
    "qcow2/error.py",
    "qcow2/lock.py",
    "qcow2/native.py",
    "qcow2/sources.py",
    "qcow2/_native.pyi",
    "qcow2/_cipher.pyi",
}  # below floors
DOORS = {"qcow2/__init__.py"}  # above the library


def floor_of(module: str) -> int:
    """Floor of a module of qcow2, 0 the highest; errors and the typed face of the C are below all of them."""
    floor = module.split(".")[1] if "." in module else "library"
    return FLOORS.index(floor) if floor in FLOORS else len(FLOORS)


def test_imports_within_qcow2_go_down() -> None:
    wrong = []
    for path in sorted((ROOT / "qcow2").rglob("*.py")):
        if str(path.relative_to(ROOT)) in DOORS:
            continue
        own = floor_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                whole = node.module == "qcow2"
                names += [f"qcow2.{alias.name}" for alias in node.names] if whole else [str(node.module)]
            wrong += [(path.name, name) for name in names if name.partition(".")[0] == "qcow2" and floor_of(name) < own]
    assert wrong == []


NO_HOST = ("job", "engine", "judge", "plane", "format")
HOST = re.compile(r"qcow2\.driver\.(file|memory|pool|shared)\b")


def test_who_decides_knows_no_host_file() -> None:
    """A file is a key there: who opens, locks and registers one is above, who moves its bytes in `driver`."""
    paths = [path for floor in NO_HOST for path in sorted((ROOT / "qcow2" / floor).glob("*.py"))]
    assert [path.name for path in paths if HOST.search(path.read_text())] == []


def test_each_module_of_qcow2_is_on_a_floor() -> None:
    outside = {str(path.relative_to(ROOT)) for path in (ROOT / "qcow2").glob("*.py*")}
    assert outside == ROOTS | DOORS
    assert {path.parent.name for path in (ROOT / "qcow2").glob("*/*.py")} == set(FLOORS)


def test_c_includes_follow_the_arrows() -> None:
    wrong = {
        (path, included)
        for path, included in c_arrows()
        if room_of(included) not in MAY_IMPORT[room_of(path)] and included not in NEUTRAL and path not in COMPOSITION
    }
    assert wrong == set()


def test_included_files_exist() -> None:
    assert {included for _, included in c_arrows() if not (ROOT / included).exists()} == set()


@pytest.mark.parametrize("package", ["asyncio", "numpy", "bench"])
def test_nobody_imports(package: str) -> None:
    assert {path for path, room in python_arrows() if room == package} == set()


HEAVY = ("zstandard", "_cffi_backend", "cffi", "ring._native", "qcow2._native", "concurrent.futures")


def test_printing_capabilities_loads_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from vhost.command import main\n"
        "status = main(['--print-capabilities'])\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "sys.exit(f'loaded {loaded}' if loaded or status else 0)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("command", ["check", "info"])
def test_what_only_looks_does_without_the_engine(command: str) -> None:
    """Which takes as long to load as all the rest."""
    program = (
        f"import sys, qcow2.tool.{command}\n"
        "loaded = [name for name in sys.modules if name.startswith('qcow2.engine')]\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert run.returncode == 0, run.stderr
