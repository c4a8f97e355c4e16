"""The C that the extensions are compiled from; in a source tree an extension may be older than it.

Python of today over C of yesterday hangs or worse: each waits for what the other does not say.
"""

import os
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ROOMS = ("ring", "virtio", "qcow2", "qcow2/plane")
KINDS = (".c", ".h", ".cdef")


class StaleExtension(ImportError):
    """An extension was compiled from other sources; the text says so in one line, and what to run."""


def require_current(module: Any) -> None:
    """Return if the extension *module* fits the C beside it, or there is none: what is installed comes as a whole.

    Times are looked at, which costs 0.1 ms; the sources are read only if one is younger than *module*.
    Raises: StaleExtension.
    """
    if not os.path.exists(os.path.join(ROOT, "pyproject.toml")):
        return
    sources = _sources()
    built = os.stat(module.__file__).st_mtime_ns
    if any(changed > built for _, changed in sources) and getattr(module.lib, "NATIVE_SOURCES", None) != fingerprint():
        raise StaleExtension(f"{module.__file__} was compiled from other sources: run make .venv/installed")


def fingerprint() -> int:
    """Of the names and the content of all sources, 63 bits."""
    from hashlib import sha256

    digest = sha256()
    for path, _ in sorted(_sources()):
        with open(path, "rb") as file:
            digest.update(os.path.relpath(path, ROOT).encode() + b"\0" + file.read() + b"\0")
    return int.from_bytes(digest.digest()[:8], "big") >> 1


def _sources() -> list[tuple[str, int]]:
    """Each file of C, and when it was changed, ns."""
    entries = (entry for room in ROOMS for entry in os.scandir(os.path.join(ROOT, room)))
    return [(entry.path, entry.stat().st_mtime_ns) for entry in entries if entry.name.endswith(KINDS)]
