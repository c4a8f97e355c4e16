"""What is done with the link log that a killed process left, before anything else is written to its image."""

import logging
import os
import pwd
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qcow2.driver.boot import this_boot
from qcow2.driver.file import HostFile, run
from qcow2.driver.memory import SharedMemory, is_in_use
from qcow2.engine.replay import are_in, clear_mark, replay
from qcow2.engine.restore import restore_bits
from qcow2.error import ImageError, UnsupportedImage
from qcow2.format.header import Header, load_header, read_header
from qcow2.lock import lock_image
from qcow2.node.gate import ANY, BACKING, DATA, Gate
from qcow2.node.logplace import all_logs, find_log, origin_of, remove_log
from qcow2.plane.linklog import MAX_LOG_BYTES, RECORDS_OFFSET, FoundLog, Link, Mark, read_log

log = logging.getLogger("qcow2")


class LogNotFound(ImageError):
    """Acknowledged writes are in a link log that cannot be had; the image is not written to without a word for that."""


class _Unusable(Exception):
    """Why the log does not do."""


def recover(
    file: HostFile,
    directory: str,
    *,
    gate: Gate = ANY,
    discard: bool = False,
    on_wait: Callable[[], None] = lambda: None,
    data_file: HostFile | None = None,
) -> None:
    """Bring the links that a killed process left waiting into the image in *file*, locked for writing.

    *data_file*, locked likewise, is what they lead to if it is another file. So it does with those of the image below,
    if the process died right after it had put *file* over that; that comes first, since *file* is what tells. *gate*
    opens that image, and *on_wait* is called while it is locked.
    With *discard* the image goes on without a log that is missing, cannot be read or is of another state. So it does,
    with a line, if the host was started anew since: that is a power loss, as far as memory goes.
    Raises: LogNotFound; OSError if links cannot be written, the log stays then; ImageError.
    """
    header = run(read_header(file, trust_refcounts=False))
    if not header.log_mark:
        _look_for_leftovers(file, header, directory)
        return
    mark = Mark.parse(header.log_mark)
    below = _below_that_waits(file, header, directory, gate, discard=discard)
    if below is not None:
        with gate.open(file.path, BACKING, below, writable=True) as opened:
            lock_image(opened.fd, opened.path, writable=True, on_wait=on_wait)
            with open_data_file(opened, gate, on_wait) as data:
                recover(opened, directory, gate=gate, discard=discard, on_wait=on_wait, data_file=data)
    memory = find_log(mark.tag, directory)
    try:
        found, links = _waiting(file, mark, memory)
    except _Unusable as problem:
        if mark.stamp:
            _go_on_without(file, mark, directory, str(problem), discard=discard)
        else:
            log.info("%s: the live bits of its bitmaps are lost: they report too much", file.path)
        run(clear_mark(file))
        return
    if found.live is not None:
        run(restore_bits(file, header, found.live))
    outcome = run(replay(file, header, links, data_file))
    if outcome.dropped:
        log.warning("%s: %d clusters that were never flushed are lost", file.path, outcome.dropped)
    if memory is not None and _is_of(file, found):
        remove_log(memory)


@contextmanager
def open_data_file(
    file: HostFile, gate: Gate = ANY, on_wait: Callable[[], None] = lambda: None
) -> Iterator[HostFile | None]:
    """The file that links of the image in *file* lead to, locked for writing; None if none waits, or it is that itself.

    Raises: OSError, ImageError.
    """
    header = run(read_header(file, trust_refcounts=False))
    if not Mark.parse(header.log_mark).stamp or not header.data_file_name:
        yield None
        return
    with gate.open(file.path, DATA, header.data_file_name, writable=True) as data_file:
        lock_image(data_file.fd, data_file.path, writable=True, on_wait=on_wait)
        yield data_file


def _below_that_waits(file: HostFile, header: Header, directory: str, gate: Gate, *, discard: bool) -> str | None:
    """What the image calls the one below, if links of that wait, too, as the image's own log says.

    It is looked at without a lock: while it has a writer, what its header says is of no account.
    """
    name = header.backing_name
    if name is None or header.backing_format != "qcow2":
        return None
    with gate.open(file.path, BACKING, name, writable=False) as below:
        mark = Mark.parse(run(read_header(below, trust_refcounts=False)).log_mark)
    if not mark.stamp or mark.tag != _tag_below(file, Mark.parse(header.log_mark), directory, discard=discard):
        return None
    return name


def _tag_below(file: HostFile, mark: Mark, directory: str, *, discard: bool) -> int:
    """Whose links may wait below the image, by its own log; 0: nobody's, or nobody knows and that is accepted."""
    try:
        found, _ = _waiting(file, mark, find_log(mark.tag, directory))
    except _Unusable as problem:
        _go_on_without(file, mark, directory, str(problem), discard=discard)
        return 0
    return found.below


def tell_of_waiting(file: HostFile, word: int, *, needs_all: bool) -> None:
    """Say that a reader of the image in *file*, whose header's mark is *word*, does not see all that was written.

    Raises: UnsupportedImage for a reader that *needs_all*, unless the host has been started anew since: they are lost.
    """
    mark = Mark.parse(word)
    if not mark.stamp:
        return
    if needs_all and not this_boot().is_other_unit(mark.boot_unit):
        message = "writes wait in its link log and would be missing: open it for writing once, or give -U"
        raise UnsupportedImage(file.path, message)
    log.warning("%s: writes that wait in its link log are not shown: open it for writing once", file.path)


def _waiting(file: HostFile, mark: Mark, memory: SharedMemory | None) -> tuple[FoundLog, list[Link]]:
    """The log of the image, and what waited in it. Raises: _Unusable."""
    if memory is None:
        raise _Unusable("is not there")
    try:
        content = memory.load(lambda user: may_write(os.fstat(file.fd), user), MAX_LOG_BYTES)
    except OSError as error:
        raise _Unusable(f"cannot be read: {error.strerror}") from error
    found = read_log(content)
    if found is None or found.tag != mark.tag:
        raise _Unusable("is no link log")
    if not found.origin.boot.is_same(this_boot()):
        raise _Unusable("is of another boot of this host")
    links = found.links_at(mark.stamp)
    if links is None:
        raise _Unusable("goes on from another state of this image, which was restored or copied")
    return found, links


def _go_on_without(file: HostFile, mark: Mark, directory: str, problem: str, *, discard: bool) -> None:
    name = f"link log {mark.tag:06x} in {directory}"
    if this_boot().is_other_unit(mark.boot_unit):
        log.warning("%s: the host was started anew: writes that were never flushed before are lost", file.path)
    elif discard:
        log.warning("%s: %s %s: writes that were never flushed are lost", file.path, name, problem)
    else:
        raise LogNotFound(
            file.path,
            f"{name} {problem}: acknowledged writes that were never flushed are in it; say where it is "
            "(--link-log=DIR) or that they may be lost (--discard-link-log)",
        )


def _look_for_leftovers(file: HostFile, header: Header, directory: str) -> None:
    """The image names no log: done with, unless somebody who does not know of logs has written to it since a death.

    It may also be another image that got the numbers and the name of a dead one, so what has links that are not in the
    image stays.
    """
    for memory in all_logs(directory):
        found = _load_own(file, memory, has_moved=_says_nothing)
        if found is None:
            continue
        links = found.newest_links()
        if not links or run(are_in(file, header, links)):
            remove_log(memory)  # its process died when it had done everything but that
        elif found.origin.boot.is_same(this_boot()):
            log.warning(
                "%s: link log %s has writes of a file of this name, never flushed: "
                "lost, if another program wrote to it since; see qcow2 link-logs",
                file.path,
                memory.path,
            )


def remove_logs_of(file: HostFile, directory: str) -> None:
    """Remove the logs that dead processes left for *file*, which is worth nothing itself."""
    for memory in all_logs(directory):
        if _load_own(file, memory) is not None:
            remove_log(memory)


def _says_nothing(found: FoundLog) -> bool:
    """Whether nothing is lost with a log, and what is where it was made names another: that has another name by now."""
    return not (found.newest_links() or found.live or found.below or _may_name(os.fsdecode(found.origin.path), found))


def _may_name(path: str, found: FoundLog) -> bool:
    """Whether the image at *path*, if one is there, names the log, or nobody knows."""
    try:
        with HostFile.open(path) as file:
            return Mark.parse(run(load_header(file)).log_mark).tag == found.tag
    except (ImageError, FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False
    except OSError:
        return True


def _load_own(
    file: HostFile, memory: SharedMemory, has_moved: Callable[[FoundLog], bool] = lambda found: False
) -> FoundLog | None:
    """The log in *memory*, if a dead process of this user left it for the file with these numbers and this name.

    With another name *has_moved* decides.
    """

    def is_ours(user: int) -> bool:
        return user == os.geteuid()

    try:
        found = read_log(
            memory.load(is_ours, MAX_LOG_BYTES, RECORDS_OFFSET)
        )  # most logs are others': a look at the header tells
        if found is None or not _is_of(file, found) or is_in_use(memory.path):
            return None
        found = read_log(memory.load(is_ours, MAX_LOG_BYTES))
    except OSError:
        return None
    is_ours_still = found is not None and (found.origin.path == origin_of(file).path or has_moved(found))
    return found if is_ours_still else None


def _is_of(file: HostFile, found: FoundLog) -> bool:
    """Whether the log was made for this very file, and not for the one that it is a copy of."""
    here = origin_of(file)
    return (found.origin.device, found.origin.inode) == (here.device, here.inode)


def may_write(status: os.stat_result, user: int) -> bool:
    """Whether *user* may write the image of *status*, and so may say in a log what it holds; we may, and root."""
    if user in (0, os.geteuid(), status.st_uid) or status.st_mode & stat.S_IWOTH:
        return True
    return bool(status.st_mode & stat.S_IWGRP) and status.st_gid in _groups_of(user)


def _groups_of(user: int) -> list[int]:
    try:
        known = pwd.getpwuid(user)
    except KeyError:
        return []
    return os.getgrouplist(known.pw_name, known.pw_gid)
