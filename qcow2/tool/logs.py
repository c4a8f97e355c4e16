"""`qcow2 link-logs`: which link logs lie on this host, what waits in them, and away with those that nobody needs."""

import argparse
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from qcow2.driver.boot import this_boot
from qcow2.driver.file import HostFile, run
from qcow2.driver.memory import DEFAULT_DIRECTORY, SharedMemory, is_in_use
from qcow2.error import ImageError
from qcow2.format.header import Header, read_header
from qcow2.node.gate import backing_path
from qcow2.node.logplace import NAME, all_logs, origin_of, remove_log
from qcow2.plane.linklog import MAX_LOG_BYTES, FoundLog, Mark
from qcow2.plane.logglance import glance
from qcow2.tool.failure import UsageError
from qcow2.tool.file import print_json
from qcow2.tool.identity import say


@dataclass(frozen=True, slots=True)
class LogFacts:
    """One log, as it is said."""

    tag: str
    path: str
    image: str  # what it was made for; it may have been moved since
    waiting: int  # links, each of a cluster that was written and never flushed
    state: (
        str  # "in use"; "needed": its image names it; "stale": that does not, or the host was started anew; "unknown"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `qcow2 link-logs`."""
    parser.add_argument("--link-log", metavar="DIR", default=DEFAULT_DIRECTORY, help=f"default: {DEFAULT_DIRECTORY}")
    parser.add_argument("--output", choices=["human", "json"], help="of the list; default: human")
    parser.add_argument("--remove", metavar="TAG", action="append", default=[], help="remove this log for good")
    parser.add_argument("--clean", action="store_true", help="remove all that are stale")


def run_command(arguments: argparse.Namespace) -> int:
    """List the logs, or remove some; 1 if one cannot be read.

    Raises: UsageError, ValueError for a tag that is not there or is in use, OSError.
    """
    if arguments.remove and (arguments.clean or arguments.output is not None):
        raise UsageError(f"--remove and {'--clean' if arguments.clean else '--output'} are mutually exclusive")
    logs = {os.path.basename(memory.path).removeprefix(NAME): memory for memory in all_logs(arguments.link_log)}
    for tag in arguments.remove:
        _remove(tag, logs, arguments.link_log)
    if arguments.remove:
        return 0
    facts, status = [], 0
    is_json = arguments.output == "json"
    for tag, memory in logs.items():
        try:
            fact = _facts_of(tag, memory)
            if arguments.clean and fact.state == "stale":
                remove_log(memory)
                continue
        except FileNotFoundError:  # gone since it was listed
            continue
        except OSError as error:
            say(f"{memory.path}: {error.strerror}")
            status = 1
            continue
        if is_json:
            facts.append(fact)
        else:
            print(f"{tag}  {fact.state:8}  {fact.waiting:6} waiting  {fact.image}", flush=True)
    if is_json:
        print_json([asdict(each) for each in facts])
    return status


def _remove(tag: str, logs: dict[str, SharedMemory], directory: str) -> None:
    try:
        is_used = is_in_use(logs[tag].path)
    except (KeyError, FileNotFoundError):
        raise ValueError(f"no link log {tag} in {directory}") from None
    if is_used:
        raise ValueError(f"link log {tag} is in use")
    remove_log(logs[tag])


def _facts_of(tag: str, memory: SharedMemory) -> LogFacts:
    """What is said of a log. Raises: OSError; FileNotFoundError if it is gone."""
    with memory.reading(lambda user: True, MAX_LOG_BYTES) as (read, _):
        found = glance(read)
    if found is None:
        return LogFacts(tag, memory.path, "", 0, "no log")
    image = os.fsdecode(found.origin.path)
    state = "in use" if is_in_use(memory.path) else _state_of(image, found)
    return LogFacts(tag, memory.path, image, found.waiting(), state)


def _state_of(image: str, found: FoundLog) -> str:
    """What the image says now for which the log was made: where that was, or below, if a snapshot has moved it there.

    A file of that name which is another one says nothing: the image may be anywhere.
    """
    if not found.origin.boot.is_same(this_boot()):
        return "stale"
    is_there = False
    try:
        for header, is_it in _look_down(image, found):
            if header.log_mark and Mark.parse(header.log_mark).tag == found.tag:
                return "needed"
            is_there |= is_it
    except (OSError, ImageError):
        pass
    return "stale" if is_there else "unknown"


def _look_down(image: str, found: FoundLog) -> Iterator[tuple[Header, bool]]:
    """The headers at *image* and below, and whether each is of the file of the log. Raises: OSError, ImageError."""
    header, is_it = _look_at(image, found)
    yield header, is_it
    if header.backing_name is not None and header.backing_format == "qcow2":
        yield _look_at(backing_path(image, header.backing_name), found)


def _look_at(image: str, found: FoundLog) -> tuple[Header, bool]:
    with HostFile.open(image) as file:
        return run(read_header(file, trust_refcounts=False)), origin_of(file)[1:3] == found.origin[1:3]
