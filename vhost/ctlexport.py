"""`vhost-user-qcow2 ctl export`: the words of the command line."""

import argparse
import os
from typing import Any


def add_export(commands: Any) -> list[argparse.ArgumentParser]:
    """Declare `export` and its actions, which are returned."""
    parser = commands.add_parser("export", help="offer a frozen image over NBD")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    start = actions.add_parser("start", help="begin to offer an image that nobody writes to")
    start.add_argument("file", metavar="NAME", help="the file, beside the image, as with snapshot")
    place = start.add_mutually_exclusive_group(required=True)
    place.add_argument("--socket", metavar="PATH", type=os.path.abspath, help="listen on a Unix socket there")
    place.add_argument("--port", metavar="PORT", type=int, help="listen on this TCP port")
    start.add_argument("--bind", metavar="ADDRESS", dest="address", help="of this address (default: localhost)")
    start.add_argument(
        "--bitmap", metavar="NAME", dest="bitmaps", action="append", help="of NAME's, for clients to see"
    )
    start.add_argument(
        "--tls-creds", metavar="DIR", dest="certificates", type=os.path.abspath, help="nothing without TLS"
    )
    start.add_argument(
        "--no-tls", action="store_const", const=True, help="whoever reaches the address may read it, in plain"
    )
    stop = actions.add_parser("stop", help="end it; who still reads is cut off")
    stop.add_argument("file", metavar="NAME", help="as with start")
    return [start, stop, actions.add_parser("list", help="what is exported, and where")]


def request_of(given: dict[str, Any]) -> dict[str, Any]:
    """What to ask the daemon for."""
    wanted = {name: value for name, value in given.items() if value is not None and name != "action"}
    return {**wanted, "command": f"export-{given['action']}"}
