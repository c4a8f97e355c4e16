"""The configuration space of a block device, byte for byte."""

import struct
from dataclasses import astuple, dataclass
from typing import ClassVar

SECTOR = 512
SERIAL_MAX = 20  # VIRTIO_BLK_ID_BYTES
SEG_MAX = 126  # a driver must fit seg_max + 2 descriptors into the smallest usual ring, 128
MAX_RANGE_SECTORS = 32768  # of one discard or write-zeroes segment: 16 MiB, so that none holds up the others for long
WCE_OFFSET = 32


@dataclass(frozen=True, slots=True)
class Properties:
    """What a driver learns about a disk; sizes in bytes."""

    size: int
    block_size: int = SECTOR
    physical_block_size: int = 4096
    optimal_io_size: int = 0
    read_only: bool = False
    serial: str = ""


@dataclass(frozen=True, slots=True)
class BlockConfig:
    """struct virtio_blk_config as far as our features reach, little-endian. Spec: virtio 1.2, 5.2.4."""

    LAYOUT: ClassVar = struct.Struct("<QIIHBBIBBHIBxHIIIIIB")

    capacity: int  # sectors
    size_max: int
    seg_max: int
    cylinders: int
    heads: int
    sectors: int
    blk_size: int
    physical_block_exp: int
    alignment_offset: int
    min_io_size: int  # logical blocks
    opt_io_size: int  # logical blocks
    wce: int
    num_queues: int
    max_discard_sectors: int
    max_discard_seg: int
    discard_sector_alignment: int
    max_write_zeroes_sectors: int
    max_write_zeroes_seg: int
    write_zeroes_may_unmap: int

    def pack(self) -> bytes:
        return self.LAYOUT.pack(*astuple(self))


def block_config(properties: Properties, *, num_queues: int, wce: bool) -> BlockConfig:
    """The configuration space that describes *properties*."""
    logical = properties.block_size
    physical = max(properties.physical_block_size, logical)
    granularity = max(properties.optimal_io_size, logical)
    writable = int(not properties.read_only)
    return BlockConfig(
        capacity=properties.size // SECTOR,
        size_max=0,
        seg_max=SEG_MAX,
        cylinders=0,
        heads=0,
        sectors=0,
        blk_size=logical,
        physical_block_exp=(physical // logical).bit_length() - 1,
        alignment_offset=0,
        min_io_size=physical // logical,
        opt_io_size=properties.optimal_io_size // logical,
        wce=int(wce),
        num_queues=num_queues,
        max_discard_sectors=writable * MAX_RANGE_SECTORS,
        max_discard_seg=writable,
        discard_sector_alignment=writable * granularity // SECTOR,
        max_write_zeroes_sectors=writable * MAX_RANGE_SECTORS,
        max_write_zeroes_seg=writable,
        write_zeroes_may_unmap=writable,
    )


def read_window(space: bytes, start: int, nbytes: int) -> bytes:
    """*nbytes* of the configuration *space* from *start*; what lies beyond its end reads as zeros."""
    return space[start : start + nbytes].ljust(nbytes, b"\0")
