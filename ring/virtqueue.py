"""What the front-end says about a virtqueue before it starts."""

from dataclasses import dataclass

QUEUES_MAX = 256  # a vring index is 8 bits on the vhost-user wire


@dataclass(frozen=True, slots=True)
class QueueLayout:
    """Where a virtqueue lies, in the front-end's user addresses, and where the device goes on reading."""

    size: int  # entries up to 32768; of a split ring, a power of two
    descriptor_address: int
    driver_address: int  # the available ring; packed: the driver's event suppression
    device_address: int  # the used ring; packed: ours
    base: int  # the available index to fetch next; packed: two positions, as SET_VRING_BASE has them
    event_idx: bool = False  # VIRTIO_F_EVENT_IDX was negotiated
    packed: bool = False  # VIRTIO_F_RING_PACKED was
