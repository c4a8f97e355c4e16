"""A new top for an open chain: an overlay made beside the image, which takes its name in one step.

The content of that moment is frozen under a name of its own, and the path that is served stays the top of the chain:
who opens it after a death at any point finds the image as it was, or the overlay over it.
"""

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import replace

from qcow2.driver.file import HostFile, run
from qcow2.driver.memory import SharedMemory
from qcow2.driver.operation import Compute
from qcow2.engine.create import Options, create
from qcow2.engine.encryption import encrypted_alike
from qcow2.engine.image import Image
from qcow2.engine.opened import OpenOptions
from qcow2.error import NotTried, UnsupportedImage
from qcow2.format.header import Header
from qcow2.lock import lock_image, show_life
from qcow2.node.chain import Chain
from qcow2.node.gate import BACKING
from qcow2.node.leftover import hidden, remove_overlay, require_own_name
from qcow2.node.logplace import new_log
from qcow2.node.ownership import own_as


class Overlay:
    """An empty image over the top of a chain: open, locked, stable, and under a name that nobody uses.

    `name_frozen`, then `switch`, then `adopt` and `sync_names`; or, before `switch`, `discard`.
    """

    def __init__(self, chain: Chain, below: Image, name: str, wanted: Options, options: OpenOptions) -> None:
        """*name* is what *below* shall be called, as seen from its directory. The overlay is to be as *wanted*.

        Raises: OSError, FileExistsError if something else has that name; UnsupportedImage, of a full chain, too;
        ValueError.
        """
        self.below = below
        self._chain = chain
        self._top = chain.files[0]
        self._path = os.path.realpath(self._top.path)
        self._frozen = os.path.join(os.path.dirname(self._path), name)
        self._temporary = hidden(self._path, "overlay")
        self._was_named = False
        self._memory_below: SharedMemory | None = None
        chain.require_room()
        self._require_names(name, below.header)
        remove_overlay(self._top.path, chain.log_directory)
        self.file, self.memory = self._make_file(), SharedMemory("")
        try:
            self.image = self._make_image(wanted, options)
        except BaseException:
            self.discard()
            raise

    def _require_names(self, name: str, header: Header) -> None:
        path = self._top.path
        require_own_name(name)
        if header.record.has_data_file and (self._chain.data_file is not None or not header.data_file_name):
            raise UnsupportedImage(path, "frozen, it would have to name its data file itself")
        if not stat.S_ISREG(os.stat(self._path).st_mode):
            raise UnsupportedImage(path, "not a regular file: nothing can take its name")
        if not os.path.samestat(os.stat(self._path), os.fstat(self._top.fd)):
            raise OSError(errno.ESTALE, "another file has this name by now", path)
        has_moved = not os.path.samefile(os.path.dirname(self._frozen), os.path.dirname(self._path))
        is_ours = not has_moved and os.path.basename(self._frozen) in map(
            os.path.basename, (self._path, self._temporary)
        )
        if is_ours or (os.path.lexists(self._frozen) and not self._is_top(self._frozen)):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self._frozen)
        for what, named in (("backing", header.backing_name), ("data", header.data_file_name)):
            if has_moved and named is not None and not os.path.isabs(named):
                message = f"its {what} file {named!r} is named from its directory, which {name!r} would leave"
                raise UnsupportedImage(path, message)
        self._chain.gate.way(self._path, BACKING, self._backing_name())  # or the next open would be refused

    def _is_top(self, path: str) -> bool:
        return leads_to(path, self._top)

    def _make_file(self) -> HostFile:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        file = HostFile(self._top.path, os.open(self._temporary, flags, 0o600), writable=True)
        try:
            own_as(file, self._top)
            lock_image(file.fd, self._temporary, writable=True)
            file.life_fd = show_life(self._temporary, file.fd)
        except BaseException:
            file.close()
            os.unlink(self._temporary)
            raise
        return file

    def _make_image(self, wanted: Options, options: OpenOptions) -> Image:
        self._chain.gate.way(self._top.path, BACKING, self._backing_name())  # or the next one could not open it
        with encrypted_alike(options.keys, self._top.path, self.below.cipher) as encryption:
            over = replace(wanted, backing_name=self._backing_name(), backing_format="qcow2", encryption=encryption)
            run(create(self.file, over))
        log, self.memory = new_log(self.file, self._chain.log_directory, has_subclusters=wanted.has_subclusters)
        image = run(Image.open(self.file, backing=self.below, options=options, log=log))
        run(image.make_ready())
        return image

    def _backing_name(self) -> str:
        """From the directory of both, if it is one, also for who comes by a link; a colon in it is no protocol's."""
        directory, base = os.path.split(self._frozen)
        namers = (self._path, os.path.abspath(self._top.path))
        if not all(os.path.samefile(directory, os.path.dirname(namer)) for namer in namers):
            return self._frozen
        return f"./{base}" if ":" in base else base

    def name_frozen(self) -> None:
        """Give what is below its new name beside the old one, stable on return. Raises: OSError."""
        if not os.path.lexists(self._frozen):
            self._link_frozen()
            self._was_named = True
        if (
            not self._is_top(self._frozen) or os.fstat(self._top.fd).st_nlink < 2
        ):  # or `switch` would take the last name
            raise FileExistsError(errno.EEXIST, "is no second name of the image", self._frozen)
        sync_directory(self._frozen)

    def _link_frozen(self) -> None:
        try:
            os.link(self._path, self._frozen, follow_symlinks=False)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            raise OSError(errno.EXDEV, f"has to be on the file system of {self._path}", self._frozen) from error

    def make_tables(self, used: Iterable[range]) -> None:
        """Have L2 tables where the disk is *used*: a first write there is no other than the next. Raises: OSError."""
        run(self.image.make_tables(used))

    def begin_log(self) -> None:
        """Begin the link log of the overlay, if one is to be had: `let_links_wait` wants it. Raises: OSError."""
        if self.below.lets_links_wait:
            run(self.image.begin_log())

    def let_links_wait(self) -> bool:
        """Whether links of what is below may wait past the `switch`: who opens the overlay after a kill brings them in.

        Nothing is under way. Raises: OSError, and then nothing has changed.
        """
        return bool(run(self.image.lie_over(self.below)))

    def switch(self) -> None:
        """Take the name of what is below. Raises: OSError, and then nothing has changed.

        That need not be stable, nor what is below: who says that a write is stable waits for both (`sync_names`).
        """
        os.rename(self._temporary, self._path)

    def switch_back(self) -> None:
        """Undo `switch`, before `adopt`. Stable on return, or the new name stays, which the overlay may need.

        Raises: OSError; a restart then finds the overlay, over what is served.
        """
        was_named, self._was_named = self._was_named, False
        os.link(self._frozen, self._temporary, follow_symlinks=False)
        os.rename(self._temporary, self._path)
        sync_directory(self._path)
        self._was_named = was_named

    def sync_names(self) -> None:
        """Make the name that was taken stable. Raises: OSError."""
        sync_directory(self._path)

    def adopt(self) -> SharedMemory | None:
        """Make the overlay the top of the chain. -> where the log of what is below lies, of no use once that is closed.

        The chain closes all files from now on.
        """
        past, self._chain.memory = self._chain.memory, self.memory
        self._memory_below = past
        self._top.path = self._frozen
        self._chain.files.insert(0, self.file)
        self._chain.nodes.insert(0, self.image)
        return past

    def keep_below(self) -> None:
        """Leave it to `end_below`, whoever calls that first, to close what is below: links of it wait."""
        self._chain.end_below = self.end_below

    async def end_below(self) -> None:
        """Leave what is below clean, and no log of it; all that it was, and the name, is stable on return.

        Raises: OSError, ImageError.
        """
        await self.below.close()
        await Compute(self.sync_names)
        await self.image.forget_below()
        if self._memory_below is not None and self._memory_below.is_made:
            self._memory_below.remove()
        self._chain.end_below = None

    @property
    def files_below(self) -> set[HostFile]:
        """Those that what is below was written to."""
        return {self._top, *(file for file in self._chain.data_files if file is self.below.data_file)}

    def discard(self) -> None:
        """Remove the overlay and the new name; `switch` has not been called, or has failed."""
        with ExitStack() as stack:  # one that fails keeps none of the others
            # a rename may have been done and say it failed: then the new name is the last one
            if self._was_named and self._is_top(self._path) and self._is_top(self._frozen):
                stack.callback(os.unlink, self._frozen)
            stack.callback(_remove, self._temporary)
            stack.callback(self.file.close)
            stack.callback(self.memory.remove if self.memory.is_made else self.memory.close)


def leads_to(path: str, file: HostFile) -> bool:
    """Whether *path* itself, no link to it, is a name of *file*. Raises: OSError."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(file.fd))
    except FileNotFoundError:
        return False


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def open_directory(path: str) -> int:
    """A descriptor of the directory of *path*, to sync it. Raises: NotTried."""
    try:
        return os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise NotTried(error.errno, error.strerror, error.filename) from error


def sync_directory(path: str) -> None:
    """Make the names in the directory of *path* stable. Raises: OSError."""
    fd = open_directory(path)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
