"""What the overlay of a snapshot is to be like: what a new image is told by `create -o`, and its bitmaps."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from qcow2.engine.create import Options
from qcow2.engine.image import Image
from qcow2.format.layout import MIN_CLUSTER_BITS_OF_SUBCLUSTERS
from qcow2.tool.option import image_options
from vhost.overlaybitmaps import OverlayBitmaps

NAMES = ("cluster_size", "compression_type", "extended_l2", "lazy_refcounts", "refcount_bits")


@dataclass(frozen=True, slots=True)
class OverlayWish:
    """The *given* options, and the *bitmaps* that it has from its first moment."""

    bitmaps: OverlayBitmaps = field(default_factory=OverlayBitmaps)
    given: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises: ValueError."""
        for name in self.given:
            if name not in NAMES:
                raise ValueError(f"overlay option {name!r} is unknown, known are {', '.join(NAMES)}")


def overlay_options(below: Image, given: Mapping[str, str]) -> Options:
    """As what is *below*, but for what is *given*. Raises: ValueError.

    Unless that says otherwise it has subclusters, if its clusters are large enough: a small write then copies little.
    """
    header = below.header
    options = image_options(
        {
            "cluster_size": str(header.cluster_size),
            "compression_type": header.compression_type.name.lower(),
            "lazy_refcounts": "on" if header.has_lazy_refcounts else "off",
            "refcount_bits": str(1 << header.record.refcount_order),
            **given,
        },
        below.size,
    )
    if "extended_l2" in given or options.cluster_bits < MIN_CLUSTER_BITS_OF_SUBCLUSTERS:
        return options
    return replace(options, has_subclusters=True)
