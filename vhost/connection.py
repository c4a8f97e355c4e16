"""One front-end's visit: a session's effects performed on a worker, until the front-end leaves or must go."""

import errno
import logging
import os
import select
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import assert_never

from ring.inflight import InflightRegion
from ring.memory import MemoryRegion
from ring.thread import new_future
from ring.virtqueue import QueueLayout
from vhost import effect, inflight
from vhost.backchannel import BackendChannel
from vhost.channel import Channel, Fds, close_received
from vhost.device import Device
from vhost.message import Inflight, Region, Request
from vhost.problem import describe
from vhost.session import Session
from vhost.vring import Steps

log = logging.getLogger("vhost")


class Connection:
    """A context manager: leaving it drains the rings, forgets the guest's memory and closes the socket."""

    def __init__(self, channel: Channel, session: Session, device: Device) -> None:
        self._channel = channel
        self._session = session
        self._device = device
        self._worker = device.worker
        self._backchannel: BackendChannel | None = None
        self._regions: dict[Region, MemoryRegion] = {}
        self._files: dict[MemoryRegion, tuple[int, int]] = {}  # device and inode of each
        self._note: inflight.WriteCacheNote | None = None

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *exc_info: object) -> None:
        for drained in self._worker.call(self._drain_all):
            self._worker.wait(drained)
        self._worker.call(self._forget)
        self._device.let_go()
        self._close_backchannel()
        self._take_note(None)
        self._channel.close()  # last: who sees the end of the stream knows that we are silent

    def serve(self, stop_fd: int) -> None:
        """Answer messages until *stop_fd* is readable.

        Raises: Hangup, ProtocolViolation, Unavailable; OSError if something failed that was to be done without a word.
        """
        self._device.look()
        self._session.offer = self._device.offer
        while True:
            ready = self._wait(stop_fd)
            if stop_fd in ready:
                return
            if self._backchannel is not None and self._backchannel.fileno() in ready:
                self._receive_ack(self._backchannel)
            if self._device.changed_fd in ready:
                self._learn_offer()
            if self._channel.fileno() in ready:
                self._answer()

    def _wait(self, stop_fd: int) -> set[int]:
        """The fds, of all that one may wait for, that are readable."""
        ready = select.poll()
        for fd in (stop_fd, self._channel.fileno(), self._device.changed_fd):
            ready.register(fd, select.POLLIN)
        if self._backchannel is not None:
            ready.register(self._backchannel, select.POLLIN)
        return {fd for fd, _ in ready.poll()}

    def _learn_offer(self) -> None:
        os.eventfd_read(self._device.changed_fd)
        self._session.offer = self._device.offer
        self._run(self._session.tell_config_change(), Fds(), Request.GET_CONFIG)

    def _receive_ack(self, backchannel: BackendChannel) -> None:
        if not backchannel.receive_ack():
            self._session.lose_backend_channel()
            self._close_backchannel()

    def _close_backchannel(self) -> None:
        if self._backchannel is not None:
            self._backchannel.close()
            self._backchannel = None

    def _answer(self) -> None:
        received = self._channel.receive()
        if received is None:
            return
        message, fds = received
        try:
            self._run(self._session.receive(message), fds, message.request)
        finally:
            fds.close()

    def _run(self, steps: Steps, fds: Fds, request: int) -> None:
        """Perform each effect that *steps*, of *request*, yields and send its result, or its failure, back in."""
        try:
            wanted = next(steps)
            while True:
                try:
                    result = self._perform(wanted, fds)
                except OSError as error:
                    wanted = steps.throw(error)  # or it is the end of the visit, which is told of
                    self._tell(f"the front-end is refused {Request(request).name}: {describe(error)}")
                else:
                    wanted = steps.send(result)
        except StopIteration:
            pass

    def _tell(self, text: str) -> None:
        """Say what is refused."""
        if self._device.told.is_news(text):
            log.warning("%s", text)

    def _perform(self, wanted: effect.Effect, fds: Fds) -> int | None:
        if not isinstance(wanted, effect.SetBackendChannel):
            fds.refuse_sockets()
        match wanted:
            case effect.Reply(request, payload):
                self._channel.reply(request, payload)
            case effect.SetWriteCache(writeback):
                self._worker.wait(self._worker.call(lambda: self._set_write_cache(writeback)))
            case effect.Flush():
                self._flush()
            case effect.SetBackendChannel(acks):
                self._set_backchannel(BackendChannel(fds.take(), acks=acks))
            case effect.TellConfigChange():
                self._tell_config_change()
            case effect.SetMemory(regions):
                self._set_memory({region: _mappable(region, fds) for region in regions})
            case effect.AddMemory(region):
                self._set_memory({**self._regions, region: _mappable(region, fds)})
            case effect.RemoveMemory(region):
                self._set_memory({other: mapped for other, mapped in self._regions.items() if other != region})
            case effect.SetLog(log):
                self._set_log(None if log is None else MemoryRegion(fds.take(), 0, 0, log.size, log.mmap_offset))
            case effect.SetLogCall(has_fd):
                fd = fds.take() if has_fd else None
                self._worker.call(lambda: self._worker.set_log_call(fd))
            case effect.LogBuffers(enabled):
                self._worker.call(lambda: self._worker.log_buffers(enabled))
            case effect.LogQueue(index, guest_address):
                self._worker.call(lambda: self._worker.log_queue(index, guest_address))
            case effect.ShareInflight():
                self._share_inflight(wanted)
            case effect.TrackInflight(told):
                return self._track_inflight(told, fds)
            case effect.ForgetInflight():
                self._worker.call(lambda: self._worker.set_inflight(None))
                self._take_note(None)
            case effect.NoteWriteCache(wce):
                if self._note is not None:
                    self._note.write(wce)
            case effect.TakeBackend():
                self._device.take()
                self._device.admit(files := {*self._files.values()}, files)
                self._session.offer = self._device.offer
            case effect.LetGoOfBackend():
                self._device.let_go()
            case effect.StartQueue():
                return self._start_queue(wanted)
            case effect.StopQueue(index):
                return self._worker.wait(self._worker.call(lambda: self._drain(index)))
            case effect.EnableQueue(index, enabled):
                self._enable(index, enabled)
            case effect.SetKick(index, has_fd):
                self._give_fd(self._worker.set_kick, index, fds, has_fd)
            case effect.SetCall(index, has_fd):
                self._give_fd(self._worker.set_call, index, fds, has_fd)
            case effect.SetErr(index, has_fd):
                self._give_fd(self._worker.set_err, index, fds, has_fd)
            case _:
                assert_never(wanted)
        return None

    def _give_fd(self, take: Callable[[int, int | None], None], index: int, fds: Fds, has_fd: bool) -> None:
        fd = fds.take() if has_fd else None
        self._worker.call(lambda: take(index, fd))

    def _enable(self, index: int, enabled: bool) -> None:
        if enabled:
            self._worker.call(lambda: self._worker.enable_queue(index))
            return
        quiet: Future[None] = new_future()
        self._worker.call(lambda: self._worker.disable_queue(index, lambda: quiet.set_result(None)))
        self._worker.wait(quiet)

    def _set_backchannel(self, backchannel: BackendChannel) -> None:
        self._close_backchannel()
        self._backchannel = backchannel

    def _tell_config_change(self) -> None:
        try:
            if self._backchannel is not None:
                self._backchannel.tell_config_change()
        except OSError:  # the front-end has just closed it: it does not want to know
            self._session.lose_backend_channel()
            self._close_backchannel()

    def _set_memory(self, regions: dict[Region, MemoryRegion]) -> None:
        added = [mapped.fd for region, mapped in regions.items() if self._regions.get(region) is not mapped]
        with _closing_unless_done(added):
            files = {mapped: self._files.get(mapped) or _numbers(mapped.fd) for mapped in regions.values()}
            before = {*self._files.values()}
            self._device.admit(before | {*files.values()}, {*files.values()} - before)  # it may stay as it was
        self._worker.call(lambda: self._worker.set_memory(list(regions.values())))
        self._regions, self._files = regions, files

    def _set_log(self, log: MemoryRegion | None) -> None:
        self._worker.call(lambda: self._worker.set_log(log))

    def _share_inflight(self, wanted: effect.ShareInflight) -> None:
        fd, nbytes = inflight.create(wanted.num_queues, wanted.queue_size, packed=wanted.packed, wce=wanted.wce)
        try:
            answer = Inflight(nbytes, 0, wanted.num_queues, wanted.queue_size)
            self._channel.reply(Request.GET_INFLIGHT_FD, answer.pack(), [fd])
        finally:
            os.close(fd)

    def _track_inflight(self, told: Inflight, fds: Fds) -> bool | None:
        whole = InflightRegion(fds.take(), told.mmap_offset, told.mmap_size, told.num_queues)
        with _closing_unless_done([whole.fd]):
            note = inflight.WriteCacheNote(whole)
        try:
            region = replace(whole, nbytes=whole.nbytes - note.nbytes)
            self._worker.call(lambda: self._worker.set_inflight(region))
        except OSError:
            note.close()
            raise
        self._take_note(note)
        return note.wce

    def _take_note(self, note: inflight.WriteCacheNote | None) -> None:
        if self._note is not None:
            self._note.close()
        self._note = note

    def _start_queue(self, ring: effect.StartQueue) -> bool:
        layout = QueueLayout(
            ring.size, ring.descriptor, ring.available, ring.used, ring.base, ring.event_idx, ring.packed
        )
        try:
            is_tracked = self._worker.call(lambda: self._worker.start_queue(ring.index, layout))
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EFAULT):
                raise
            self._tell(f"queue {ring.index} is not started: {_no_ring(error.errno, layout)}")
            return False
        if not is_tracked:
            self._tell(
                f"queue {ring.index} has {ring.size} entries, more than the in-flight region has room for: "
                "served without"
            )
        return True

    def _flush(self) -> None:
        outcome: Future[int] = new_future()
        self._device.flush(outcome.set_result)
        result = self._worker.wait(outcome)
        if result < 0:
            raise OSError(-result, os.strerror(-result))

    def _set_write_cache(self, writeback: bool) -> "Future[None]":
        """Switch; to writethrough once nothing that was written before waits for a flush any more."""
        self._device.block.set_writethrough(not writeback)
        switched: Future[None] = new_future()
        if writeback:
            switched.set_result(None)
        else:
            self._device.settle(lambda: switched.set_result(None))
        return switched

    def _drain(self, index: int) -> "Future[int]":
        """Begin to drain a queue; the future is its base, once files that may be copied then hold what it wrote."""
        stopped: Future[int] = new_future()

        def settle(base: int) -> None:
            self._device.settle(lambda: stopped.set_result(base))

        self._worker.drain_queue(index, settle)
        return stopped

    def _drain_all(self) -> "list[Future[int]]":
        return [self._drain(index) for index in range(self._session.offer.num_queues)]

    def _forget(self) -> None:
        for index in range(self._session.offer.num_queues):
            self._worker.disable_queue(index, lambda: None)
            self._worker.set_err(index, None)
            self._worker.log_queue(index, None)
        self._worker.set_log(None)
        self._worker.set_log_call(None)
        self._worker.log_buffers(False)
        self._worker.set_memory([])
        self._worker.set_inflight(None)


@contextmanager
def _closing_unless_done(fds: Sequence[int]) -> Iterator[None]:
    """Close *fds*, which nobody has taken yet, if what is to come before that fails."""
    try:
        yield
    except BaseException:
        for fd in fds:
            close_received(fd)
        raise


def _numbers(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _no_ring(number: int, at: QueueLayout) -> str:
    """What is wrong with a ring that the worker finds to be none."""
    what = "not of a ring's size, alignment and base"
    if number == errno.EFAULT:
        what = "outside the memory that the front-end shares (QEMU: a memory backend with share=on)"
    places = f"{at.descriptor_address:#x}, {at.driver_address:#x} and {at.device_address:#x}"
    return f"{at.size} entries at {places} from {at.base:#x} are {what}"


def _mappable(region: Region, fds: Fds) -> MemoryRegion:
    return MemoryRegion(fds.take(), region.guest_address, region.user_address, region.size, region.mmap_offset)
