"""Opening what a command reads: with its chain, read-only, complaints in qemu-img's words."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from qcow2.engine.opened import OpenOptions
from qcow2.format.snapshot import Choice
from qcow2.node.chain import Chain
from qcow2.node.formats import format_of
from qcow2.node.gate import require_room
from qcow2.node.node import Node
from qcow2.tool.cache import CACHE_IS_THE_HOSTS, CACHE_MODES
from qcow2.tool.commas import split_commas
from qcow2.tool.failure import Failure
from qcow2.tool.identity import say
from qcow2.tool.named import Named
from qcow2.tool.opening import in_qemus_words


def add_source_options(parser: argparse.ArgumentParser, cache: str = "--source-cache") -> None:
    """Declare what every command has that reads disks; *cache* is the long name of -T."""
    parser.add_argument("-U", "--force-share", action="store_true", help="though others may be writing to it")
    parser.add_argument("-T", cache, dest="source_cache", choices=CACHE_MODES, help=CACHE_IS_THE_HOSTS)


def add_snapshot_option(parser: argparse.ArgumentParser) -> None:
    """Declare how to read a disk as it was."""
    parser.add_argument("-l", "--snapshot", metavar="SNAPSHOT", help="of the source: an id or a name")


def wanted_snapshot(arguments: argparse.Namespace) -> str | Choice | None:
    """An id or else a name; or, said in QEMU's long way, which of the two it is, or both. Raises: Failure."""
    wanted: str | None = arguments.snapshot
    if wanted is None or not wanted.startswith("snapshot."):
        return wanted
    given = {}
    for part in split_commas(wanted):
        name, equals, value = part.partition("=")
        if not equals:
            say(f"warning: short-form boolean option '{name}' deprecated\nPlease use {name}=on instead")
        if name not in ("snapshot.id", "snapshot.name"):
            say(f"Invalid parameter '{name}'")
            raise Failure(f"Failed in parsing snapshot param '{wanted}'")
        given[name] = value if equals else "on"
    return Choice(given.get("snapshot.id"), given.get("snapshot.name"))


@contextmanager
def open_base(image: Named, arguments: argparse.Namespace) -> Iterator[Node]:
    """The disk in *image*, which another is to be over. Raises: Failure; UnsupportedImage if its chain is full."""
    with open_source(image, arguments) as base:
        require_room(image.path, len(base.chain))
        yield base


@contextmanager
def open_source(
    image: Named, arguments: argparse.Namespace, snapshot: str | Choice | None = None, *, needs_all: bool = False
) -> Iterator[Node]:
    """The disk in *image*, or what it was at *snapshot*.

    Raises: Failure; if it *needs_all*, also while writes wait in a link log.
    """
    path, image_format = image.path, image.image_format
    if snapshot is not None and not format_of(path, image_format).has_snapshots:
        raise Failure("Failed to load snapshot: Device is not accepting snapshots")
    how = {"force_share": arguments.force_share, "luks_header": image.luks_header, "needs_all": needs_all}
    with Chain(**how, reaches_exports=True) as chain:
        yield _open(chain, path, image_format, OpenOptions(snapshot=snapshot, keys=arguments.keys))


def _open(chain: Chain, path: str, image_format: str, options: OpenOptions) -> Node:
    with in_qemus_words(path):
        try:
            return chain.open(path, image_format, options)
        except FileNotFoundError as error:
            if options.snapshot is not None and str(error.strerror).startswith("snapshot "):
                raise Failure("Failed to load snapshot: Can't find snapshot") from error
            raise
