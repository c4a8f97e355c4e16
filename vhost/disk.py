"""An image under a device: its requests as coroutines of the engine."""

import errno
import logging
import os
from collections.abc import Callable, Collection, Coroutine
from functools import partial
from typing import Any, Protocol

from qcow2 import ImageError
from qcow2.driver import operation as op
from qcow2.driver.file import HostFile
from qcow2.driver.task import Task
from qcow2.engine.image import Image
from qcow2.engine.linkpolicy import LinkPolicy
from qcow2.error import no_memory
from qcow2.node.node import Node, growth
from qcow2.node.overlay import Overlay
from ring.extent import ExtentMap
from ring.request import Request
from ring.trace import Trace
from ring.worker import Worker
from vhost.admission import Admission
from vhost.frozen import Frozen
from vhost.held import HeldImage
from vhost.option import CacheMode
from vhost.past import Past
from vhost.problem import Told, describe, problem_of
from vhost.ringdriver import RingDriver
from virtio.block import CHANGES, UNMAP, RequestType, Status
from virtio.config import Properties
from virtio.native import NativeBlock

log = logging.getLogger("vhost")


Nodes = tuple[Node, Node | None]  # what is served, and what is written beside it


class Layer(Protocol):
    """What lies over an image and sees each change that a guest makes; its methods promise what those of `Node` do."""

    async def write(self, guest_offset: int, source: op.Buffer) -> None: ...
    async def write_zeroes(self, guest_offset: int, nbytes: int, *, unmap: bool) -> None: ...
    async def discard(self, guest_offset: int, nbytes: int) -> None: ...
    async def grow(self, nbytes: int) -> None: ...


class ImageBackend:
    """An image as a `Backend`; while a worker has it, nobody else may touch it."""

    def __init__(
        self,
        held: HeldImage,
        *,
        cache: CacheMode,
        trace: Trace | None = None,
        driver: Callable[[Worker, dict[op.File, int], Trace | None], RingDriver] = RingDriver,
    ) -> None:
        """With *trace* the image, which is held, is never let go: a trace tells of one holding."""
        self._new_driver = driver
        self.lease = None if trace is not None else held
        self._held = held
        self._cache = cache
        self._trace = trace
        self._slots: dict[op.File, int] = {}
        self.told = Told()
        self._links_wait = False
        self._past: Past | None = None  # what FLUSH waits for after a snapshot
        self._frozen: Frozen | None = None  # whom changes ask first
        self.layer: Layer | None = None  # what changes go through, for as long as a worker has the image
        self._failed: Node | None = None  # which takes no more writes

    @property
    def properties(self) -> Properties:
        """What the driver learns about the disk."""
        return self._held.properties

    @property
    def has_failed(self) -> bool:
        """For any thread: whether what is held takes no more writes."""
        disk = self._held.disk
        return disk is not None and disk.image is self._failed

    def attach(self, worker: Worker, block: NativeBlock) -> None:
        self._worker = worker
        self._block = block
        self._slots = {}
        self._driver = self._new_driver(worker, self._slots, self._trace)
        self._admission: Admission[Request] = Admission(
            lambda request: self._begin(request, lambda: self._admission.end(request.queue))
        )
        self._take()
        if self._trace is not None:
            self._begin_trace(self._trace)

    def exchange(self, swap: Callable[[], None]) -> None:
        past = (self._image, self._beside)
        self._let_go()
        swap()
        self._forget_files(self._slots.keys() - set(self._held.files), past)
        self._take(past[1])

    def _take(self, past: Node | None = None) -> None:
        """Serve what is held; files that have a slot keep it. *past* was beside before."""
        assert self._held.disk is not None
        block, slots = self._block, self._slots
        self._image = self._held.disk.image
        if self._past is not None and self._past.is_late and self._held.disk.chain.end_below is None:
            self._past = None  # it was let go meanwhile, or another disk is served
        self._beside = None if self._held.beside is None else self._held.beside.image
        for file in self._held.files:
            if file not in slots:
                slots[file] = self._add_file(file)
                _set_slot(file, slots[file], (self._image, self._beside))
        if self._beside is not None and self._beside is not past:
            for each, slot in slots.items():  # it may be over some that stay
                self._beside.set_slot(each, slot)
        if not self._image.read_only:
            names = self._image.file
            block.set_sync_slot(slots[self._image.data_file], None if names is self._image.data_file else slots[names])
        extent_map = self._image.extent_map
        block.set_extent_map(None if extent_map is None else ExtentMap(*extent_map))
        if self._frozen is not None and self._frozen.image is not self._image:
            self._lose_frozen(self._frozen)
        self._ask_frozen()
        self._image.on_failure = self._refuse_writes
        self._image.on_bitmaps_void = self._tell_of_void_bitmaps
        self._image.set_link_policy(
            LinkPolicy(
                has_log=self._may_have_log(self._image),
                may_wait=lambda: not block.writethrough,
                on_waiting=self._set_links_wait,
                on_log_lost=self._tell_of_lost_log,
            )
        )
        self._set_links_wait(isinstance(self._image, Image) and self._image.has_waiting_links)
        if self._beside is not None:
            self._beside.set_link_policy(LinkPolicy(has_log=self._may_have_log(self._beside)))

    def _may_have_log(self, image: Node) -> bool:
        """Not where a barrier costs nothing, nor where the mark in the image could hang this thread."""
        return self._cache.sync and image.file in self._slots and self._worker.is_near(self._slots[image.file])

    def _add_file(self, file: HostFile) -> int:
        direct_fd = self._held.direct_fds.get(file, -1)
        return self._worker.add_file(
            file.fd,
            direct_fd=direct_fd,
            sync=self._cache.sync,
            on_sync_failed=partial(self._sync_failed, file),
            traits=self._held.traits[file],
        )

    def _begin_trace(self, trace: Trace) -> None:
        """Record what the files hold, made stable first: what a trace begins with survives every death in it."""
        for file in self._held.files:
            if file.writable:
                os.fdatasync(file.fd)
            trace.add_file(self._slots[file], file.fd, file.path, writable=file.writable)
        self._worker.set_trace(trace)

    def put_between(self, layer: Layer | None) -> None:
        """Let every change of the guest go through *layer*, until the image is detached.

        Nothing is under way, but where changes are to go through none: those that began go on as they did.
        """
        self.layer = layer
        self._block.set_changes_punt(layer is not None)

    def detach(self) -> None:
        if self._frozen is not None:
            self._lose_frozen(self._frozen)
        self._let_go()
        self._forget_files(self._slots.keys(), (self._image, self._beside))

    def _let_go(self) -> None:
        """The data plane has nothing of the image, but its files."""
        self.put_between(None)
        self._links_wait = False
        self._block.set_extent_map(None)
        self._block.set_sync_slot(None)
        self._block.set_flush_punts(False)

    def _forget_files(self, files: Collection[op.File], nodes: Nodes) -> None:
        for file in list(files):
            _set_slot(file, None, nodes)
            self._worker.remove_file(self._slots.pop(file))

    def start(self, request: Request) -> None:
        if request.type == RequestType.FLUSH:  # one for many, and it holds no buffer
            self._begin(request, lambda: None)
        elif not self._admission.offer(request):
            request.finish(Status.IOERR)

    def _begin(self, request: Request, on_end: Callable[[], None]) -> None:
        changes = request.type != RequestType.IN

        def end(task: Task) -> None:
            request.finish(self._status(task, changes=changes))
            on_end()

        self._driver.run(self._serve(request), end)

    def run(self, coroutine: Coroutine[Any, Any, Any], on_end: Callable[[Task], None]) -> None:
        """Begin *coroutine*, which works on the image beside requests or while they wait; *on_end(task)* is last."""
        self._driver.run(coroutine, on_end)

    def flush(self, done: Callable[[int], None]) -> None:
        self._driver.run(self._flush(), lambda task: done(0 if self._status(task) == Status.OK else -errno.EIO))

    def settle(self, done: Callable[[int], None]) -> None:
        self._driver.run(self._settle(), lambda task: done(0 if self._status(task) == Status.OK else -errno.EIO))

    def await_syncs(self, done: Callable[[int], None]) -> None:
        """Another sync ends after them; links wait on."""
        files = () if self._image.read_only else {self._image.data_file, self._image.file}
        results: list[int] = []

        def end(result: int) -> None:
            results.append(result)
            if len(results) == len(files):
                done(result)

        for file in files:
            self._worker.sync(self._slots[file], end)
        if not files:
            done(0)

    async def _flush(self) -> None:
        if self._past is not None:
            await self._past.wait()
        await self._image.flush()

    @property
    def is_near(self) -> bool:
        """Whether the image's directory may be changed on the worker's thread."""
        return self._worker.is_near(self._slots[self._image.file])

    async def _settle(self) -> None:
        if self._past is not None:
            await self._past.wait()
        await self._image.settle()

    def _set_links_wait(self, they_do: bool) -> None:
        self._links_wait = they_do
        self._block.set_flush_punts(self._links_wait or self._past is not None)

    def freeze(self, frozen: Frozen) -> None:
        """Let what changes the disk ask *frozen* first, from now on."""
        self._frozen = frozen
        self._ask_frozen()

    def thaw(self, frozen: Frozen) -> None:
        """Let nothing ask *frozen* any more."""
        if self._frozen is frozen:
            self._frozen = None
            self._ask_frozen()
            self.go_on()

    def _lose_frozen(self, frozen: Frozen) -> None:
        frozen.lose("the image was let go meanwhile")
        self._frozen = None

    def _ask_frozen(self) -> None:
        self._block.set_frozen(None if self._frozen is None else self._frozen.bits)

    def go_on(self) -> None:
        """Let run what waited for a signal that was set."""
        self._driver.go_on()

    def bring_links(self, image: Image, done: Callable[[str], None]) -> None:
        """*done("")* once the file of *image* alone holds it, which need not be stable, or what failed."""
        self._driver.run(image.bring_links(), lambda task: done(problem_of(task.take_error())))

    def defer_flushes(self, overlay: Overlay, done: Callable[[str, bool], None]) -> None:
        """Let no FLUSH succeed before the name of *overlay*, which is served now, and what is below it are stable.

        Then *done("", False)*; or *done* of what failed, and whether a FLUSH may try again (`Past`).
        """
        past = self._past = Past(overlay, self, self._forget_past)
        self._set_links_wait(self._links_wait)
        self._worker.compute(lambda: None, lambda *_: past.begin(done))  # not before requests go on

    def _forget_past(self) -> None:
        self._past = None
        waiting = isinstance(self._image, Image) and self._image.has_waiting_links
        self._set_links_wait(self._links_wait or waiting)  # the extent map's own, too

    def share_below(self, overlay: Overlay) -> None:
        """As `HeldImage.share_below`."""
        self._held.share_below(overlay)

    def call_host(self, function: Callable[[], None], done: Callable[[None, BaseException | None], None]) -> None:
        """Run *function*, which asks the host for something in the image's directory, beside the worker's thread."""
        run = self._worker.compute if self.is_near else self._worker.call_host  # that one needs a thread
        run(function, done)

    def retire(self, image: Node, done: Callable[[str], None]) -> None:
        """Leave *image*, which was written and is only read now, clean on the disk: *done("")*, or what failed."""
        self._driver.run(image.close(), lambda task: done(problem_of(task.take_error())))

    def grow(self, nbytes: int, done: Callable[[str], None]) -> None:
        """Let the disk be as long, or longer than it is: no more at a time than is soon done."""
        self.change(self._grow(nbytes), done)

    async def _grow(self, nbytes: int) -> None:
        await self._image.grown_size(nbytes)
        await (self.layer or self._image).grow(next(growth(self._image, nbytes)))

    def change(self, change: Coroutine[Any, Any, None], done: Callable[[str], None]) -> None:
        """Await *change* of the image while nothing else is under way: *done("")*, or what failed."""

        def end(task: Task) -> None:
            error = task.take_error()
            if isinstance(error, MemoryError):
                self._image.fail(no_memory())
            done(problem_of(error))

        self._driver.run(change, end)

    async def _serve(self, request: Request) -> int:
        if self._frozen is not None and request.type in CHANGES:
            await self._frozen.save(request.offset, request.nbytes)
        changed = self.layer or self._image
        match request.type:
            case RequestType.IN:
                await self._image.read(request.offset, request.data())
            case RequestType.OUT:
                await changed.write(request.offset, request.data())
            case RequestType.DISCARD:
                await changed.discard(request.offset, request.nbytes)
            case RequestType.WRITE_ZEROES:
                unmap = bool(request.flags & UNMAP)
                await changed.write_zeroes(request.offset, request.nbytes, unmap=unmap)
            case RequestType.FLUSH:
                await self._flush()
            case _:
                return Status.UNSUPP
        return Status.OK

    def _status(self, task: Task, *, changes: bool = True) -> int:
        """How a request ended, which perhaps *changes* the image.

        What is wrong with the image or the host is logged; our own bugs are raised. Where memory ran out between
        two operations nobody knows how far the engine came: the image takes no more writes.
        """
        error = task.take_error()
        if error is None:
            return Status.OK if task.result is None else task.result
        if isinstance(error, MemoryError):
            error = no_memory()
            if changes:
                self._image.fail(error)
        if not isinstance(error, OSError | ImageError):
            raise error
        self._tell(describe(error))
        return Status.IOERR

    def _sync_failed(self, file: HostFile, number: int) -> None:
        """What lies in *file*, or has its data there, takes no more writes: the image, or one that a job writes."""
        assert self._held.disk is not None
        others = self._held.disk.chain.nodes[1:] + ([] if self._beside is None else [self._beside])
        node = next((node for node in others if file in (node.file, node.data_file)), self._image)
        error = OSError(number, f"sync failed: {os.strerror(number)}")
        node.fail(error)  # at once; the rest may have to wait
        self._driver.run(node.lose(error), lambda task: None)

    def _refuse_writes(self) -> None:
        """A metadata write or a sync failed: no success of the data plane may hide it."""
        self._tell(f"{self._image.file.path}: a sync or a write of metadata failed, no more writes")
        self._failed = self._image
        self._block.refuse_writes()

    def _tell_of_void_bitmaps(self) -> None:
        path = self._image.file.path
        self._tell(f"{path}: persistent bitmaps are not maintained: they are void from now on")

    def _tell_of_lost_log(self, error: OSError) -> None:
        self._tell(f"no link log, so the first write to each cluster of an overlay waits for the disk: {error}")

    def _tell(self, text: str) -> None:
        if self.told.is_news(text):
            log.error("%s", text)


def _set_slot(file: op.File, slot: int | None, nodes: Nodes) -> None:
    """Tell whichever of *nodes* is over it."""
    for node in nodes:
        if node is not None:
            node.set_slot(file, slot)
