"""Feature bits: what a virtio device and its rings may agree on with a driver."""

from enum import IntFlag


class BlockFeature(IntFlag):
    """Bits that belong to the block device. Spec: virtio 1.2, 5.2.3."""

    SIZE_MAX = 1 << 1  # VIRTIO_BLK_F_SIZE_MAX
    SEG_MAX = 1 << 2  # VIRTIO_BLK_F_SEG_MAX
    GEOMETRY = 1 << 4  # VIRTIO_BLK_F_GEOMETRY
    RO = 1 << 5  # VIRTIO_BLK_F_RO
    BLK_SIZE = 1 << 6  # VIRTIO_BLK_F_BLK_SIZE
    FLUSH = 1 << 9  # VIRTIO_BLK_F_FLUSH
    TOPOLOGY = 1 << 10  # VIRTIO_BLK_F_TOPOLOGY
    CONFIG_WCE = 1 << 11  # VIRTIO_BLK_F_CONFIG_WCE
    MQ = 1 << 12  # VIRTIO_BLK_F_MQ
    DISCARD = 1 << 13  # VIRTIO_BLK_F_DISCARD
    WRITE_ZEROES = 1 << 14  # VIRTIO_BLK_F_WRITE_ZEROES


class RingFeature(IntFlag):
    """Bits that belong to the rings and the transport. Spec: virtio 1.2, 6."""

    INDIRECT_DESC = 1 << 28  # VIRTIO_F_INDIRECT_DESC
    EVENT_IDX = 1 << 29  # VIRTIO_F_EVENT_IDX
    VERSION_1 = 1 << 32  # VIRTIO_F_VERSION_1
    RING_PACKED = 1 << 34  # VIRTIO_F_RING_PACKED


class TransportFeature(IntFlag):
    """Bits between a driver and whoever shows it the device; the device does the same with and without them."""

    ANY_LAYOUT = 1 << 27  # VIRTIO_F_ANY_LAYOUT, of legacy drivers
    SR_IOV = 1 << 37  # VIRTIO_F_SR_IOV


def unknown_bits(features: int, offered: int) -> int:
    """The bits of *features* that *offered* lacks.

    Plain integers on purpose: inverting an IntFlag drops the bits its class has never heard of.
    """
    return int(features) ^ (int(features) & int(offered))


RING_FEATURES = int(RingFeature.VERSION_1 | RingFeature.INDIRECT_DESC | RingFeature.EVENT_IDX | RingFeature.RING_PACKED)
BLOCK_FEATURES = int(
    BlockFeature.SEG_MAX | BlockFeature.BLK_SIZE | BlockFeature.TOPOLOGY | BlockFeature.FLUSH | BlockFeature.MQ
)
WRITABLE_FEATURES = int(BlockFeature.CONFIG_WCE | BlockFeature.DISCARD | BlockFeature.WRITE_ZEROES)


def offered_features(*, read_only: bool) -> int:
    """What a block device offers; a read-only one has nothing to discard, to zero or to cache."""
    return RING_FEATURES | BLOCK_FEATURES | (int(BlockFeature.RO) if read_only else WRITABLE_FEATURES)


def caches_writes(features: int, *, wce: bool, writeback: bool) -> bool:
    """Whether completed writes may still be volatile, for a driver that accepted *features*.

    A driver that cannot flush gets writethrough whatever was asked for; one that took CONFIG_WCE decides by the
    *wce* byte; for the others the configured mode (*writeback*) stands. Spec: virtio 1.2, 5.2.5.2 and 5.2.6.2.
    """
    if not features & BlockFeature.FLUSH:
        return False
    return wce if features & BlockFeature.CONFIG_WCE else writeback
