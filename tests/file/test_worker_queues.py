"""Queues: started, kicked or not, notified or not, disabled, drained, several at once."""

import os
import struct
import threading
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest

from bench.driver import Completion, DriverQueue
from ring.native import Pointer
from ring.request import Request
from ring.virtqueue import QueueLayout
from ring.worker import Worker
from tests.blockguest import FLUSH, IN, IOERR, MIB, OK, Guest, open_pipe
from tests.patience import TIMEOUT


def is_signalled(fd: int) -> bool:
    try:
        return os.eventfd_read(fd) > 0
    except BlockingIOError:
        return False


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("base", [0, 65500])
def test_indices_wrap(event_idx: bool, base: int) -> None:
    with Guest(event_idx=event_idx, base=base, queue_size=8) as guest:
        for _ in range(100):
            assert guest.ask(IN, 0, room=512).status == OK
        for _ in range(10):
            guest.ask_all([guest.post(IN, 0, room=512, indirect=True) for _ in range(8)])
        assert guest.drain() == (base + 180) % 65536


@pytest.mark.parametrize("event_idx", [False, True])
def test_no_wake_up_is_lost(event_idx: bool) -> None:
    with Guest(event_idx=event_idx, queue_size=4, on_request=lambda request: request.finish(OK)) as guest:
        posted = guest.post(IN, 0, room=512, indirect=True)
        guest.queue.kick()
        guest.queue.wait()
        for _ in range(5000):
            guest.queue.add_head(posted.head)
            guest.queue.kick()
            guest.queue.wait()


def test_event_idx_asks_for_one_call_for_a_batch() -> None:
    with Guest(event_idx=True) as guest:
        for _ in range(32):
            guest.post(IN, 0, room=512, indirect=True)
        guest.queue.kick()
        guest.wait_for_requests(32)
        guest.drain()
        assert guest.counters.calls == 1


def test_driver_that_wants_no_interrupt_is_not_called() -> None:
    with Guest() as guest:
        guest.memory.store(guest.queue.layout.driver_address, b"\x01\x00")  # VIRTQ_AVAIL_F_NO_INTERRUPT
        for _ in range(8):
            guest.post(IN, 0, room=512)
            guest.queue.kick()
        guest.wait_for_requests(8)
        guest.drain()
        assert guest.counters.calls == 0


def test_ring_is_looked_at_once_without_a_kick() -> None:
    with Guest() as guest, DriverQueue(guest.memory, 8) as queue:
        posted = guest.post(IN, 0, room=512, queue=queue)
        queue.publish()
        guest.worker.call(lambda: guest.start_queue(1, queue))
        assert guest.answer(posted, queue.wait()[0]).status == OK


@pytest.mark.parametrize("last", ["start", "kick", "enable"])
def test_queue_is_served_once_it_has_everything(last: str) -> None:
    with Guest() as guest, DriverQueue(guest.memory, 8) as queue:
        steps = {
            "start": lambda: guest.worker.start_queue(1, queue.layout),
            "kick": lambda: guest.worker.set_kick(1, os.dup(queue.kick_fd)),
            "enable": lambda: guest.worker.enable_queue(1),
        }
        posted = guest.post(IN, 0, room=512, queue=queue)
        queue.kick()
        guest.worker.call(lambda: guest.worker.set_call(1, os.dup(queue.call_fd)))
        final = steps.pop(last)
        for step in steps.values():
            guest.worker.call(step)
        assert queue.poll() is None
        guest.worker.call(final)
        assert guest.answer(posted, queue.wait()[0]).status == OK


def test_disabled_queue_is_left_alone_until_it_is_enabled() -> None:
    with Guest() as guest:
        guest.disable()
        posted = guest.post(IN, 0, room=512)
        os.eventfd_write(guest.queue.kick_fd, guest.queue.publish() or 1)
        guest.worker.call(lambda: None)
        assert guest.queue.poll() is None
        guest.worker.call(lambda: guest.worker.enable_queue(0))
        assert guest.answer(posted, guest.queue.wait()[0]).status == OK


def test_disabled_queue_has_nothing_in_flight() -> None:
    source, feed = open_pipe()
    with source, Guest(source.fileno()) as guest, feed:
        guest.post(IN, 0, room=512)
        guest.queue.kick()
        guest.wait_for_requests(1)

        seen: list[Completion | None] = []
        quiet = threading.Event()

        def look() -> None:
            seen.append(guest.queue.poll())
            quiet.set()

        guest.worker.call(lambda: guest.worker.disable_queue(0, look))
        assert not quiet.is_set()
        feed.write(bytes(512))
        assert quiet.wait(TIMEOUT)
        assert seen[0] is not None


def test_who_waits_for_a_disabled_queue_is_released_when_it_is_enabled() -> None:
    source, feed = open_pipe()
    with source, Guest(source.fileno()) as guest, feed:
        guest.post(IN, 0, room=512)
        guest.queue.kick()
        guest.wait_for_requests(1)
        released = threading.Event()
        guest.worker.call(lambda: guest.worker.disable_queue(0, released.set))
        guest.worker.call(lambda: guest.worker.enable_queue(0))
        assert released.wait(TIMEOUT)


def test_ring_without_a_kick_is_polled() -> None:
    with Guest() as guest:
        guest.worker.call(lambda: guest.worker.set_kick(0, None))
        posted = guest.post(IN, 0, room=512)
        guest.queue.publish()
        assert guest.answer(posted, guest.queue.wait()[0]).status == OK


def test_new_kick_and_call_are_used() -> None:
    with Guest() as guest:
        kick, call = os.eventfd(0), os.eventfd(0, os.EFD_NONBLOCK)
        guest.worker.call(lambda: guest.worker.set_kick(0, os.dup(kick)))
        guest.worker.call(lambda: guest.worker.set_call(0, os.dup(call)))
        assert is_signalled(call)
        guest.post(IN, 0, room=512)
        guest.queue.publish()
        os.eventfd_write(kick, 1)
        guest.wait_for_requests(1)
        guest.drain()
        assert is_signalled(call)
        os.close(kick)
        os.close(call)


BAD_LAYOUTS = {
    "size 0": {"size": 0},
    "size 3": {"size": 3},
    "size 65536": {"size": 65536},
    "unaligned descriptors": {"descriptor_address": 8},
    "unaligned driver area": {"driver_address": 1},
    "unaligned device area": {"device_address": 2},
    "outside": {"device_address": 16 * MIB - 64},
    "wrapping": {"descriptor_address": (1 << 64) - 16},
}


@pytest.mark.parametrize("name", BAD_LAYOUTS)
def test_nonsensical_layout_is_refused(name: str) -> None:
    fields = {"size": 8, "descriptor_address": 0, "driver_address": 128, "device_address": 192, "base": 0}
    layout = QueueLayout(**{**fields, **BAD_LAYOUTS[name]})
    with Guest() as guest, pytest.raises(OSError, match="queue 1: QueueLayout"):
        guest.worker.call(lambda: guest.worker.start_queue(1, layout))


@pytest.mark.parametrize("size", [2048, 32768])
def test_ring_is_as_large_as_the_specification_lets_it_be(size: int) -> None:
    head, header, driver_area, device_area = size - 1, 15 * MIB, MIB, 2 * MIB
    layout = QueueLayout(size, 4 * MIB, driver_area, device_area, base=head)
    with Guest() as guest:
        guest.memory.store(header, struct.pack("<IIQ", IN, 0, 0))
        guest.memory.store(4 * MIB + 16 * head, struct.pack("<QIHH", header, 16, 1, 0))
        guest.memory.store(4 * MIB, struct.pack("<QIHH", header + 16, 513, 2, 0))
        guest.memory.store(driver_area + 4 + 2 * head, struct.pack("<H", head))
        guest.memory.store(driver_area + 2, struct.pack("<H", size))

        def start() -> None:
            guest.worker.start_queue(1, layout)
            guest.worker.set_kick(1, None)
            guest.worker.enable_queue(1)

        guest.worker.call(start)
        guest.wait_for_requests(1)
        assert guest.drain(1) == size
        assert guest.memory.load(device_area + 2, 2 + 8) == struct.pack("<HII", 1, head, 513)


def test_started_queue_is_not_started_again() -> None:
    with Guest() as guest, pytest.raises(OSError, match="busy"):
        guest.worker.call(lambda: guest.worker.start_queue(0, guest.queue.layout))


# draining


def test_drain_answers_the_next_available_index() -> None:
    with Guest(base=7) as guest:
        for _ in range(5):
            guest.ask(IN, 0, room=512)
        assert guest.drain() == 12


def test_drain_of_a_queue_that_never_started_answers_zero() -> None:
    with Guest() as guest:
        assert guest.drain(9) == 0


def test_drain_waits_for_a_request_in_python() -> None:
    held: list[Request] = []
    arrived, drained = threading.Event(), threading.Event()
    order: list[str] = []

    def hold(request: Request) -> None:
        held.append(request)
        arrived.set()

    def finish() -> None:
        order.append("finished")
        held[0].finish(OK)

    def note(base: int) -> None:
        order.append(f"drained at {base}")
        drained.set()

    with Guest(on_request=hold) as guest:
        guest.post(IN, 0, room=512)
        guest.queue.kick()
        assert arrived.wait(TIMEOUT)
        guest.worker.call(lambda: guest.worker.drain_queue(0, note))
        guest.worker.call(finish)
        assert drained.wait(TIMEOUT)
        assert guest.queue.poll() is not None
    assert order == ["finished", "drained at 1"]


def test_drain_waits_for_the_last_request() -> None:
    held: list[Request] = []
    full = threading.Event()
    drained = threading.Event()

    def hold(request: Request) -> None:
        held.append(request)
        if len(held) == 2:
            full.set()

    with Guest(on_request=hold) as guest:
        guest.post(IN, 0, room=512)
        guest.post(IN, 0, room=512)
        guest.queue.kick()
        assert full.wait(TIMEOUT)
        guest.worker.call(lambda: guest.worker.drain_queue(0, lambda base: drained.set()))
        guest.worker.call(lambda: held[0].finish(OK))
        guest.worker.call(lambda: None)
        assert not drained.is_set()
        guest.worker.call(lambda: held[1].finish(OK))
        assert drained.wait(TIMEOUT)


def test_drain_waits_for_a_transfer_in_c() -> None:
    source, feed = open_pipe()
    with source, Guest(source.fileno()) as guest, feed:
        drained = threading.Event()
        guest.post(IN, 0, room=512)
        guest.queue.kick()
        guest.wait_for_requests(1)
        guest.worker.call(lambda: guest.worker.drain_queue(0, lambda base: drained.set()))
        guest.worker.call(lambda: None)
        assert not drained.is_set()
        feed.write(bytes(512))
        assert drained.wait(TIMEOUT)
        completion = guest.queue.poll()
        assert completion is not None
        assert completion.nbytes == 513


def test_drained_queue_is_silent() -> None:
    with Guest() as guest:
        guest.ask(IN, 0, room=512)
        guest.drain()
        is_signalled(guest.queue.call_fd)
        guest.post(IN, 0, room=512)
        guest.queue.publish()
        os.eventfd_write(guest.queue.kick_fd, 1)
        guest.worker.call(lambda: None)
        assert guest.queue.poll() is None
        assert not is_signalled(guest.queue.call_fd)


def test_queue_goes_on_where_it_was_drained() -> None:
    with Guest() as guest:
        guest.ask(IN, 0, room=512)
        base = guest.drain()
        posted = guest.post(IN, 0, room=512)
        guest.queue.publish()
        layout = replace(guest.queue.layout, base=base)

        def restart() -> None:
            guest.worker.start_queue(0, layout)
            guest.worker.set_call(0, os.dup(guest.queue.call_fd))
            guest.worker.set_kick(0, os.dup(guest.queue.kick_fd))

        guest.worker.call(restart)
        assert guest.answer(posted, guest.queue.wait()[0]).status == OK


def test_stop_drains_what_is_in_flight() -> None:
    source, feed = open_pipe()
    with source, Guest(source.fileno()) as guest, feed:
        guest.post(IN, 0, room=512)
        guest.queue.kick()
        guest.wait_for_requests(1)
        feeder = threading.Thread(target=lambda: feed.write(bytes(512)))
        feeder.start()
        guest.worker.stop()
        feeder.join()
        assert guest.queue.poll() is not None


# several queues


def test_many_queues_are_served_by_one_worker(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(MIB))
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    with Guest(fd) as guest, ExitStack() as stack:
        queues = [stack.enter_context(DriverQueue(guest.memory, 16, event_idx=index % 2 == 0)) for index in range(64)]
        for index, queue in enumerate(queues, 1):
            guest.worker.call(lambda index=index, queue=queue: guest.start_queue(index, queue))  # type: ignore[misc]
        for turn in range(3):
            posted = [guest.post(IN, index + turn, room=512, queue=queue) for index, queue in enumerate(queues)]
            for queue in queues:
                queue.kick()
            for index, (queue, each) in enumerate(zip(queues, posted, strict=True)):
                data = path.read_bytes()[(index + turn) * 512 :][:512]
                assert guest.answer(each, queue.wait()[0]) == (OK, 513, data)
    os.close(fd)


def test_queues_take_turns_evenly() -> None:
    served: list[int] = []

    def answer(request: Request) -> None:
        served.append(request.queue)
        request.finish(OK)

    with Guest(on_request=answer) as guest, ExitStack() as stack:
        queues = {index: stack.enter_context(DriverQueue(guest.memory, 64)) for index in range(1, 5)}
        for queue in queues.values():
            for _ in range(64):
                guest.post(IN, 0, room=512, indirect=True, queue=queue)
            queue.publish()
        guest.worker.call(lambda: [guest.start_queue(index, queue) for index, queue in queues.items()])
        for queue in queues.values():
            queue.wait(64)
    turns = [(index, len(list(turn))) for index, turn in groupby(served)]
    assert len(turns) == 8
    assert turns == [(index, 32) for index, _ in turns[:4]] * 2


def test_python_may_finish_requests_in_any_order() -> None:
    held: list[Request] = []
    full = threading.Event()

    def hold(request: Request) -> None:
        held.append(request)
        if len(held) == 16:
            full.set()

    with Guest(on_request=hold) as guest:
        posted = [guest.post(FLUSH if index % 2 else IN, 0, room=0 if index % 2 else 512) for index in range(16)]
        guest.queue.kick()
        assert full.wait(TIMEOUT)

        def finish() -> None:
            for index, request in enumerate(reversed(held)):
                request.finish(OK if index % 3 else IOERR)

        guest.worker.call(finish)
        heads = [completion.head for completion in guest.queue.wait(16)]
        assert heads == [each.head for each in reversed(posted)]


def test_slice_kept_over_a_restart_of_its_queue_is_stale() -> None:
    kept: list[Request] = []

    def keep(request: Request) -> None:
        kept.append(request)
        if len(kept) == 2:
            with pytest.raises(OSError, match="Stale"):
                kept[0].data().store(bytes(512))
        request.finish(OK)

    with Guest(on_request=keep) as guest, DriverQueue(guest.memory, 128) as fresh:
        guest.ask(IN, 0, room=512)
        guest.drain()
        guest.worker.call(lambda: guest.start_queue(0, fresh))
        posted = guest.post(IN, 0, room=512, queue=fresh)
        fresh.kick()
        assert guest.answer(posted, fresh.wait()[0]).status == OK
    assert len(kept) == 2


class Stillborn:
    """A device whose half in C cannot be had."""

    @property
    def native(self) -> Pointer:
        raise LookupError("no native half")


def test_what_keeps_a_worker_from_starting_is_raised_where_it_is_started() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(LookupError, match="no native half"), Worker(Stillborn(), lambda request: None):
        pass
    assert len(os.listdir("/proc/self/fd")) == before
