"""What the front-end says about a virtqueue before it starts."""

from dataclasses import dataclass

QUEUES_MAX = 256  # a vring index is 8 bits on the vhost-user wire
SIZE_MAX = 1024


@dataclass(frozen=True, slots=True)
class QueueLayout:
    """Where a split virtqueue lies, in the front-end's user addresses, and where the device goes on reading."""

    size: int  # entries, a power of two up to SIZE_MAX
    descriptor_address: int
    driver_address: int  # the available ring
    device_address: int  # the used ring
    base: int  # the available index to fetch next
    event_idx: bool = False  # VIRTIO_F_EVENT_IDX was negotiated
