"""`vhost-user-qcow2 ctl stream`, `commit`, `backup`, `job`, `events`: begin long work on a disk, wait for it."""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from vhost.client import Control, ControlError, EventName, Job
from vhost.event import NAMES
from vhost.policy import COPY_FORMATS, OnError

WIDTH = 30  # of a progress bar
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def add_commands(commands: Any, parse_size: Callable[[str], int]) -> list[argparse.ArgumentParser]:
    """Declare the command lines of jobs. -> those of their actions."""
    stream = commands.add_parser("stream", help="pull what the image shows of its backing files into it")
    stream.add_argument("--base", metavar="FILE", help="only what is above this file of its chain")
    commit = commands.add_parser("commit", help="bring what is frozen under the image into the file under that")
    commit.add_argument("--base", metavar="FILE", help="this file of its chain; needed where several are frozen")
    backup = commands.add_parser("backup", help="copy the disk of this moment, or what a bitmap says has changed")
    backup.add_argument("target", metavar="TARGET", help="a file, as seen from the image's directory, or an NBD URI")
    backup.add_argument("--format", choices=COPY_FORMATS, help="of the file (default: qcow2); an export is raw")
    backup.add_argument("--existing", action="store_true", help="overwrite the file, device or export that is there")
    backup.add_argument("--bitmap", metavar="NAME", help="only what it has recorded, and let it forget that at the end")
    backup.add_argument("--keep-bitmap", action="store_true", help="let the bitmap forget nothing")
    backup.add_argument("--backing", metavar="FILE", help="the backup before, over which the new one is a whole disk")
    commit.add_argument("--active", action="store_true", help="and what the image holds itself")
    mirror = commands.add_parser("mirror", help="copy the disk, and keep the copy in step until it is served, or left")
    mirror.add_argument("target", metavar="TARGET", help="a file, as seen from the image's directory, or an NBD URI")
    mirror.add_argument("--format", choices=COPY_FORMATS, help="of the copy; as the image is served, if not said")
    mirror.add_argument("--top", action="store_true", help="copy the image alone, over the same backing file")
    mirror.add_argument("--existing", action="store_true", help="TARGET is there, and what it holds is overwritten")
    for one in (stream, commit, backup, mirror):
        one.add_argument("--rate", metavar="RATE", type=parse_size, default=0, help="bytes a second, as in 50M")
        one.add_argument("--on-error", choices=[*OnError], default=OnError.REPORT, help="what becomes of the job then")
        one.add_argument("--wait", action="store_true", help="wait until it has ended, and show how far it is")
    events = commands.add_parser("events", help="print what happens as lines of JSON until the daemon ends")
    events.add_argument("names", metavar="NAME", nargs="*", help=f"{', '.join(NAMES)}; else all")
    job = commands.add_parser("job", help="long work on the disk: list, wait, pause, resume, cancel, set-rate")
    actions = job.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="the one under way, and those that ended last")
    wait = actions.add_parser("wait", help="wait until it has ended; a bar shows how far it is on a terminal")
    pause = actions.add_parser("pause", help="let it move nothing for now")
    resume = actions.add_parser("resume", help="let it go on")
    complete = actions.add_parser("complete", help="let a mirror that is ready be served, and wait until it is")
    cancel = actions.add_parser("cancel", help="let it end; what it has done stays, of a mirror if it is ready")
    rate = actions.add_parser("set-rate", help="let it move so many bytes a second")
    for one in (wait, pause, resume, complete, cancel, rate):
        one.add_argument("job", metavar="JOB", type=int, help="its number")
    rate.add_argument("rate", metavar="RATE", type=parse_size, help="bytes a second, as in 50M; 0: as fast as it goes")
    parsers = [listing, wait, pause, resume, complete, cancel, rate]
    for one in (stream, commit, backup, mirror, *parsers):
        one.add_argument("--json", action="store_true", help="print JSON")
    return parsers


def run_command(control: Control, request: dict[str, Any]) -> int:
    """Do what a command line of `add_commands` asks for; the exit status. Raises: ControlError."""
    match request:
        case {"command": "events", "names": names}:
            return _print_events(control, names)
        case {"command": "stream", "base": base, "rate": rate, "on_error": on_error}:
            return _begun(control, control.stream(base, rate=rate, on_error=on_error), request)
        case {"command": "commit", "base": base, "active": active, "rate": rate, "on_error": on_error}:
            return _begun(control, control.commit(base, active=active, rate=rate, on_error=on_error), request)
        case {"command": "mirror", "target": target, "format": image_format, "rate": rate, "on_error": on_error}:
            given = {"top": request["top"], "existing": request["existing"]}
            return _begun(control, control.mirror(target, image_format, **given, rate=rate, on_error=on_error), request)
        case {"command": "backup"}:
            chosen = {key: request[key] for key in ("format", "existing", "bitmap", "backing", "rate", "on_error")}
            mode = "never" if request["keep_bitmap"] else None
            return _begun(control, control.backup(request["target"], **chosen, bitmap_mode=mode), request)
        case {"action": "list"}:
            return _show_all(control.jobs(), is_json=request["json"])
        case {"action": "wait", "job": number}:
            return _wait(control, number, is_json=request["json"])
        case {"action": "complete", "job": number}:
            return _wait(control, control.complete(number).job, is_json=request["json"], is_good=_is_completed)
        case {"action": "set-rate", "job": number, "rate": rate}:
            return _show(control.set_rate(number, rate), is_json=request["json"])
        case {"action": "pause" | "resume" | "cancel" as action, "job": number}:
            return _show(getattr(control, action)(number), is_json=request["json"])
    raise AssertionError(f"unparsed {request}")


def _begun(control: Control, job: Job, request: dict[str, Any]) -> int:
    return _wait(control, job.job, is_json=request["json"]) if request["wait"] else _show(job, is_json=request["json"])


def _print_events(control: Control, names: list[EventName]) -> int:
    control.subscribe(*names)
    for event in control.events():
        print(json.dumps({"event": event.name, "data": event.data}), flush=True)
    return 0


def _show_all(jobs: list[Job], *, is_json: bool) -> int:
    if is_json:
        print(json.dumps([job.as_json() for job in jobs], indent=2))
    else:
        for job in jobs:
            print(_described(job))
    return 0


def _show(job: Job, *, is_json: bool) -> int:
    print(json.dumps(job.as_json(), indent=2) if is_json else _described(job))
    return 0


def _is_completed(job: Job) -> bool:
    return job.state == "completed"


def _is_whole(job: Job) -> bool:
    return _is_completed(job) or job.state == "ready" or job.left


def _wait(control: Control, number: int, *, is_json: bool, is_good: Callable[[Job], bool] = _is_whole) -> int:
    has_bar = sys.stderr is not None and sys.stderr.isatty()
    try:
        job = control.wait(number, _teller(has_bar=has_bar))
    except Exception:
        raise
    except BaseException:  # a signal
        if sys.stderr is not None:
            line = "\n" if has_bar else ""
            print(f"{line}job {number} goes on; ctl job wait or cancel", file=sys.stderr, flush=True)
        raise
    if has_bar:
        print(file=sys.stderr)
    if not (is_good(job) or is_json):
        raise ControlError(f"job {number} {job.state}{': ' if job.error else ''}{job.error}")
    _show(job, is_json=is_json)
    return int(not is_good(job))


def _teller(*, has_bar: bool) -> Callable[[Job], None]:
    """Tells whoever waits of the job's progress, and why it stands still if an error has paused it."""
    known = ""

    def tell(job: Job) -> None:
        nonlocal known
        if has_bar:
            _show_bar(job)
        problem = job.error if job.state == "paused" else ""
        if problem and problem != known and sys.stderr is not None:
            line = "\n" if has_bar else ""
            print(f"{line}job {job.job} is paused: {problem}; ctl job resume or cancel", file=sys.stderr, flush=True)
        known = problem

    return tell


def _show_bar(job: Job) -> None:
    part = job.done / job.total if job.total else float(job.state == "completed")
    bar = ("#" * round(part * WIDTH)).ljust(WIDTH)
    print(f"\r{job.kind} [{bar}] {100 * part:5.1f} % {job.state:<9}", end="", file=sys.stderr, flush=True)


def _described(job: Job) -> str:
    """A job on one line."""
    nothing = "nothing to do" if job.state == "completed" else "nothing yet"
    percent = f"{100 * job.done / job.total:.1f} % of {quantity(job.total)}" if job.total else nothing
    rate = f", at most {quantity(job.rate)}/s" if job.rate else ""
    error = f", last error: {job.error}" if job.error else ""
    left = ", a whole copy is left" if job.left else ""
    return f"job {job.job}: {job.kind}, {job.state}, {percent}{rate}{left}{error}"


def quantity(nbytes: float) -> str:
    """For people."""
    for unit in UNITS[:-1]:
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} {UNITS[-1]}"
