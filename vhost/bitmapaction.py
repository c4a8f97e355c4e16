"""What may be done to a bitmap of a running disk, as the control socket is told: a list of objects, each an action."""

from dataclasses import dataclass
from typing import Any

from qcow2.engine.bitmapplan import BitmapPlan

OPTIONS: dict[str, dict[str, type]] = {  # of each action, besides its name and the bitmap's, with their types
    "add": {"granularity": int, "enabled": bool},
    "remove": {},
    "clear": {},
    "enable": {},
    "disable": {},
    "merge": {"source": str},
}


@dataclass(frozen=True, slots=True)
class Action:
    """One of them."""

    action: str
    name: str
    options: dict[str, Any]

    async def plan(self, bitmaps: BitmapPlan) -> None:
        """Have it done by *bitmaps*. Raises: BitmapError, OSError."""
        match self.action:
            case "add":
                granularity, enabled = self.options.get("granularity"), self.options.get("enabled", True)
                await bitmaps.add(self.name, granularity, enabled=enabled)
            case "remove":
                await bitmaps.remove(self.name)
            case "clear":
                await bitmaps.clear(self.name)
            case "merge":
                await bitmaps.merge_own(self.name, self.options["source"])
            case _:
                await bitmaps.enable(self.name, on=self.action == "enable")


def parse_actions(value: object) -> list[Action]:
    """Raises: ValueError."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{value!r} is not a list of actions")
    return [_parse(each) for each in value]


def _parse(value: object) -> Action:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is not an action: an object")
    options = dict(value)
    action, name = options.pop("action", None), options.pop("name", None)
    if not isinstance(action, str) or action not in OPTIONS:
        raise ValueError(f"{action!r} is none of {', '.join(OPTIONS)}")
    if not isinstance(name, str):
        raise ValueError(f"{action}: {name!r} is not the name of a bitmap")
    known = OPTIONS[action]
    for key, given in options.items():
        if key not in known or type(given) is not known[key]:
            raise ValueError(f"{action} {name}: it takes no {key} {given!r}")
    if action == "merge" and "source" not in options:
        raise ValueError(f"merge {name}: which source?")
    return Action(action, name, options)
