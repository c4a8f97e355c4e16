"""Effects: the closed set of things a session asks its connection to do; what it yields, never does itself."""

from dataclasses import dataclass

from vhost.message import Inflight, Log, Region


@dataclass(frozen=True, slots=True)
class Reply:
    """Send *payload* as the answer to *request*."""

    request: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class SetWriteCache:
    """From now on a completed write may be volatile (*writeback*), or is stable."""

    writeback: bool


@dataclass(frozen=True, slots=True)
class Flush:
    """Every write completed so far is stable when this returns."""


@dataclass(frozen=True, slots=True)
class SetBackendChannel:
    """Take the message's fd as the channel of our own requests; *acks*: the front-end acknowledges them if asked."""

    acks: bool


@dataclass(frozen=True, slots=True)
class TellConfigChange:
    """Say on that channel that the configuration space has changed; wait for nothing."""


@dataclass(frozen=True, slots=True)
class SetMemory:
    """These regions, mapped from the message's fds in their order, are all guest memory; running rings move along."""

    regions: tuple[Region, ...]


@dataclass(frozen=True, slots=True)
class AddMemory:
    """One region more, mapped from the message's fd; the others stay as they are, with I/O in flight."""

    region: Region


@dataclass(frozen=True, slots=True)
class RemoveMemory:
    """Unmap one region."""

    region: Region


@dataclass(frozen=True, slots=True)
class SetLog:
    """Log dirty pages in this bitmap, mapped from the message's fd, or nowhere; never again in the one before."""

    log: Log | None


@dataclass(frozen=True, slots=True)
class SetLogCall:
    """Take the message's fd (or none) as the one that tells of new bits in the log."""

    has_fd: bool


@dataclass(frozen=True, slots=True)
class LogBuffers:
    """Whether what requests write to guest memory is logged, those in flight included."""

    enabled: bool


@dataclass(frozen=True, slots=True)
class LogQueue:
    """Whether writes to the used ring are logged, as if it lay at *guest_address*; a running ring runs on."""

    index: int
    guest_address: int | None


@dataclass(frozen=True, slots=True)
class ShareInflight:
    """Make an in-flight region, give it to the front-end as the answer to GET_INFLIGHT_FD, and keep nothing of it."""

    num_queues: int
    queue_size: int
    packed: bool
    wce: bool


@dataclass(frozen=True, slots=True)
class TrackInflight:
    """Note what rings have in flight in the region of the message's fd -> the wce noted there; None: nothing is."""

    inflight: Inflight


@dataclass(frozen=True, slots=True)
class ForgetInflight:
    """Let go of the in-flight region; no ring runs."""


@dataclass(frozen=True, slots=True)
class NoteWriteCache:
    """Note *wce* in the in-flight region, if it is one of ours."""

    wce: bool


@dataclass(frozen=True, slots=True)
class TakeBackend:
    """Take hold of what is under the device: the first ring is about to start."""


@dataclass(frozen=True, slots=True)
class LetGoOfBackend:
    """Leave it to others, all of it stable: the last ring has stopped."""


@dataclass(frozen=True, slots=True)
class StartQueue:
    """Serve the ring from *base*, as SET_VRING_BASE says it -> whether it is a ring. Addresses are the front-end's own.

    If it is none, its err fd was signalled.
    """

    index: int
    size: int
    descriptor: int
    available: int
    used: int
    base: int
    event_idx: bool
    packed: bool


@dataclass(frozen=True, slots=True)
class StopQueue:
    """Finish what is in flight, drop kick and call, leave the ring alone -> the index to go on from."""

    index: int


@dataclass(frozen=True, slots=True)
class EnableQueue:
    """Whether a started ring may be served; one that may not has nothing in flight when this returns."""

    index: int
    enabled: bool


@dataclass(frozen=True, slots=True)
class SetKick:
    """Take the message's fd (or none) as the one the driver kicks."""

    index: int
    has_fd: bool


@dataclass(frozen=True, slots=True)
class SetCall:
    """Take the message's fd (or none) as the one that interrupts the driver."""

    index: int
    has_fd: bool


@dataclass(frozen=True, slots=True)
class SetErr:
    """Take the message's fd (or none) as the one that tells of a broken ring."""

    index: int
    has_fd: bool


Effect = (
    Reply
    | SetWriteCache
    | Flush
    | SetBackendChannel
    | TellConfigChange
    | SetMemory
    | AddMemory
    | RemoveMemory
    | SetLog
    | SetLogCall
    | LogBuffers
    | LogQueue
    | ShareInflight
    | TrackInflight
    | ForgetInflight
    | NoteWriteCache
    | TakeBackend
    | LetGoOfBackend
    | StartQueue
    | StopQueue
    | EnableQueue
    | SetKick
    | SetCall
    | SetErr
)
