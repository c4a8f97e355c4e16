"""The rules of one front-end's visit: a message in, effects out; owns no fd.

Requests are answered one at a time and in order. Each answer is a generator that yields what must be done and is
sent the result; an `OSError` thrown in means it could not be done, and becomes a non-zero acknowledgement if the
front-end asked for one, else the end of the visit. A `Refusal` ends nothing: what is refused does no harm, and may be
the guest's doing. Anything the specification forbids raises `ProtocolViolation`.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from ring.virtqueue import QUEUES_MAX
from vhost import effect
from vhost.message import (
    MAX_FDS,
    U64,
    VERSION,
    ConfigWindow,
    HeaderFlag,
    Inflight,
    Log,
    MemorySlot,
    MemoryTable,
    Message,
    ProtocolFeature,
    ProtocolViolation,
    Request,
    VhostFeature,
    VringAddress,
    VringState,
)
from vhost.regions import Regions
from vhost.vring import Steps, Vrings
from virtio.config import WCE_OFFSET, read_window
from virtio.feature import BlockFeature, RingFeature, TransportFeature, caches_writes, unknown_bits

PROTOCOL_FEATURES = int(
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)
HEADER_FLAGS = int(HeaderFlag.VERSION | HeaderFlag.NEED_REPLY)
VHOST_FEATURES = int(VhostFeature.LOG_ALL | VhostFeature.PROTOCOL_FEATURES)
DEVICE_FEATURES = (1 << 24) - 1  # bits that only say which requests and fields a driver uses
FRONT_END_FEATURES = int(TransportFeature.ANY_LAYOUT | TransportFeature.SR_IOV)  # QEMU offers them by itself
LOG_PAGE = 4096
ACK, NACK = U64(0).pack(), U64(1).pack()


class Refusal(Exception):
    """What was asked for is not done, and all goes on."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What the device offers to whichever front-end comes; only the configuration space ever changes."""

    features: int
    num_queues: int
    max_regions: int
    config: bytes  # the configuration space; its wce byte is the configured mode


class Session:
    """The state of one visit; *wce* outlives it: the next one is given the value this one left."""

    def __init__(self, offer: Offer, *, wce: bool) -> None:
        self.offer = offer
        self.wce = wce
        self.features = 0
        self.protocol_features = 0
        self.status = 0
        self.regions = Regions(offer.max_regions)
        self.vrings = Vrings(offer.num_queues)
        self._has_backend_channel = False
        self._told_config = b""  # what the front-end has read, or was told to read
        self._tracks_inflight = False
        self._noted_wce = wce  # what the in-flight region says, if there is one

    def receive(self, message: Message) -> Steps:
        """Answer *message*: its effects, then the acknowledgement it asked for."""
        rule, payload = self._parse(message)
        answer = ACK
        try:
            yield from rule.answer(self, payload)
        except Refusal:
            answer = NACK
        except OSError:
            if rule.replies or not self._acknowledges(message):
                raise
            answer = NACK
        if self._acknowledges(message) and not rule.replies:
            yield effect.Reply(message.request, answer)
        yield from self._note_wce()
        yield from self.tell_config_change()

    def tell_config_change(self) -> Steps:
        """Tell the front-end of a configuration space that it has not read, if it can be told.

        Only while rings run: QEMU drops the word before. It reads the space from within its handler of the channel,
        so nothing may be awaited here.
        """
        if self._has_backend_channel and self.vrings.are_running and self._told_config != self.offer.config:
            self._told_config = self.offer.config
            yield effect.TellConfigChange()

    def _parse(self, message: Message) -> "tuple[Rule, Any]":
        if message.flags & HeaderFlag.VERSION != VERSION or unknown_bits(message.flags, HEADER_FLAGS):
            raise ProtocolViolation(f"flags {message.flags:#x} are not those of a version {VERSION} request")
        rule = RULES.get(message.request)
        if rule is None or unknown_bits(rule.needs, self.protocol_features):
            raise ProtocolViolation(f"{_name(message.request)} is unknown or was not negotiated")
        payload = rule.parse(message.payload)
        if message.nfds not in rule.nfds(payload):
            raise ProtocolViolation(f"{_name(message.request)} came with {message.nfds} file descriptors")
        return rule, payload

    def _acknowledges(self, message: Message) -> bool:
        return bool(message.flags & HeaderFlag.NEED_REPLY and self.protocol_features & ProtocolFeature.REPLY_ACK)

    def get_features(self, _: None) -> Steps:
        yield _reply_u64(Request.GET_FEATURES, self.offer.features | VHOST_FEATURES)

    def set_features(self, features: U64) -> Steps:
        """Take what the driver chose, perhaps from another offer: a guest keeps its features over our deaths.

        What that one does not offer, as a read-only one does not, fails as a request.
        """
        harmless = VHOST_FEATURES | DEVICE_FEATURES | FRONT_END_FEATURES
        _refuse_unknown("virtio features", features.value, self.offer.features | harmless)
        before, self.features = self.features, features.value
        if (before ^ self.features) & VhostFeature.LOG_ALL:  # also while rings run, which run on
            yield effect.LogBuffers(bool(self.features & VhostFeature.LOG_ALL))
        self.vrings.event_idx = bool(self.features & RingFeature.EVENT_IDX)
        self.vrings.packed = bool(self.features & RingFeature.RING_PACKED)
        yield effect.SetWriteCache(self.is_writeback)
        if not self.features & VhostFeature.PROTOCOL_FEATURES:
            yield from self.vrings.enable_all()  # such a front-end never sends SET_VRING_ENABLE

    def get_protocol_features(self, _: None) -> Steps:
        yield _reply_u64(Request.GET_PROTOCOL_FEATURES, PROTOCOL_FEATURES)

    def set_protocol_features(self, features: U64) -> Steps:
        _refuse_unknown("protocol features", features.value, PROTOCOL_FEATURES)
        self.protocol_features = features.value
        yield from ()

    def get_queue_num(self, _: None) -> Steps:
        yield _reply_u64(Request.GET_QUEUE_NUM, len(self.vrings))

    def set_owner(self, _: None) -> Steps:
        """Begin anew: QEMU keeps the connection when a device is unplugged, and the next one on it says all again."""
        if self.regions or self._tracks_inflight:
            yield from self.reset_device(None)
            yield from self.regions.remove_all()
            yield effect.SetLog(None)
            yield effect.SetLogCall(has_fd=False)

    def ignore(self, _: None) -> Steps:
        """RESET_OWNER: deprecated, best ignored, says the specification."""
        yield from ()

    def set_backend_channel(self, _: None) -> Steps:
        yield effect.SetBackendChannel(bool(self.protocol_features & ProtocolFeature.REPLY_ACK))
        self._has_backend_channel = True

    def lose_backend_channel(self) -> None:
        """The front-end has closed it; nothing can be told from now on."""
        self._has_backend_channel = False

    def set_log_base(self, log: Log) -> Steps:
        """Log in a new bitmap; the reply says that nothing is written to the old one any more.

        It covers all memory: QEMU lets it grow before memory does, and shrink after.
        """
        if log.size * 8 * LOG_PAGE < self.regions.end:
            raise ProtocolViolation(
                f"a log of {log.size} bytes does not reach the end of memory at {self.regions.end:#x}"
            )
        yield effect.SetLog(log)
        yield _reply_u64(Request.SET_LOG_BASE, 0)

    def set_log_fd(self, _: None) -> Steps:
        yield effect.SetLogCall(has_fd=True)

    def get_max_mem_slots(self, _: None) -> Steps:
        yield _reply_u64(Request.GET_MAX_MEM_SLOTS, self.offer.max_regions)

    @property
    def is_writeback(self) -> bool:
        """Whether completed writes may be volatile under what was negotiated so far."""
        configured = bool(self.offer.config[WCE_OFFSET])
        return caches_writes(self.features, wce=self.wce, writeback=configured)

    def get_config(self, window: ConfigWindow) -> Steps:
        space = self.offer.config[:WCE_OFFSET] + bytes([self.wce]) + self.offer.config[WCE_OFFSET + 1 :]
        data = read_window(space, window.start, window.size)
        self._told_config = self.offer.config
        yield effect.Reply(Request.GET_CONFIG, ConfigWindow(window.start, window.size, window.flags, data).pack())

    def set_config(self, window: ConfigWindow) -> Steps:
        """Switch wce, all there is to write. Its driver may not be known to us yet: what is *offered* counts.

        The flag says "live migration" (1) or nothing (0); cloud-hypervisor always sets it. It and crosvm hand on
        whatever the guest writes, which is then ignored.
        """
        if window.start != WCE_OFFSET or window.flags > 1 or window.data not in (b"\0", b"\1"):
            raise Refusal(f"the driver may not write {window.size} bytes at {window.start} of its configuration")
        if not self.offer.features & BlockFeature.CONFIG_WCE:
            raise Refusal("the write cache of this device cannot be switched")
        before, self.wce = self.wce, window.data == b"\1"
        yield effect.SetWriteCache(self.is_writeback)
        if before and not self.wce:
            yield from self._flush_or_restore_wce()
            yield from self._note_wce()

    def _flush_or_restore_wce(self) -> Steps:
        """Make stable what was completed before the switch; flushed after it, so that no write slips in between."""
        try:
            yield effect.Flush()
        except OSError:
            self.wce = True  # the front-end keeps its own copy at 1 when we refuse
            yield effect.SetWriteCache(self.is_writeback)
            raise

    def _note_wce(self) -> Steps:
        """Let the next daemon know; the front-end never says it again.

        Before the answer if the cache is switched off, after it if it is switched on: a death in between may leave a
        note that is stricter than what the front-end believes, never one that is laxer.
        """
        if self._tracks_inflight and self._noted_wce != self.wce:
            yield effect.NoteWriteCache(self.wce)
            self._noted_wce = self.wce

    def get_inflight_fd(self, wanted: Inflight) -> Steps:
        _check_inflight(wanted)
        yield effect.ShareInflight(wanted.num_queues, wanted.queue_size, self.vrings.packed, self.wce)

    def set_inflight_fd(self, inflight: Inflight) -> Steps:
        """Take a region over, perhaps from a daemon that was killed, and with it the wce that its guest chose."""
        _check_inflight(inflight)
        yield from self.vrings.stop_all()
        noted = yield effect.TrackInflight(inflight)
        self._tracks_inflight = True
        if noted is not None and self.offer.features & BlockFeature.CONFIG_WCE:
            self.wce = self._noted_wce = noted
            yield effect.SetWriteCache(self.is_writeback)

    def reset_device(self, _: None) -> Steps:
        """Forget the rings and the status; memory and wce stay, the front-end does not send them again."""
        self.status = 0
        yield from self.vrings.reset(keep_bases=False)
        if self._tracks_inflight:  # QEMU frees its region, too, and asks for a new one
            yield effect.ForgetInflight()
            self._tracks_inflight = False

    def set_status(self, status: U64) -> Steps:
        if status.value > 0xFF:
            raise ProtocolViolation(f"a device status of {status.value:#x}, more than 8 bits")
        if status.value == 0:  # also sent whenever the virtual machine pauses
            yield from self.vrings.reset(keep_bases=True)
        self.status = status.value

    def get_status(self, _: None) -> Steps:
        yield _reply_u64(Request.GET_STATUS, self.status)


def _name(request: int) -> str:
    """How the specification calls *request*, if it does."""
    known = request in Request._value2member_map_
    return f"request {Request(request).name}" if known else f"request {request}"


def _reply_u64(request: Request, value: int) -> effect.Reply:
    return effect.Reply(request, U64(value).pack())


def _refuse_unknown(noun: str, features: int, offered: int) -> None:
    if unknown := unknown_bits(features, offered):
        raise ProtocolViolation(f"{noun} {unknown:#x} were not offered")


def _check_inflight(inflight: Inflight) -> None:
    """Refuse a region that is for no ring, or for more than there can be.

    How many entries a front-end wants is no promise about its rings: the size of the region counts, and a ring for
    which it has no room is served without.
    """
    if not 0 < inflight.num_queues <= QUEUES_MAX:
        raise ProtocolViolation(f"an in-flight region for {inflight.num_queues} rings, not for 1 to {QUEUES_MAX}")


@dataclass(frozen=True, slots=True)
class Rule:
    """How a request must look, and who answers it."""

    answer: Callable[[Session, Any], Steps]
    parse: Callable[[bytes], Any]
    needs: int = 0  # the protocol feature it belongs to
    replies: bool = False  # has a reply of its own, hence no acknowledgement
    nfds: Callable[[Any], Collection[int]] = lambda payload: (0,)


def _empty(payload: bytes) -> None:
    if payload:
        raise ProtocolViolation(f"a request without payload came with {len(payload)} bytes")


def _one_fd(_: object) -> Collection[int]:
    return (1,)


def _ring_fds(fd: U64) -> Collection[int]:
    return (0,) if fd.value & U64.NO_FD else (1,)


def _table_fds(table: MemoryTable) -> Collection[int]:
    return (len(table.regions),)


def _stray_fds(_: MemorySlot) -> Collection[int]:
    return range(MAX_FDS + 1)


RULES: dict[int, Rule] = {
    Request.GET_FEATURES: Rule(Session.get_features, _empty, replies=True),
    Request.SET_FEATURES: Rule(Session.set_features, U64.parse),
    Request.SET_OWNER: Rule(Session.set_owner, _empty),
    Request.RESET_OWNER: Rule(Session.ignore, _empty),
    Request.SET_MEM_TABLE: Rule(
        lambda session, table: session.regions.set_table(table), MemoryTable.parse, nfds=_table_fds
    ),
    Request.SET_LOG_BASE: Rule(
        Session.set_log_base, Log.parse, needs=ProtocolFeature.LOG_SHMFD, replies=True, nfds=_one_fd
    ),
    Request.SET_LOG_FD: Rule(Session.set_log_fd, _empty, nfds=_one_fd),
    Request.SET_VRING_NUM: Rule(lambda session, state: session.vrings.set_num(state), VringState.parse),
    Request.SET_VRING_ADDR: Rule(lambda session, address: session.vrings.set_addr(address), VringAddress.parse),
    Request.SET_VRING_BASE: Rule(lambda session, state: session.vrings.set_base(state), VringState.parse),
    Request.GET_VRING_BASE: Rule(lambda session, state: session.vrings.get_base(state), VringState.parse, replies=True),
    Request.SET_VRING_KICK: Rule(lambda session, fd: session.vrings.set_kick(fd), U64.parse, nfds=_ring_fds),
    Request.SET_VRING_CALL: Rule(lambda session, fd: session.vrings.set_call(fd), U64.parse, nfds=_ring_fds),
    Request.SET_VRING_ERR: Rule(lambda session, fd: session.vrings.set_err(fd), U64.parse, nfds=_ring_fds),
    Request.GET_PROTOCOL_FEATURES: Rule(Session.get_protocol_features, _empty, replies=True),
    Request.SET_PROTOCOL_FEATURES: Rule(Session.set_protocol_features, U64.parse),
    Request.GET_QUEUE_NUM: Rule(Session.get_queue_num, _empty, needs=ProtocolFeature.MQ, replies=True),
    Request.SET_VRING_ENABLE: Rule(lambda session, state: session.vrings.set_enable(state), VringState.parse),
    Request.SET_BACKEND_REQ_FD: Rule(
        Session.set_backend_channel, _empty, needs=ProtocolFeature.BACKEND_REQ, nfds=_one_fd
    ),
    Request.GET_CONFIG: Rule(Session.get_config, ConfigWindow.parse, needs=ProtocolFeature.CONFIG, replies=True),
    Request.SET_CONFIG: Rule(Session.set_config, ConfigWindow.parse, needs=ProtocolFeature.CONFIG),
    Request.GET_INFLIGHT_FD: Rule(
        Session.get_inflight_fd, Inflight.parse, needs=ProtocolFeature.INFLIGHT_SHMFD, replies=True
    ),
    Request.SET_INFLIGHT_FD: Rule(
        Session.set_inflight_fd, Inflight.parse, needs=ProtocolFeature.INFLIGHT_SHMFD, nfds=_one_fd
    ),
    Request.RESET_DEVICE: Rule(Session.reset_device, _empty, needs=ProtocolFeature.RESET_DEVICE),
    Request.GET_MAX_MEM_SLOTS: Rule(
        Session.get_max_mem_slots, _empty, needs=ProtocolFeature.CONFIGURE_MEM_SLOTS, replies=True
    ),
    Request.ADD_MEM_REG: Rule(
        lambda session, slot: session.regions.add(slot),
        MemorySlot.parse,
        needs=ProtocolFeature.CONFIGURE_MEM_SLOTS,
        nfds=_one_fd,
    ),
    Request.REM_MEM_REG: Rule(
        lambda session, slot: session.regions.remove(slot),
        MemorySlot.parse,
        needs=ProtocolFeature.CONFIGURE_MEM_SLOTS,
        nfds=_stray_fds,
    ),
    Request.SET_STATUS: Rule(Session.set_status, U64.parse, needs=ProtocolFeature.STATUS),
    Request.GET_STATUS: Rule(Session.get_status, _empty, needs=ProtocolFeature.STATUS, replies=True),
}
