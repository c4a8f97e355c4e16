"""Opening image files for the tool: locked, unless the user says that sharing is fine."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qcow2.driver.file import HostFile
from qcow2.driver.memory import DEFAULT_DIRECTORY
from qcow2.library.hostfile import opened


def add_log_options(parser: argparse.ArgumentParser) -> None:
    """Declare what a command that writes to an image needs to know of its link log."""
    parser.add_argument(
        "--link-log",
        metavar="DIR",
        default=DEFAULT_DIRECTORY,
        help=f"where a killed daemon left the log of what was not flushed (default: {DEFAULT_DIRECTORY})",
    )
    parser.add_argument(
        "--discard-link-log", action="store_true", help="lose what is in a log that is missing or does not count"
    )


def log_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `add_log_options` was told, as whoever opens an image takes it."""
    return {"log_directory": arguments.link_log, "discard_log": arguments.discard_link_log}


def how_to_open(arguments: argparse.Namespace) -> dict[str, Any]:
    """The same, and the keys that were given."""
    return {**log_of(arguments), "key": arguments.keys}


@contextmanager
def recovered(path: str, arguments: argparse.Namespace) -> Iterator[HostFile]:
    """The image file at *path*, locked for writing, with what a killed daemon left in its link log brought in.

    Raises: OSError, ImageError.
    """
    from qcow2.node.recovery import open_data_file, recover  # and with it the engine

    with opened(path, writable=True) as file, open_data_file(file) as data_file:
        recover(file, arguments.link_log, discard=arguments.discard_link_log, data_file=data_file)
        yield file


ORDER = (  # of the keys in what qemu-img prints
    "limits write-zeroes-alignment request-alignment min-mem-alignment discard-alignment opt-mem-alignment max-iov "
    "image-end-offset compressed-clusters total-clusters corruptions corruptions-fixed check-errors leaks leaks-fixed "
    "allocated-clusters backing-filename-format snapshots virtual-size icount vm-clock-nsec flags name granularity "
    "date-sec date-nsec vm-clock-sec id vm-state-size filename cluster-size encrypted format actual-size type "
    "format-specific data compat compression-type lazy-refcounts bitmaps refcount-bits encrypt data-file data-file-raw "
    "corrupt extended-l2 required fully-allocated full-backing-filename backing-filename dirty-flag fragmented-clusters"
)
RANKS = {key: rank for rank, key in enumerate(ORDER.split())}


def print_json(facts: Any) -> None:
    """Print *facts* as JSON; what is no text in a name becomes U+FFFD there, as with qemu-img."""
    import json

    print(json.dumps(as_texts(facts), indent=4))


def as_texts(facts: Any) -> Any:
    """*facts* with names that JSON can hold, in qemu-img's order."""
    match facts:
        case str():
            return facts.encode(errors="surrogateescape").decode(errors="replace")
        case list():
            return [as_texts(each) for each in facts]
        case dict():
            return {key: as_texts(value) for key, value in ordered(facts).items()}
        case _:
            return facts


def ordered(facts: dict[str, Any]) -> dict[str, Any]:
    """*facts* in qemu-img's order."""
    return dict(sorted(facts.items(), key=lambda each: RANKS.get(each[0], len(RANKS))))
