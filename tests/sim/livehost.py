"""What a daemon has in the real world around a chain of images that changes while it is served, simulated.

A directory is a file of one sector that says which image is the top: a rename writes it, a sync of the directory
makes that stable. What is done to the chain is what ships; what opens, names and locks files is here.
"""

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, TypeVar

from qcow2.driver.memory import SharedMemory
from qcow2.engine.create import Options, create
from qcow2.engine.image import Image
from qcow2.engine.links import LinkPolicy
from qcow2.engine.opened import OpenOptions
from qcow2.engine.statistics import Statistics
from qcow2.format.header import read_header
from qcow2.node.chain import Chain
from qcow2.node.node import Node
from qcow2.node.overlay import Overlay
from ring.worker import Worker
from tests.crash.driver import SECTOR, Effect, Synced
from tests.sim.file import KernelFile
from tests.sim.kernel import Kernel
from tests.sim.life import SimulatedWorker
from vhost.device import Device
from vhost.disk import ImageBackend
from vhost.held import HeldImage
from vhost.heldfiles import HeldFiles
from vhost.leftcopies import LeftCopies
from vhost.overlaywish import overlay_options
from vhost.servedchain import ServedChain
from virtio.config import Properties
from virtio.native import NativeBlock

T = TypeVar("T")
Through = Callable[[Any], Any]  # runs a coroutine as a blocking driver does
NewFile = Callable[[str], KernelFile]
OpenNew = Callable[[KernelFile, Node | None], Image]


class Directory:
    """Which file has the path that is served."""

    def __init__(self, kernel: Kernel, file: KernelFile, top: str) -> None:
        self.file = file
        self._kernel = kernel
        file.write(0, named(top))

    def rename(self, top: str) -> None:
        self._kernel._at_once(Effect("write", self.file, 0, named(top), SECTOR))

    def sync(self) -> None:
        covered = frozenset(number for number, file in self._kernel.pending.items() if file is self.file)
        for number in covered:
            del self._kernel.pending[number]
        self._kernel.journal.append(Synced(self.file, covered))


def named(top: str) -> bytes:
    """What the directory holds if *top* has the path."""
    return top.encode().ljust(SECTOR, b" ")


class OneThread(SimulatedWorker):
    """A worker whose other threads are this one: who waits for it lets it work."""

    def call(self, function: Callable[[], T]) -> T:
        return function()

    def call_patiently(self, function: Callable[[Callable[[], bool]], T], seconds: float) -> T:
        return function(lambda: False)

    def wait(self, future: "Future[T]") -> T:
        while not future.done():
            self.turn()
        return future.result()


class AttachedDevice(Device):
    """A device whose backend is attached, and stays so but for exchanges."""

    def __init__(self, backend: ImageBackend, block: NativeBlock, worker: Worker) -> None:
        self._num_queues = 1
        self._writeback = True
        self.backend = backend
        self.block = block
        self.worker = worker
        self.is_attached = True
        self.on_alone = self.on_shared = lambda: None
        self._lock = threading.Lock()


class SimulatedOverlay(Overlay):
    """An overlay in a new file of the simulated host."""

    def __init__(self, host: "LiveHost", chain: Chain, below: Image, wanted: Options) -> None:
        self.below = below
        self._host = host
        self._chain = chain
        self._top = chain.files[0]
        self._frozen = self._top.path
        new: Any = host.new_image()
        self.file, self.memory = new, new.memory
        over = replace(wanted, backing_name=self._backing_name(), backing_format="qcow2")
        host.through(create(self.file, over))
        self.image = host.open_new(new, below)
        host.through(self.image.make_ready())

    def _backing_name(self) -> str:
        return self.below.file.path

    def name_frozen(self) -> None:
        """Each file has a name of its own from the start."""

    def make_tables(self, used: Iterable[range]) -> None:
        self._host.through(self.image.make_tables(used))

    def begin_log(self) -> None:
        if self.below.lets_links_wait:
            self._host.through(self.image.begin_log())

    def let_links_wait(self) -> bool:
        return bool(self._host.through(self.image.lie_over(self.below)))

    def switch(self) -> None:
        self._host.directory.rename(self.file.path)

    def sync_names(self) -> None:
        self._host.directory.sync()

    def adopt(self) -> SharedMemory | None:
        super().adopt()
        self._host.on_frozen(self._frozen)
        return None

    def discard(self) -> None:
        """It has never been named."""


class LiveHost(HeldImage):
    """The image that is served, and the files of its chain."""

    def __init__(
        self, chain: Chain, directory: Directory, new_file: NewFile, open_new: OpenNew, through: Through
    ) -> None:
        self.every_file: list[Any] = [*chain.files]  # all that ever were
        self.directory = directory
        self.open_new = open_new
        self.through = through
        self.disk: Any = LiveDisk(chain)
        self.beside: Any = None
        self.options: Any = SimpleNamespace(
            format="qcow2",
            blk_file="disk",
            data_file=None,
            link_log="",
            allow_files=None,
            control=None,
            sandbox=False,
        )
        self.left_copies = LeftCopies()
        self._files = HeldFiles(are_direct=False, on_wait=lambda: None)
        for file in chain.files:
            self._files.add_written(file, is_direct=False)
        self.on_frozen: Callable[[str], None] = lambda path: None  # the overlay of *path* is served
        self._new_file = new_file
        self._opening = OpenOptions(writable=True)
        self._past = Statistics()

    @property
    def properties(self) -> Properties:
        return Properties(size=self.disk.image.size)

    def new_file(self, path: str) -> KernelFile:
        file = self._new_file(path)
        self.every_file.append(file)
        return file

    def new_image(self) -> KernelFile:
        """A file that may come to be served; later ones have higher numbers."""
        return self.new_file(f"f{len(self.every_file)}")

    @property
    def files(self) -> list[Any]:
        beside = [] if self.beside is None else self.beside.files
        return [*dict.fromkeys([*self.disk.files, *beside])]  # the two may share what is below

    def prepare_overlay(self, name: str, given: Mapping[str, str]) -> Overlay:
        image = self.disk.image
        overlay = SimulatedOverlay(self, self.disk.chain, image, overlay_options(image, given))
        self._files.add_written(overlay.file, is_direct=False)
        return overlay

    def discard_overlay(self, overlay: Overlay) -> None:
        self._files.forget([overlay.file])

    def share_below(self, overlay: Overlay) -> None:
        self._keep_from_writing(overlay.below.file)

    def prepare_writer(self, node: Node, nbytes: int) -> Any:
        file: Any = node.file
        file.writable = True
        options = OpenOptions(writable=True, lazy_refcounts=False, cache_size=0)
        opened = self.through(Image.open(file, backing=node.backing, options=options))
        if opened.size < nbytes:
            self.through(opened.grow(nbytes))
        return SimpleNamespace(node=opened, past=node)

    def discard_writer(self, opened: Any) -> None:
        self.through(opened.node.close())
        self._keep_from_writing(opened.node.file)

    def adopt_writer(self, opened: Any) -> list[Callable[[], None]]:
        chain = self.disk.chain
        depth = chain.nodes.index(opened.past)
        chain.nodes[depth] = chain.written_below = opened.node
        chain.nodes[depth - 1].show_below(opened.node)
        opened.node.set_slot(opened.node.file, opened.past._slot)  # of the same file, which a worker keeps
        return []

    def share(self, node: Node) -> None:
        if self.disk.chain.written_below is node:
            self.disk.chain.written_below = None
        self._keep_from_writing(node.file)

    def _keep_from_writing(self, file: Any) -> None:
        """Whoever writes there from now on is found out."""
        file.writable = False

    def open_beside(self, path: str, image_format: str, *, writable: bool = True) -> Any:
        file = next(file for file in self.every_file if file.path == path)
        files = {each.path: each for each in self.every_file}
        below = self.through(backing_of(files, file))
        chain = Chain(files=[file], nodes=[self.open_new(file, below)])
        while below is not None:
            chain.files.append(below.file)
            chain.nodes.append(below)
            below = below.backing
        self._files.add_written(file, is_direct=False)
        return LiveDisk(chain)

    def serve_beside(self) -> Any:
        past = self.disk
        past.image.on_failure = lambda: None
        past.image.set_link_policy(LinkPolicy())
        self.disk, self.beside = self.beside, None
        return past

    def close_beside(self, disk: Any) -> None:
        """As it is: nobody wants it."""
        self._keep_from_writing(disk.files[0])

    def close_clean(self, disk: Any) -> None:
        self.through(disk.image.close())
        self._keep_from_writing(disk.files[0])

    def require_nameable(self, name: str | None) -> None:
        """Any is."""

    def drop_between(self, base: Node | None) -> list[Callable[[], None]]:
        self.disk.chain.drop_between(base)
        return []


class LiveDisk:
    """An image that is open, and its chain."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.image: Any = chain.nodes[0]

    @property
    def files(self) -> list[Any]:
        return self.chain.files

    @property
    def size(self) -> int:
        return int(self.image.size)


class LiveChain(ServedChain):
    """Files are called by their paths."""

    def below(self, name: str) -> Node:
        assert self.held.disk is not None
        for node in self.held.disk.chain.nodes[1:]:
            if node.file.path == os.path.basename(name):
                return node
        raise ValueError(f"{name}: is not in the chain")


async def open_chain(files: Mapping[str, Any], name: str, *, writable: bool = False) -> Image:
    """The image *name* of *files*, over what it names."""
    file = files[name]
    options = OpenOptions(writable=writable, cache_size=0)
    return await Image.open(file, backing=await backing_of(files, file), options=options)


async def backing_of(files: Mapping[str, Any], file: Any) -> Image | None:
    """What the image in *file* names as its backing file, opened to be read."""
    below = (await read_header(file, trust_refcounts=False)).backing_name
    return None if below is None else await open_chain(files, below)
