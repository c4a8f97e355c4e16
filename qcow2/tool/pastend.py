"""One line about what a shrink left behind that was interrupted: nothing else tells before QEMU lets the disk grow."""

from qcow2.driver.file import HostFile, run
from qcow2.error import ImageError
from qcow2.format.geometry import Geometry
from qcow2.format.header import read_header
from qcow2.judge.pastend import maps_past_end
from qcow2.tool.identity import is_qemu_img, say


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
