"""`qcow2 check`: is the image consistent, and can it be made so."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from qcow2.driver.file import HostFile, run
from qcow2.error import UnsupportedImage
from qcow2.format.header import read_header
from qcow2.judge.check import check
from qcow2.judge.datafile import judge_data_file
from qcow2.judge.report import MAX_LINES, Report
from qcow2.library.hostfile import opened
from qcow2.node.formats import format_of
from qcow2.node.gate import ANY, DATA
from qcow2.tool.cache import CACHE_IS_THE_HOSTS, CACHE_MODES
from qcow2.tool.file import add_log_options, print_json, recovered
from qcow2.tool.identity import is_qemu_img, say
from qcow2.tool.named import add_format_option, add_image_options, the_image
from qcow2.tool.opening import opening
from qcow2.tool.warning import warn_of_rest, warn_of_waiting

IN_THE_DARK = "not all references can be found: clusters that seem to leak may be in use, and are kept by a repair"
NOT_CLOSED = "not closed cleanly: the next writable open repairs this"
NO_CHECK = 63  # qemu-img's status for a format that has none


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `qcow2 check`."""
    parser.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    add_format_option(parser)
    parser.add_argument("--output", default="human", choices=["human", "json"])
    parser.add_argument("-r", "--repair", choices=["leaks", "all"], help="put right what is wrong")
    parser.add_argument("-U", "--force-share", action="store_true", help="though others may be writing to it")
    parser.add_argument("-T", "--cache", choices=CACHE_MODES, help=CACHE_IS_THE_HOSTS)
    add_image_options(parser)
    add_log_options(parser)
    parser.add_argument("filename")


def run_command(arguments: argparse.Namespace) -> int:
    """Check the image; 0 it is sound, 1 the check failed, 2 it is corrupt, 3 it only wastes space.

    Raises: OSError, ImageError, ValueError.
    """
    image = the_image(arguments, writes=arguments.repair is not None)
    if not format_of(image.path, image.image_format).has_metadata:
        say("This image format does not support checks")
        return NO_CHECK
    if arguments.repair and arguments.force_share:
        raise ValueError(f"{image.path}: cannot repair with --force-share")
    with opening(image.path), _opened(image.path, arguments) as file, _data_file_of(file) as data_file:
        report = _check(file, data_file, arguments)
        if not arguments.force_share:
            warn_of_waiting(file)
        if not report.check_errors and not report.corruptions and not arguments.force_share:
            warn_of_rest(file)
    if not arguments.quiet:
        _print(report, image.path, is_json=arguments.output == "json")
    if report.is_dark:
        say(f"{image.path}: {IN_THE_DARK}")
    elif report.is_dirty and not report.check_errors and not is_qemu_img():
        say(f"{image.path}: {NOT_CLOSED}")
    return _status(report)


def _opened(path: str, arguments: argparse.Namespace) -> AbstractContextManager[HostFile]:
    if arguments.repair is None:
        return opened(path, force_share=arguments.force_share)
    return recovered(path, arguments)


@contextmanager
def _data_file_of(file: HostFile) -> Iterator[HostFile | None]:
    """The external data file, whose length is asked and no more; None if there is none, or its name is no file's.

    Raises: OSError, ImageError.
    """
    name = run(read_header(file, trust_refcounts=False)).data_file_name
    try:
        data_file = ANY.open(file.path, DATA, name, writable=False) if name else None
    except UnsupportedImage:
        data_file = None
    with data_file or nullcontext():
        yield data_file


def _check(file: HostFile, data_file: HostFile | None, arguments: argparse.Namespace) -> Report:
    said = Findings(is_kept=arguments.repair is not None)
    progress = _show_progress if not arguments.quiet and sys.stderr.isatty() else None
    if arguments.repair is None:
        report = run(check(file, say=said.say, progress=progress))
    else:
        from qcow2.judge.repair import RepairMode, repair

        report = run(repair(file, RepairMode(arguments.repair), say=said.say, progress=progress))
        report.say = said.say
    if data_file is not None:
        run(judge_data_file(file, data_file, report))
    if progress is not None:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    said.end(report)
    return report


class Findings:
    """Prints one line for each finding; *is_kept*: at the end, when it is known what was put right."""

    def __init__(self, *, is_kept: bool) -> None:
        self._kept: list[str] | None = [] if is_kept else None

    def say(self, line: str) -> None:
        """Print *line*."""
        if self._kept is None:
            print(line, file=sys.stderr)
        else:
            self._kept.append(line)

    def end(self, report: Report) -> None:
        """Print what was kept, and tell how much was not said."""
        for line in self._kept or ():
            print(_outcome(line, report), file=sys.stderr)
        fixed = report.corruptions_fixed + report.leaks_fixed
        if is_qemu_img():
            return  # there a line for each is what scripts know
        if (rest := report.corruptions + report.leaks + report.check_errors + fixed - MAX_LINES) > 0:
            print(f"... and {rest} more findings", file=sys.stderr)


def _outcome(line: str, report: Report) -> str:
    """*line* of a finding as qemu-img says it of one that a repair has put right."""
    verb, _, rest = line.partition(" ")
    is_of_repair = rest.startswith(("cluster ", "OFLAG_COPIED "))
    is_fixed = report.leaks_fixed if verb == "Leaked" else report.corruptions_fixed and not report.corruptions
    return f"Repairing {rest}" if is_fixed and is_of_repair else line


def _show_progress(done: int, total: int) -> None:
    """A line that is written over by the next; tables are large, so there are not too many."""
    if done == total or done * 1000 // total != (done - 1) * 1000 // total:
        print(f"\r    ({100 * done / total:.2f}/100%)", end="", file=sys.stderr, flush=True)


def _status(report: Report) -> int:
    if report.check_errors:
        return 1
    if report.corruptions:
        return 2
    return 3 if report.leaks else 0


def _print(report: Report, path: str, *, is_json: bool) -> None:
    if is_json:
        print_json(_facts(report, path))
    else:
        print("\n".join(_lines(report)))


def _facts(report: Report, path: str) -> dict[str, int | str]:
    """As qemu-img's JSON: what is zero is left out."""
    counts = {
        "image-end-offset": report.image_end_offset,
        "corruptions": report.corruptions,
        "leaks": report.leaks,
        "corruptions-fixed": report.corruptions_fixed,
        "leaks-fixed": report.leaks_fixed,
        "total-clusters": report.total_clusters,
        "allocated-clusters": report.allocated_clusters,
        "fragmented-clusters": report.fragmented_clusters,
        "compressed-clusters": report.compressed_clusters,
    }
    facts: dict[str, int | str] = {"filename": path, "format": "qcow2", "check-errors": report.check_errors}
    return facts | {key: count for key, count in counts.items() if count}


def _lines(report: Report) -> list[str]:
    lines = []
    if report.corruptions_fixed or report.leaks_fixed:
        lines += ["The following inconsistencies were found and repaired:", ""]
        lines += [f"    {report.leaks_fixed} leaked clusters", f"    {report.corruptions_fixed} corruptions", ""]
        lines.append("Double checking the fixed image now...")
    if not (report.corruptions or report.leaks or report.check_errors):
        lines.append("No errors were found on the image.")
    if report.corruptions:
        lines += ["", f"{report.corruptions} errors were found on the image."]
        lines.append("Data may be corrupted, or further writes to the image may corrupt it.")
    if report.leaks:
        lines += ["", f"{report.leaks} leaked clusters were found on the image."]
        lines.append("This means waste of disk space, but no harm to data.")
    if report.check_errors:
        lines += ["", f"{report.check_errors} internal errors have occurred during the check."]
    return lines + _allocation_lines(report)


def _allocation_lines(report: Report) -> list[str]:
    lines = []
    allocated = report.allocated_clusters
    if report.total_clusters and allocated:
        lines.append(
            f"{allocated}/{report.total_clusters} = {100 * allocated / report.total_clusters:.2f}% allocated, "
            f"{100 * report.fragmented_clusters / allocated:.2f}% fragmented, "
            f"{100 * report.compressed_clusters / allocated:.2f}% compressed clusters"
        )
    if report.image_end_offset:
        lines.append(f"Image end offset: {report.image_end_offset}")
    return lines
