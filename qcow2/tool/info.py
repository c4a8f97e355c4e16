"""`qcow2 info`: what an image is."""

import argparse
import os
import time
from collections.abc import Iterable
from contextlib import suppress

from qcow2.driver.uri import is_nbd
from qcow2.error import ImageError, UnsupportedImage
from qcow2.library.facts import Facts, facts_of, limits_of
from qcow2.library.hostfile import opened
from qcow2.node.formats import format_of
from qcow2.node.gate import MAX_DEPTH, backing_path
from qcow2.tool.cache import CACHE_IS_THE_HOSTS, CACHE_MODES
from qcow2.tool.failure import Failure
from qcow2.tool.file import ordered, print_json
from qcow2.tool.identity import is_qemu_img
from qcow2.tool.named import add_format_option, add_image_options, the_image
from qcow2.tool.opening import opening
from qcow2.tool.quantity import format_size
from qcow2.tool.warning import warn_of_rest, warn_of_waiting


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `qcow2 info`."""
    add_format_option(parser)
    add_image_options(parser)
    parser.add_argument("--output", default="human", choices=["human", "json"])
    parser.add_argument("--backing-chain", action="store_true", help="and of every image under it")
    parser.add_argument("-U", "--force-share", action="store_true", help="though others may be writing to it")
    parser.add_argument("-t", "--cache", choices=CACHE_MODES, help=CACHE_IS_THE_HOSTS)
    parser.add_argument("--limits", action="store_true", help="and how requests are best aligned")
    parser.add_argument("filename")


def run_command(arguments: argparse.Namespace) -> int:
    """Print what the image is.

    Raises: OSError, ImageError.
    """
    image = the_image(arguments)
    with opening(image.path):
        how = {"force_share": arguments.force_share, "luks_header": image.luks_header}
        chain = [facts_of(image.path, image.image_format, **how)]
        if arguments.backing_chain:
            _follow(chain, arguments.force_share)
        if not arguments.force_share:
            _warn_of_rests(chain)
    if arguments.limits:
        for facts in chain:
            facts["limits"] = limits_of(facts)
    if arguments.output == "json":
        print_json(chain if arguments.backing_chain else chain[0])
    else:
        print("\n\n".join("\n".join(_lines(facts)) for facts in chain))
    return 0


def _warn_of_rests(chain: list[Facts]) -> None:
    for facts in chain:
        path = facts["filename"]
        if format_of(path, facts["format"]).has_metadata and not is_nbd(path):
            with suppress(OSError), opened(path) as file:
                warn_of_waiting(file)
                warn_of_rest(file)


def _follow(chain: list[Facts], force_share: bool) -> None:
    while "backing-filename" in chain[-1]:
        top = chain[-1]["filename"]
        if "backing-filename-format" not in chain[-1]:
            raise UnsupportedImage(top, f"the format of backing file {chain[-1]['backing-filename']!r} is not recorded")
        path = backing_path(top, chain[-1]["backing-filename"])
        if len(chain) >= MAX_DEPTH:
            raise UnsupportedImage(top, f"more than {MAX_DEPTH} files in the backing chain")
        if os.path.exists(path) and any(os.path.samefile(path, facts["filename"]) for facts in chain):
            if is_qemu_img():
                raise Failure(f"Backing file '{path}' creates an infinite loop.")
            raise ImageError(top, f"the backing chain is a cycle: {path} is in it already")
        chain.append(facts_of(path, chain[-1]["backing-filename-format"], force_share=force_share))


def _lines(facts: Facts) -> list[str]:
    """The facts for people."""
    size = facts["virtual-size"]
    lines = [
        f"image: {facts['filename']}",
        f"file format: {facts['format']}",
        f"virtual size: {format_size(size)} ({size} bytes)",
        f"disk size: {format_size(facts['actual-size']) if 'actual-size' in facts else 'unavailable'}",
    ]
    if facts["dirty-flag"]:
        lines.append("cleanly shut down: no")
    if facts.get("encrypted"):
        lines.append("encrypted: yes")
    if "cluster-size" in facts:
        lines.append(f"cluster_size: {facts['cluster-size']}")
    lines += _backing_lines(facts)
    if "limits" in facts:
        lines += ["Block limits:", *_specific_lines(ordered(facts["limits"]))]
    if "snapshots" in facts:
        lines += snapshot_lines(facts["snapshots"])
    if "format-specific" in facts:
        lines += ["Format specific information:", *_specific_lines(facts["format-specific"]["data"])]
    return lines


def _backing_lines(facts: Facts) -> list[str]:
    if "backing-filename" not in facts:
        return []
    name, full = facts["backing-filename"], facts["full-backing-filename"]
    lines = [f"backing file: {name}" + ("" if name == full else f" (actual path: {full})")]
    if "backing-filename-format" in facts:
        lines.append(f"backing file format: {facts['backing-filename-format']}")
    return lines


def snapshot_lines(snapshots: Iterable[Facts]) -> list[str]:
    """The list of snapshots for people."""
    head = ["Snapshot list:", _row("ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT")]
    return head + [_snapshot_line(snapshot) for snapshot in snapshots]


def _row(tag_id: str, tag: str, size: str, date: str, clock: str, icount: str) -> str:
    return f"{tag_id:<9} {tag:<16} {size:>8}{date:>20}{clock:>13}{icount:>11}"


def _snapshot_line(snapshot: Facts) -> str:
    date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(snapshot["date-sec"]))
    seconds, milliseconds = snapshot["vm-clock-sec"], snapshot["vm-clock-nsec"] // 1_000_000
    clock = f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.{milliseconds:03d}"
    icount = str(snapshot.get("icount", ""))
    return _row(snapshot["id"], snapshot["name"], format_size(snapshot["vm-state-size"]), date, clock, icount)


def _specific_lines(data: Facts, indent: str = "    ") -> list[str]:
    """Nested facts, each level farther in."""
    lines = []
    for key, value in ordered(data).items():
        name = f"{indent}{key.replace('-', ' ')}:"
        if isinstance(value, list):
            value = {f"[{number}]": each for number, each in enumerate(value)}
        if isinstance(value, dict):
            lines += [name, *_specific_lines(value, indent + "    ")]
        else:
            lines.append(f"{name} {str(value).lower() if isinstance(value, bool) else value}")
    return lines
