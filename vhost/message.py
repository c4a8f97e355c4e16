"""The wire of vhost-user: a header, requests, payload records. Native byte order; natural C alignment."""

import struct
from dataclasses import astuple, dataclass
from enum import IntEnum, IntFlag
from typing import ClassVar, Self

VERSION = 1
MAX_FDS = 32  # of a memory table: QEMU sends 8 regions at most, rust-vmm (cloud-hypervisor, crosvm) 32
MAX_CONFIG_SIZE = 256
MAX_PAYLOAD = 8 + MAX_FDS * 32  # a table of so many regions; SET_CONFIG is smaller
REPLY_FLAGS = 0x5  # version 1 and "this is a reply"; QEMU refuses any other value


class ProtocolViolation(Exception):
    """The front-end broke the specification; its connection ends."""


class Request(IntEnum):
    """Requests of the front-end. Spec: vhost-user "Front-end message types"."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43


class BackendRequest(IntEnum):
    """Requests of ours, on the channel that goes the other way. Spec: vhost-user "Back-end message types"."""

    CONFIG_CHANGE_MSG = 2


class HeaderFlag(IntFlag):
    """The flags word of a header; its two low bits are the version."""

    VERSION = 0x3
    REPLY = 0x4
    NEED_REPLY = 0x8


class ProtocolFeature(IntFlag):
    """What both sides of the socket may agree on. Spec: vhost-user "Protocol features"."""

    MQ = 1 << 0  # VHOST_USER_PROTOCOL_F_MQ
    LOG_SHMFD = 1 << 1
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    CONFIG = 1 << 9
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16


class VhostFeature(IntFlag):
    """Bits of the virtio feature word that vhost-user keeps for itself."""

    LOG_ALL = 1 << 26  # VHOST_F_LOG_ALL
    PROTOCOL_FEATURES = 1 << 30  # VHOST_USER_F_PROTOCOL_FEATURES


class Record:
    """A payload of fixed size: the fields of a frozen dataclass, laid out by `LAYOUT`."""

    LAYOUT: ClassVar[struct.Struct]

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        if len(payload) != cls.LAYOUT.size:
            raise ProtocolViolation(f"a {cls.__name__} payload has {cls.LAYOUT.size} bytes, not {len(payload)}")
        return cls(*cls.LAYOUT.unpack(payload))

    def pack(self) -> bytes:
        return self.LAYOUT.pack(*astuple(self))  # type: ignore[call-overload]  # every Record is a dataclass


@dataclass(frozen=True, slots=True)
class Header(Record):
    """The 12 bytes before every payload."""

    LAYOUT = struct.Struct("=III")
    request: int
    flags: int
    size: int


@dataclass(frozen=True, slots=True)
class U64(Record):
    """One number: features, an acknowledgement, a ring index with its "no fd" bit."""

    LAYOUT = struct.Struct("=Q")
    NO_FD = 0x100  # of SET_VRING_KICK, CALL and ERR
    value: int


@dataclass(frozen=True, slots=True)
class VringState(Record):
    """A ring and one number about it."""

    LAYOUT = struct.Struct("=II")
    index: int
    num: int


@dataclass(frozen=True, slots=True)
class VringAddress(Record):
    """Where a ring lies, in the front-end's own address space. The used ring comes before the available one."""

    LAYOUT = struct.Struct("=IIQQQQ")
    LOG = 0x1  # the only flag
    index: int
    flags: int
    descriptor: int
    used: int
    available: int
    log: int


@dataclass(frozen=True, slots=True)
class Region(Record):
    """A run of guest memory: its guest address and size, the front-end's address, the offset in its fd."""

    LAYOUT = struct.Struct("=QQQQ")
    guest_address: int
    size: int
    user_address: int
    mmap_offset: int


@dataclass(frozen=True, slots=True)
class Log(Record):
    """Where the bitmap of dirty pages lies in its fd."""

    LAYOUT = struct.Struct("=QQ")
    size: int
    mmap_offset: int


@dataclass(frozen=True, slots=True)
class Inflight(Record):
    """An in-flight region: what the front-end maps of its fd, and for how many rings of which size."""

    LAYOUT = struct.Struct("=QQHH4x")
    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int


@dataclass(frozen=True, slots=True)
class ConfigWindow:
    """A piece of the configuration space."""

    HEAD: ClassVar = struct.Struct("=III")
    start: int
    size: int
    flags: int
    data: bytes

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        if len(payload) < cls.HEAD.size:
            raise ProtocolViolation(f"a configuration payload has at least {cls.HEAD.size} bytes, not {len(payload)}")
        start, size, flags = cls.HEAD.unpack_from(payload)
        if size > MAX_CONFIG_SIZE or size != len(payload) - cls.HEAD.size:
            raise ProtocolViolation(f"a configuration payload of {len(payload)} bytes claims {size} bytes of space")
        return cls(start, size, flags, payload[cls.HEAD.size :])

    def pack(self) -> bytes:
        return self.HEAD.pack(self.start, self.size, self.flags) + self.data


@dataclass(frozen=True, slots=True)
class MemoryTable:
    """The complete table of SET_MEM_TABLE."""

    HEAD: ClassVar = struct.Struct("=II")
    regions: tuple[Region, ...]

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        if len(payload) < cls.HEAD.size:
            raise ProtocolViolation(f"a memory table has at least {cls.HEAD.size} bytes, not {len(payload)}")
        count, _ = cls.HEAD.unpack_from(payload)
        if count > MAX_FDS or len(payload) != cls.HEAD.size + count * Region.LAYOUT.size:
            raise ProtocolViolation(f"a memory table of {len(payload)} bytes claims {count} regions")
        return cls(tuple(Region(*fields) for fields in Region.LAYOUT.iter_unpack(payload[cls.HEAD.size :])))

    def pack(self) -> bytes:
        return self.HEAD.pack(len(self.regions), 0) + b"".join(region.pack() for region in self.regions)


@dataclass(frozen=True, slots=True)
class MemorySlot:
    """The single region of ADD_MEM_REG and REM_MEM_REG, after eight bytes of padding."""

    PADDING: ClassVar = 8
    region: Region

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        return cls(Region.parse(payload[cls.PADDING :]))

    def pack(self) -> bytes:
        return bytes(self.PADDING) + self.region.pack()


@dataclass(frozen=True, slots=True)
class Message:
    """One request as it came: *nfds* file descriptors travelled with it."""

    request: int
    flags: int
    payload: bytes
    nfds: int = 0
