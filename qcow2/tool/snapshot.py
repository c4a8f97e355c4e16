"""`qcow2 snapshot`: the internal snapshots of an image."""

import argparse
import errno
import os
from collections.abc import Sequence
from typing import Any

from qcow2.driver.file import run
from qcow2.error import ImageError
from qcow2.format.header import read_header
from qcow2.format.snapshot import Snapshot, read_snapshots
from qcow2.library.disk import open_disk
from qcow2.library.facts import snapshot_facts
from qcow2.library.hostfile import opened
from qcow2.node.formats import format_of
from qcow2.tool.failure import Failure
from qcow2.tool.file import add_log_options, how_to_open
from qcow2.tool.identity import is_qemu_img, say
from qcow2.tool.info import snapshot_lines
from qcow2.tool.named import Named, add_format_option, add_image_options, the_image
from qcow2.tool.opening import opening

VERBS = ("create", "apply", "delete")
NOT_FOUND = {"apply": "Failed to load snapshot: No such file or directory", "delete": "snapshot not found"}


class Once(argparse.Action):
    """What to do, which is one thing: of two snapshots to be made one would be forgotten in silence."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Keep it. Raises: ArgumentError for a second one."""
        if getattr(namespace, self.dest) is not None:
            raise argparse.ArgumentError(self, f"not allowed with argument {'/'.join(self.option_strings)}")
        setattr(namespace, self.dest, self.const or values)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `qcow2 snapshot`."""
    add_format_option(parser)
    add_image_options(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("-l", "--list", action=Once, nargs=0, const=True, help="list the snapshots (default)")
    what.add_argument("-c", "--create", action=Once, metavar="NAME", help="keep what the disk holds now as a snapshot")
    what.add_argument(
        "-a", "--apply", action=Once, metavar="SNAPSHOT", help="go back to the snapshot of that id, or else name"
    )
    what.add_argument("-d", "--delete", action=Once, metavar="NAME", help="forget the first snapshot of that name")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but the list")
    parser.add_argument(
        "-U", "--force-share", action="store_true", help="list though others may be writing to the image"
    )
    add_log_options(parser)
    parser.add_argument("filename")


def run_command(arguments: argparse.Namespace) -> int:
    """List the snapshots, or change them.

    Raises: OSError, ImageError, ValueError, Failure.
    """
    image = the_image(arguments)
    for verb in VERBS:
        if (name := getattr(arguments, verb)) is not None:
            _change(verb, name, image, arguments)
            return 0
    if not format_of(image.path, image.image_format).has_snapshots:
        return 0
    with opening(image.path), opened(image.path, force_share=arguments.force_share) as file:
        snapshots = run(read_snapshots(file, run(read_header(file, trust_refcounts=False)))).snapshots
    if snapshots:
        print("\n".join(snapshot_lines(map(snapshot_facts, snapshots))))
    return 0


def _change(verb: str, name: str, image: Named, arguments: argparse.Namespace) -> None:
    if arguments.force_share:
        raise Failure(f"Could not open '{image.path}': force-share=on can only be used with read-only images")
    if not format_of(image.path, image.image_format).has_snapshots:
        raise Failure(f"Could not {verb} snapshot {name!r}: {os.strerror(errno.ENOTSUP)}")
    with open_disk(image.path, writable=True, **how_to_open(arguments)) as disk:
        if not is_qemu_img():
            _say_which(verb, name, disk.snapshots)
        try:
            getattr(disk, f"{verb}_snapshot")(name)
        except FileNotFoundError as error:
            raise Failure(f"Could not {verb} snapshot {name!r}: {NOT_FOUND[verb]}") from error
        except (OSError, ImageError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise Failure(f"Could not {verb} snapshot {name!r}: {reason}") from error


def _say_which(verb: str, name: str, snapshots: Sequence[Snapshot]) -> None:
    """Say so where *name* is, or will be, that of several."""
    same = [each for each in snapshots if each.name == name]
    meant = [each for each in snapshots if verb == "apply" and each.id == name] + same
    if verb == "create" and same:
        say(f"warning: {len(same)} snapshots are named {name!r} already: -a and -d take the first, of id {same[0].id}")
    elif verb != "create" and len(meant) > 1 and meant[0] is not meant[-1]:
        say(f"warning: {len(meant)} snapshots answer to {name!r}: this is about the one of id {meant[0].id}")
