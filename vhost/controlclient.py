"""`vhost-user-qcow2 ctl`: ask a running daemon through its control socket."""

import argparse
import json
import sys
from typing import Any

from vhost import PROGRAM
from vhost.argument import Parser, UsageError, options_of, size_of
from vhost.client import Control, ControlError
from vhost.clienttogether import snapshot_together
from vhost.ctlbitmap import add_bitmap, add_snapshot_internal, run_bitmap, run_snapshot_internal
from vhost.ctlexport import add_export, request_of
from vhost.ctljob import add_commands, run_command

JOB_COMMANDS = ("stream", "commit", "backup", "mirror", "events", "job")


def parser() -> Parser:
    """The command line of `ctl`; --control may stand anywhere, so nobody but us sees whether it is missing."""
    parser = Parser(
        prog=f"{PROGRAM} ctl", allow_abbrev=False, description="Ask a running daemon through its control socket."
    )
    parser.add_argument(
        "--control",
        metavar="PATH",
        action="append",
        default=[],
        help="the daemon's --control socket; `snapshot` of several disks takes several",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("status", help="what is served, how, and to whom")
    commands.add_parser("stats", help="counters and latencies as JSON")
    commands.add_parser("metrics", help="counters and latencies as OpenMetrics text")
    resize = commands.add_parser("resize", help="let the disk grow while it is used")
    resize.add_argument(
        "size",
        metavar="SIZE",
        type=lambda text: size_of(text, "20G"),
        help="the new size in bytes, or with a suffix as in 20G",
    )
    snapshot = commands.add_parser(
        "snapshot", help="freeze what the disk holds in a file; an overlay is served from now on"
    )
    snapshot.add_argument(
        "name", metavar="NAME", nargs="+", help="the file to freeze it in, beside the image; one for each --control"
    )
    snapshot.add_argument(
        "--bitmap-add", metavar="BITMAP", action="append", default=[], help="which the overlay has, empty"
    )
    snapshot.add_argument("--carry-bitmaps", action="store_true", help="the overlay has those of the image, too")
    snapshot.add_argument(
        "-o",
        dest="options",
        metavar="OPTIONS",
        action="append",
        default=[],
        help="what the overlay is like, as of `qcow2 create -o`; else as the image, with extended_l2=on",
    )
    exports = add_export(commands)
    images = [*add_bitmap(commands, lambda text: size_of(text, "64K")), *add_snapshot_internal(commands)]
    actions = add_commands(commands, lambda text: size_of(text, "50M"))
    commands.add_parser("flush", help="make every completed write stable")
    cache = commands.add_parser("set-cache", help="demand writethrough, or leave the mode to the guest again")
    cache.add_argument("mode", choices=["writeback", "writethrough"], help="the mode")
    commands.add_parser("quit", help="end the daemon as SIGTERM does")
    for command in [*commands.choices.values(), *exports, *images, *actions]:
        command.add_argument(
            "--control",
            metavar="PATH",
            action="extend",
            nargs=1,
            default=argparse.SUPPRESS,
            dest="more",
            help=argparse.SUPPRESS,
        )
    return parser


def parse(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The sockets of the daemons that *arguments* name, and what they are asked for. Raises: UsageError."""
    request = vars(parser().parse_args(arguments))
    paths = [*request.pop("control"), *request.pop("more", ())]
    if not paths:
        raise UsageError("the following arguments are required: --control")
    wanted = len(request["name"]) if request["command"] == "snapshot" else 1
    if len(paths) != wanted:
        raise UsageError(f"{len(paths)} of --control, {wanted} wanted: a snapshot has a NAME for each disk")
    return paths, request_of(request) if request["command"] == "export" else request


def main(arguments: list[str]) -> int:
    """Run one command; the exit status."""
    try:
        paths, request = parse(arguments)
        if len(paths) > 1:
            del request["command"]
            request["options"] = options_of(request["options"])
            _show("snapshot", {"snapshots": snapshot_together(paths, request.pop("name"), **request)})
            return 0
        with Control(paths[0]) as control:
            if request["command"] in JOB_COMMANDS:
                return run_command(control, request)
            if request["command"] == "bitmap":
                return run_bitmap(control, request, lambda text: size_of(text, "64K"))
            if request["command"] == "snapshot-internal":
                return run_snapshot_internal(control, request)
            if request["command"] == "snapshot":
                (request["name"],) = request["name"]
                request["options"] = options_of(request["options"])
                request = {key: value for key, value in request.items() if value or key == "name"}
            _show(request["command"], control.ask(**request))
    except (UsageError, ControlError) as error:
        print(f"{PROGRAM}: ctl: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _show(command: str, result: Any) -> None:
    if result is not None:
        print(
            result if isinstance(result, str) else json.dumps(result, indent=2),
            end="" if command == "metrics" else "\n",
        )
