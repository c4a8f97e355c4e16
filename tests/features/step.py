"""What happens to an image next."""

from collections.abc import Collection
from dataclasses import dataclass
from random import Random

from tests.features.model import SECTOR, Model
from tests.features.shape import Shape

IO = ("write",) * 5 + ("zero", "unmap", "discard", "flush")
SNAPSHOTS = ("create-snapshot", "apply-snapshot", "delete-snapshot")
BITMAPS = ("add", "remove", "clear", "enable", "disable", "merge")
SNAPSHOTS_MOST = 6
BITMAPS_MOST = 5


@dataclass(frozen=True)
class Step:
    """One operation: on a range, or with names."""

    kind: str
    offset: int = 0
    nbytes: int = 0
    seed: int = 0
    name: str = ""
    source: str = ""

    def byte(self) -> int:
        """For whoever writes one repeated byte."""
        return self.seed % 255 + 1


def kinds_of(shape: Shape, may: Collection[str]) -> list[str]:
    """The kinds that an image of *shape* can see from somebody who *may* do these, as often as they are drawn."""
    kinds = [*IO * 3]
    if "compressed" in shape.features:
        kinds += ["compress"] * 9
    if "snapshots" in shape.features:
        kinds += SNAPSHOTS
    if "bitmaps" in shape.features:
        kinds += BITMAPS
    if not (shape.version == 2 and "snapshots" in shape.features):
        kinds += ["grow", "shrink"]
    return [kind for kind in kinds if kind in may]


def draw_step(draw: Random, shape: Shape, model: Model, kinds: list[str], *, unit: int, serial: int) -> Step | None:
    """A step of one of *kinds*, at multiples of *unit*; None if what was drawn makes no sense now."""
    kind = draw.choice(kinds)
    match kind:
        case "flush":
            return Step(kind)
        case "compress":
            return _compress(draw, shape, model)
        case "create-snapshot":
            return Step(kind, name=f"s{serial}") if len(model.snapshots) < SNAPSHOTS_MOST else None
        case "apply-snapshot" | "delete-snapshot":
            return Step(kind, name=draw.choice([*model.snapshots])) if model.snapshots else None
        case "grow" | "shrink":
            nbytes = draw.randrange(1, 8) * draw.choice([SECTOR, shape.cluster_size])
            nbytes = model.nbytes + (nbytes if kind == "grow" else -nbytes)
            return Step(kind, nbytes=nbytes) if shape.nbytes // 2 < nbytes < shape.nbytes * 5 // 4 else None
        case "add":
            granularity = 1 << draw.randrange(9, 22)
            return Step(kind, nbytes=granularity, name=f"b{serial}") if len(model.bitmaps) < BITMAPS_MOST else None
        case "remove" | "clear" | "enable" | "disable" | "merge":
            if not model.bitmaps or (kind == "remove" and len(model.bitmaps) < 2):
                return None
            return Step(kind, name=draw.choice([*model.bitmaps]), source=draw.choice([*model.bitmaps]))
    return Step(kind, *_range(draw, shape, model.nbytes, unit), seed=draw.getrandbits(32))


def _compress(draw: Random, shape: Shape, model: Model) -> Step | None:
    if model.nbytes < shape.cluster_size:
        return None
    start = draw.randrange(model.nbytes // shape.cluster_size) * shape.cluster_size
    return Step("compress", start, min(shape.cluster_size, model.nbytes - start), draw.getrandbits(32))


def _range(draw: Random, shape: Shape, size: int, unit: int) -> tuple[int, int]:
    """Likes borders of clusters and of their parts, single sectors, and the ends of the disk."""
    cluster = shape.cluster_size
    part = max(cluster // 32, SECTOR)
    longest = min(3 * cluster + 64 * SECTOR, 256 << 10) if cluster <= 1 << 16 else cluster + 64 * SECTOR
    nbytes = draw.choice([SECTOR, 8 * SECTOR, part, 3 * part, cluster, 2 * cluster, draw.randrange(unit, longest)])
    start = draw.choice(
        [
            draw.randrange(size),
            draw.randrange(size) // cluster * cluster,
            draw.randrange(size) // part * part,
            draw.randrange(size) // cluster * cluster + cluster - part,
            draw.randrange(min(size, 8 * cluster)),
            size - nbytes,
            0,
        ]
    )
    nbytes = max(min(nbytes, size) // unit * unit, unit)
    return max(0, min(start // unit * unit, size - nbytes)), nbytes
