"""Opening a qcow2 image of a chain: what was not closed cleanly is brought in order, what it names opened before it."""

from typing import TYPE_CHECKING

from qcow2.driver.file import HostFile, run
from qcow2.engine.image import Image
from qcow2.engine.opened import OpenOptions
from qcow2.error import CorruptImage, UnsupportedImage
from qcow2.format.header import Header, read_header, require_uncorrupted
from qcow2.format.layout import HEADER_INCOMPATIBLE_OFFSET
from qcow2.judge.census import Progress
from qcow2.judge.repair import repair
from qcow2.node.logplace import new_log
from qcow2.node.node import Node
from qcow2.node.recovery import recover, warn_of_waiting

if TYPE_CHECKING:
    from qcow2.node.chain import Chain


def open_qcow2(chain: "Chain", file: HostFile, options: OpenOptions) -> Image:
    """The image in *file*, which is locked. Raises: OSError, UnsupportedImage, CorruptImage."""
    if options.writable:
        recover(file, chain.log_directory, gate=chain.gate, discard=chain.discard_log, on_wait=chain.on_wait)
    header = run(read_header(file, trust_refcounts=False))
    backing = _open_backing(chain, file, header, options)
    data_file = None if not header.record.has_data_file else chain.open_data_file(file, header.data_file_name, options)
    if options.writable and header.is_dirty:
        _repair(file, header, chain.progress)
    log = None
    if options.writable and file is chain.files[0]:
        log, chain.memory = new_log(file, chain.log_directory, has_subclusters=header.record.has_subclusters)
    elif not options.writable and not chain.force_share:
        warn_of_waiting(file, header.log_mark)
    return run(Image.open(file, backing=backing, data_file=data_file, options=options, log=log))


def reopen_qcow2(image: Image, file: HostFile, options: OpenOptions) -> Image:
    """The *image*, which is only read, once more in *file*, for writing. Raises: OSError, ImageError.

    Writes that wait in its link log would change what shows: those who read it see it without them.
    """
    header = run(read_header(file, trust_refcounts=False))
    if header.log_mark:
        raise UnsupportedImage(file.path, "writes wait in its link log: open it for writing once, by itself")
    if header.is_dirty:
        _repair(file, header, None)
    return run(Image.open(file, backing=image.backing, options=options))


def _open_backing(chain: "Chain", file: HostFile, header: Header, options: OpenOptions) -> Node | None:
    if header.backing_name is None:
        return None
    if header.backing_format is None:
        message = f"the format of backing file {header.backing_name!r} is not recorded, and never guessed"
        raise UnsupportedImage(file.path, message)
    return chain.open_below(file, header.backing_name, header.backing_format, options)


def _repair(file: HostFile, header: Header, progress: Progress | None) -> None:
    """Make the refcounts of an image that was not closed cleanly right."""
    require_uncorrupted(file, header)
    report = run(repair(file, progress=progress))
    wrong = report.check_errors + report.corruptions
    if wrong:
        message = f"not closed cleanly, and {wrong} errors cannot be repaired; see qcow2 check"
        raise CorruptImage(file.path, HEADER_INCOMPATIBLE_OFFSET, message)
