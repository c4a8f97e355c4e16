"""The state machine of the rings: configured by the front-end, started, stopped, enabled.

A started ring that is disabled keeps its place, its fds and what the driver has posted, and is left alone: nothing of
it is in flight once SET_VRING_ENABLE(0) is answered, and it goes on when it is enabled. The specification wants it
processed "without causing any side effects": a network device drops what is sent; a disk may not drop a request, and
any answer to one is a side effect. Nobody asks for the wait, but cloud-hypervisor pauses a machine by disabling alone,
and may save its memory then. QEMU 7.2 disables a ring before it stops it, where the wait would come anyway.

A ring starts with SET_VRING_KICK. Specifications before 2026 said "with the first kick"; an earlier life of ours may
have consumed that.

What cannot be a ring, for its size, place or base, does not start, and its err fd says so, as the specification has
it for an error of a ring: the numbers are the guest's, and its other rings go on. The worker knows what a ring is.

A ring that is given another size, place or base while it runs is stopped first: cloud-hypervisor, at a reset of the
guest, only disables its rings before it configures them anew.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeAlias

from vhost import effect
from vhost.effect import Effect
from vhost.message import U64, ProtocolViolation, Request, VringAddress, VringState
from virtio.feature import unknown_bits

Steps: TypeAlias = Generator[Effect, Any, None]


@dataclass(slots=True)
class Vring:
    """What the front-end has said about one ring, and whether it runs."""

    size: int | None = None
    base: int | None = None  # None: where a ring begins
    address: VringAddress | None = None
    has_kick: bool = False  # an fd, or the word that there is none
    enabled: bool = False
    log_address: int | None = None  # of the used ring, while writes to it are logged
    is_running: bool = False


class Vrings:
    """The rings of one visit. A ring runs from the moment it is complete until its base is asked for."""

    def __init__(self, count: int) -> None:
        self.event_idx = False  # of rings that start from now on, as is
        self.packed = False
        self._rings = [Vring() for _ in range(count)]

    def __len__(self) -> int:
        return len(self._rings)

    @property
    def are_running(self) -> bool:
        """Whether at least one ring is."""
        return any(ring.is_running for ring in self._rings)

    def set_num(self, state: VringState) -> Steps:
        ring = self._ring(state.index)
        if ring.is_running and state.num != ring.size:
            yield from self._stop(state.index)
        ring.size = state.num

    def set_addr(self, address: VringAddress) -> Steps:
        """Place a ring. A running one that is told again where it is, with another LOG flag, runs on."""
        ring = self._ring(address.index)
        if unknown_bits(address.flags, VringAddress.LOG):
            raise ProtocolViolation(f"ring {address.index} has unknown flags {address.flags:#x}")
        if ring.is_running and not _same_place(ring.address, address):
            yield from self._stop(address.index)
        ring.address = address
        yield from self._log(address.index, address.log if address.flags & VringAddress.LOG else None)

    def set_base(self, state: VringState) -> Steps:
        ring = self._ring(state.index)
        if ring.is_running:
            yield from self._stop(state.index)
        ring.base = state.num

    def get_base(self, state: VringState) -> Steps:
        """Drain, then silence: nothing of the ring is touched or signalled after the reply."""
        self._ring(state.index)
        yield from self._stop(state.index)
        yield effect.Reply(Request.GET_VRING_BASE, VringState(state.index, self._base(state.index)).pack())

    def set_kick(self, fd: U64) -> Steps:
        index = self._ring_of_fd(fd)
        self._rings[index].has_kick = True
        yield effect.SetKick(index, not fd.value & U64.NO_FD)
        yield from self._start_when_complete(index)

    def set_call(self, fd: U64) -> Steps:
        yield effect.SetCall(self._ring_of_fd(fd), not fd.value & U64.NO_FD)

    def set_err(self, fd: U64) -> Steps:
        yield effect.SetErr(self._ring_of_fd(fd), not fd.value & U64.NO_FD)

    def set_enable(self, state: VringState) -> Steps:
        self._ring(state.index)
        if state.num > 1:
            raise ProtocolViolation(f"ring {state.index} is to be enabled by {state.num}, neither 0 nor 1")
        yield from self._enable(state.index, bool(state.num))
        yield from self._start_when_complete(state.index)

    def enable_all(self) -> Steps:
        for index in range(len(self)):
            yield from self._enable(index, True)

    def stop_all(self) -> Steps:
        """Stop the rings that run."""
        for index, ring in enumerate(self._rings):
            if ring.is_running:
                yield from self._stop(index)

    def reset(self, *, keep_bases: bool) -> Steps:
        """Forget everything but the err fds, which the front-end does not send again, and perhaps where rings stopped.

        QEMU pauses a virtual machine by a status of 0, and only then asks for the bases (seen with 7.2).
        """
        for index, ring in enumerate(self._rings):
            if ring.has_kick:
                yield from self._stop(index)
            if ring.enabled:
                yield from self._enable(index, False)
            yield from self._log(index, None)
            self._rings[index] = Vring(base=ring.base if keep_bases else None)

    def _ring(self, index: int) -> Vring:
        if index >= len(self):
            raise ProtocolViolation(f"ring {index} of {len(self)}")
        return self._rings[index]

    def _ring_of_fd(self, fd: U64) -> int:
        """The ring that a kick, call or err fd belongs to."""
        index = fd.value & (U64.NO_FD - 1)
        if fd.value >= 2 * U64.NO_FD:
            raise ProtocolViolation(f"unknown bits in {fd.value:#x}, a ring index and its no-fd bit")
        self._ring(index)
        return index

    def _enable(self, index: int, enabled: bool) -> Steps:
        self._rings[index].enabled = enabled
        yield effect.EnableQueue(index, enabled)

    def _log(self, index: int, guest_address: int | None) -> Steps:
        if self._rings[index].log_address != guest_address:
            self._rings[index].log_address = guest_address
            yield effect.LogQueue(index, guest_address)

    def _start_when_complete(self, index: int) -> Steps:
        """Start a ring that has all it needs, not waiting for a kick: an earlier life of ours may have consumed it."""
        ring = self._rings[index]
        if ring.has_kick and ring.size is not None and ring.address is not None and not ring.is_running:
            yield from self._start(index)

    def _start(self, index: int) -> Steps:
        ring = self._rings[index]
        at = ring.address
        assert at is not None  # the callers saw the ring complete
        assert ring.size is not None
        if not self.are_running:
            yield effect.TakeBackend()
        ring.is_running = yield effect.StartQueue(
            index,
            ring.size,
            at.descriptor,
            at.available,
            at.used,
            base=self._base(index),
            event_idx=self.event_idx,
            packed=self.packed,
        )
        if not self.are_running:
            yield effect.LetGoOfBackend()

    def _base(self, index: int) -> int:
        """Where a ring goes on; a packed one begins with both of its positions in a lap whose wrap counter is 1."""
        base = self._rings[index].base
        if base is None:
            return 0x80008000 if self.packed else 0
        return base

    def _stop(self, index: int) -> Steps:
        """Stop a ring, which also drops its kick and call fds."""
        ring = self._rings[index]
        base = yield effect.StopQueue(index)
        ring.has_kick = False
        if ring.is_running:
            ring.base = base
            ring.is_running = False
            if not self.are_running:
                yield effect.LetGoOfBackend()


def _same_place(old: VringAddress | None, new: VringAddress) -> bool:
    return old is not None and (old.descriptor, old.available, old.used) == (new.descriptor, new.available, new.used)
