"""A disk of an open chain that was only read, opened for writing beside that, to take its place.

What is written to it must not be seen: what is above it hides that.
"""

import errno
import os
from contextlib import ExitStack

from qcow2.driver.file import HostFile, run
from qcow2.engine.image import Image
from qcow2.engine.opened import OpenOptions
from qcow2.error import UnsupportedImage
from qcow2.lock import be_read_again, let_write, show_life
from qcow2.node.chain import Chain
from qcow2.node.node import Node
from qcow2.node.ordered import reopen_qcow2
from qcow2.node.raw import RawImage


class Reopened:
    """A second opening of a disk: locked for writing, at least as long as was wanted. `adopt` it, or `discard` it."""

    def __init__(self, chain: Chain, node: Node, readers: list[int], nbytes: int, options: OpenOptions) -> None:
        """*readers* are our descriptions of its file; *nbytes* is how long the disk must be at least.

        Raises: OSError, ImageLocked if others use the file; UnsupportedImage, CorruptImage, ValueError.
        """
        self._chain = chain
        self._depth = next(depth for depth, each in enumerate(chain.nodes) if each is node)
        self._readers = readers
        old = chain.files[self._depth]
        with ExitStack() as undoing:
            self.file = HostFile.open(old.path, writable=True)
            undoing.callback(self.file.close)
            if not os.path.samestat(os.fstat(self.file.fd), os.fstat(old.fd)):
                raise OSError(errno.ESTALE, "another file has this name by now", old.path)
            let_write(self.file.fd, old.path, readers)
            undoing.callback(be_read_again, readers)  # before the other locks go
            self.file.life_fd = show_life(old.path, self.file.fd)
            self.node = _reopen(node, self.file, options)
            if self.node.size < nbytes:
                run(self.node.grow(nbytes))
            undoing.pop_all()

    def adopt(self) -> HostFile:
        """Let it be in the chain in the place of the other; nothing is under way. -> the other's file, to be closed."""
        above, old = self._chain.nodes[self._depth - 1], self._chain.files[self._depth]
        assert isinstance(above, Image)  # nothing else has a backing file
        self._chain.files[self._depth], self._chain.nodes[self._depth] = self.file, self.node
        self._chain.written_below = self.node
        above.show_below(self.node)
        return old

    def discard(self) -> None:
        """Leave it clean, and the chain as it was. Raises: OSError."""
        with ExitStack() as closing:
            closing.callback(self.file.close)
            closing.callback(be_read_again, self._readers)
            run(self.node.close())


def _reopen(node: Node, file: HostFile, options: OpenOptions) -> Node:
    if node.data_file is not node.file:
        raise UnsupportedImage(file.path, "its data is in another file: qcow2 commit can do it")
    if isinstance(node, RawImage) and not node.is_encrypted:
        return run(RawImage.open(file, writable=True))
    if isinstance(node, Image):
        return reopen_qcow2(node, file, options)
    raise UnsupportedImage(file.path, "a format that is not opened for writing while it is used")
