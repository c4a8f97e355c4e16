"""Names that QEMU writes as `json:{...}`: a file, and how that is to be opened."""

import os
from collections.abc import Iterator
from typing import Any

PREFIX = "json:"
PATH_KEYS = ("file.filename", "filename")
HOST_DRIVERS = ("file", "host_device")
TUNING = frozenset(  # what a disk holds does not depend on it
    (
        "aio",
        "auto-read-only",
        "cache-clean-interval",
        "cache-size",
        "detect-zeroes",
        "discard",
        "drop-cache",
        "l2-cache-entry-size",
        "l2-cache-size",
        "lazy-refcounts",
        "locking",
        "node-name",
        "overlap-check",
        "pass-discard-other",
        "pass-discard-request",
        "pass-discard-snapshot",
        "read-only",
        "refcount-cache-size",
    )
)


def options_of(text: str) -> dict[str, str]:
    """What the name *text*, which begins with PREFIX, says, by dotted keys. Raises: ValueError, saying why."""
    import json

    try:
        words = text.removeprefix(PREFIX)
        found = json.loads(words if '"' in words else words.replace("'", '"'))  # QEMU takes both quotes
        said = dict(_flat(found)) if isinstance(found, dict) else None
    except ValueError as error:
        raise ValueError(f"Could not parse the JSON options: {error}") from error
    except RecursionError as error:
        raise ValueError("Could not parse the JSON options: too deep") from error
    if said is None:
        raise ValueError("Invalid JSON object given")
    return said


def _flat(facts: dict[str, Any], lead: str = "") -> Iterator[tuple[str, str]]:
    import json

    for key, value in facts.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{lead}{key}.")
        else:
            yield f"{lead}{key}", value if isinstance(value, str) else json.dumps(value)


def is_tuning(key: str) -> bool:
    """Whether *key* says nothing of what a disk holds."""
    own = key.removeprefix("file.")
    return own in TUNING or own.startswith("cache.") or key == "file.driver"


def _is_encodable(path: str) -> bool:
    try:
        os.fsencode(path)
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    return True


def file_of(text: str, formats: tuple[str, ...]) -> str:
    """The path in a name that says no more than a file, in one of *formats*. Raises: ValueError, saying what else."""
    said = options_of(text)
    path = next((said.pop(key) for key in PATH_KEYS if key in said), None)
    if not path or "\0" in path or not _is_encodable(path):
        raise ValueError("without a filename")
    drivers = said.pop("driver", "file"), said.get("file.driver", "file")
    if drivers[0] not in (*HOST_DRIVERS, *formats) or drivers[1] not in HOST_DRIVERS:
        raise ValueError(f"with driver {drivers}")
    for key in said:
        if not is_tuning(key):
            raise ValueError(f"with {key!r}")
    return path
