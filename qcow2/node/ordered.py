"""What comes before the first write to a qcow2 image: one that was not closed cleanly is brought in order.

Imported when an image is opened for writing, with all that changes images: a sandboxed process could not import later.
"""

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
from qcow2.node.recovery import recover
from qcow2.plane.linklog import LinkLog

if TYPE_CHECKING:
    from qcow2.node.chain import Chain


def bring_links_in(chain: "Chain", file: HostFile, data_file: HostFile | None) -> None:
    """Let the image in *file* hold what a killed process left in its link log. Raises: OSError, ImageError."""
    recover(
        file,
        chain.log_directory,
        gate=chain.gate,
        discard=chain.discard_log,
        on_wait=chain.on_wait,
        data_file=data_file,
    )


def begin_log(chain: "Chain", file: HostFile, header: Header) -> LinkLog:
    """A log for links of the image, made when the first one waits."""
    log, chain.memory = new_log(file, chain.log_directory, has_subclusters=header.record.has_subclusters)
    return log


def reopen_qcow2(image: Image, file: HostFile, options: OpenOptions) -> Image:
    """The *image*, which is only read, once more in *file*, for writing. Raises: OSError, ImageError.

    Writes that wait in its link log would change what shows: those who read it see it without them.
    """
    header = run(read_header(file, trust_refcounts=False))
    if header.log_mark:
        raise UnsupportedImage(file.path, "writes wait in its link log: open it for writing once, by itself")
    repair_unclean(file, header, None)
    return run(Image.open(file, backing=image.backing, options=options))


def repair_unclean(file: HostFile, header: Header, progress: Progress | None) -> None:
    """Make the refcounts of an image that was not closed cleanly right. Raises: OSError, ImageError."""
    if not header.is_dirty:
        return
    require_uncorrupted(file, header)
    report = run(repair(file, progress=progress))
    if report.unsound:
        message = f"not closed cleanly, and {report.unsound} errors cannot be repaired; see qcow2 check"
        raise CorruptImage(file.path, HEADER_INCOMPATIBLE_OFFSET, message)
