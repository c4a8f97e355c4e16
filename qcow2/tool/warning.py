"""One line about what a reader of the metadata alone does not see in it, and should know."""

from contextlib import suppress

from qcow2.driver.file import HostFile, run
from qcow2.error import ImageError
from qcow2.format.geometry import Geometry
from qcow2.format.header import read_header
from qcow2.judge.pastend import maps_past_end
from qcow2.tool.identity import is_qemu_img, say


def warn_of_waiting(file: HostFile) -> None:
    """Say if acknowledged writes wait in the link log of the image in *file*: their clusters look like leaks."""
    with suppress(OSError, ImageError):
        if mark := run(read_header(file, trust_refcounts=False)).log_mark:
            from qcow2.node.recovery import tell_of_waiting  # the engine

            tell_of_waiting(file, mark, needs_all=False)


def warn_of_rest(file: HostFile) -> None:
    """Say what to do if something is mapped past the end of the image in *file*; scripts know no such line of qemu-img.

    What cannot be read is nothing to say: who asked has the answer.
    """
    if is_qemu_img():
        return
    try:
        header = run(read_header(file, trust_refcounts=False))
        is_left = run(maps_past_end(file, header))
    except (OSError, ImageError):
        return
    if is_left:
        left = f"{file.path}: something is mapped past its end, as a shrink that was interrupted leaves it"
        say(f"{left}: qcow2 resize --shrink {file.path} {Geometry.of(header.record).size} takes it away")
