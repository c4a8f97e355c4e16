"""`vhost-user-qcow2 ctl bitmap` and `snapshot-internal`: the words of the command line."""

import argparse
import json
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from vhost.argument import Parser, UsageError
from vhost.client import Control
from vhost.clientbitmaps import LiveBitmap
from vhost.ctljob import quantity

Size = Callable[[str], int]


def add_bitmap(commands: Any, parse_size: Size) -> list[argparse.ArgumentParser]:
    """Declare `bitmap` and its actions, which are returned."""
    parser = commands.add_parser("bitmap", help="dirty bitmaps of the disk: what they say, and which there are")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="what each reports, and how")
    listing.add_argument("--json", action="store_true", help="print JSON")
    together = actions.add_parser("together", help="several actions at one instant, all of them or none")
    together.add_argument("actions", metavar="ACTION", nargs="+", help="one of the others in quotes, as in 'clear day'")
    return [listing, together, *_add_actions(actions, parse_size)]


def _add_actions(actions: Any, parse_size: Size) -> list[argparse.ArgumentParser]:
    add = actions.add_parser("add", help="make an empty one")
    add.add_argument("name", metavar="NAME", help="its name")
    add.add_argument(
        "-g", dest="granularity", metavar="SIZE", type=parse_size, help="bytes a bit stands for (default: a cluster)"
    )
    add.add_argument("--disabled", dest="enabled", action="store_false", help="which records nothing yet")
    parsers = [add]
    for action, text in (
        ("remove", "forget one, valid or not"),
        ("clear", "let nothing be dirty"),
        ("enable", "let one record from now on"),
        ("disable", "let one record no more"),
        ("merge", "let one report what another reports, too"),
    ):
        one = actions.add_parser(action, help=text)
        one.add_argument("name", metavar="NAME", help="its name")
        parsers.append(one)
    parsers[-1].add_argument("source", metavar="SOURCE", help="the other one")
    return parsers


def add_snapshot_internal(commands: Any) -> list[argparse.ArgumentParser]:
    """Declare `snapshot-internal` and its actions, which are returned."""
    parser = commands.add_parser("snapshot-internal", help="snapshots inside the image")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="which there are")
    create = actions.add_parser("create", help="keep what the disk holds now")
    delete = actions.add_parser("delete", help="forget one; what it alone held is free")
    apply = actions.add_parser("apply", help="go back to one, while no guest uses the disk")
    for one in (create, delete, apply):
        one.add_argument("name", metavar="NAME", help="its name")
    for one in (listing, create):
        one.add_argument("--json", action="store_true", help="print JSON")
    return [listing, create, delete, apply]


def run_bitmap(control: Control, request: dict[str, Any], parse_size: Size) -> int:
    """Do what a command line of `add_bitmap` asks for; the exit status. Raises: ControlError, UsageError."""
    match request:
        case {"action": "list", "json": is_json}:
            found = list(control.bitmaps)
            if is_json:
                print(json.dumps([asdict(each) for each in found], indent=2))
            else:
                print("".join(f"{_described(each)}\n" for each in found), end="")
        case {"action": "together", "actions": texts}:
            control.bitmaps.change(*(_parse_action(text, parse_size) for text in texts))
        case _:
            control.bitmaps.change(_action_of(request))
    return 0


def _parse_action(text: str, parse_size: Size) -> dict[str, Any]:
    parser = Parser(prog="action", allow_abbrev=False)
    _add_actions(parser.add_subparsers(dest="action", metavar="ACTION", required=True), parse_size)
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{text!r}: {error}") from error
    return _action_of(vars(parser.parse_args(words)))


def _action_of(given: dict[str, Any]) -> dict[str, Any]:
    """As the daemon takes it."""
    return {key: value for key, value in given.items() if value is not None and key != "command"}


def _described(bitmap: LiveBitmap) -> str:
    """A bitmap on one line."""
    dirty = f"{quantity(bitmap.dirty)} dirty" if bitmap.dirty is not None else "not valid"
    state = "enabled" if bitmap.enabled else "disabled"
    busy = ", busy" if bitmap.busy else ""
    return f"{_shown(bitmap.name)}: {dirty}, {quantity(bitmap.granularity)} a bit, {state}{busy}"


def _moment(snapshot: dict[str, Any]) -> str:
    """A snapshot on one line."""
    date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(snapshot["date-sec"]))
    return f"{_shown(snapshot['id'])}: {_shown(snapshot['name'])}, {date}"


def _shown(name: str) -> str:
    """A name of the image's, on one line of a terminal."""
    return "".join(character if character.isprintable() else "?" for character in name)


def run_snapshot_internal(control: Control, request: dict[str, Any]) -> int:
    """Do what a command line of `add_snapshot_internal` asks for; the exit status. Raises: ControlError."""
    snapshots = control.internal_snapshots
    match request:
        case {"action": "list", "json": is_json}:
            found = list(snapshots)
            if is_json:
                print(json.dumps(found, indent=2))
            else:
                print("".join(f"{_moment(each)}\n" for each in found), end="")
        case {"action": "create", "name": name, "json": is_json}:
            made = snapshots.create(name)
            print(json.dumps(made, indent=2) if is_json else _moment(made))
        case {"action": "delete", "name": name}:
            snapshots.delete(name)
        case {"action": "apply", "name": name}:
            snapshots.apply(name)
    return 0
