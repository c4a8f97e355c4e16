"""One line about what a shrink left behind that was interrupted: nothing else tells before QEMU lets the disk grow."""

from qcow2.driver.file import HostFile, run
from qcow2.format.geometry import Geometry
from qcow2.format.header import read_header
from qcow2.judge.pastend import maps_past_end
from qcow2.tool.identity import is_qemu_img, say


def warn_of_rest(file: HostFile) -> None:
    """Say what to do if something is mapped past the end of the image in *file*; scripts know no such line of qemu-img.

    Raises: OSError, ImageError.
    """
    if is_qemu_img():
        return
    header = run(read_header(file, trust_refcounts=False))
    if run(maps_past_end(file, header)):
        left = f"{file.path}: something is mapped past its end, as a shrink that was interrupted leaves it"
        say(f"{left}: qcow2 resize --shrink {file.path} {Geometry.of(header.record).size} takes it away")
