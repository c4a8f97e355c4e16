"""Stream a chain into its top on the disk of this host."""

from qcow2.driver.file import run
from qcow2.driver.pool import PoolDriver
from qcow2.engine.image import Image
from qcow2.job.crew import WIDTH
from qcow2.job.pace import Pace
from qcow2.job.stream import name_of_base, stream
from qcow2.library.commit import depth_of
from qcow2.library.disk import open_disk
from qcow2.library.hostfile import require_way
from qcow2.library.key import Key
from qcow2.library.own_thread import undisturbed


def stream_image(path: str, base: str | None, pace: Pace, *, key: Key = None) -> None:
    """Let the image at *path* be right over *base*, one of the files under it, or over nothing, and show the same.

    Stable on return. Raises: OSError, ImageError, Cancelled; it is over the old chain then.
    """
    depth = None if base is None else depth_of(path, "qcow2", base)
    with open_disk(path, writable=True, key=key) as disk:
        overlay = disk.image
        assert isinstance(overlay, Image)
        below = None if depth is None else disk.chain.nodes[depth]
        name, image_format = name_of_base(overlay, below)
        if below is not None and name is not None:
            require_way(overlay.file, name, below.file)

        def work() -> None:
            with PoolDriver(WIDTH) as driver:
                driver.run(stream(overlay, below, pace))
            run(overlay.put_over(below, name, image_format))

        undisturbed(work, pace)
