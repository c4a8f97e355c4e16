"""What an image is: one feature for sure, others by chance, as far as they go together."""

from dataclasses import dataclass, replace
from random import Random

FEATURES = (
    "subclusters",
    "data-file",
    "data-file-raw",
    "encrypted",
    "luks",
    "snapshots",
    "bitmaps",
    "compressed",
)
CLUSTERS = {9: 1500, 10: 900, 12: 500, 14: 200, 16: 60, 17: 40, 21: 6}  # how many a disk has
CIPHERS = (
    "",
    ",encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256",
    ",encrypt.cipher-mode=cbc,encrypt.ivgen-alg=plain,encrypt.hash-alg=sha1",
)
BASES = ("raw", "qcow2", "compressed", "subclusters", "encrypted", "data-file")


@dataclass(frozen=True)
class Shape:
    """An image and what may happen to it."""

    features: frozenset[str]
    cluster_bits: int
    refcount_bits: int = 16
    version: int = 3
    is_lazy: bool = False
    compression: str = "zlib"
    cipher: str = ""
    base: "Shape | None" = None
    base_nbytes: int = 0

    @property
    def is_raw(self) -> bool:
        """A raw image, or raw and encrypted: no qcow2."""
        return bool(self.features & {"raw", "luks"})

    @property
    def is_encrypted(self) -> bool:
        return bool(self.features & {"encrypted", "luks"})

    @property
    def has_data_file(self) -> bool:
        return bool(self.features & {"data-file", "data-file-raw"})

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def nbytes(self) -> int:
        """Of the disk at first: its last cluster is a part of one."""
        return CLUSTERS[self.cluster_bits] * self.cluster_size + self.cluster_size // 1024 * 512

    def __str__(self) -> str:
        said = ["+".join(sorted(self.features)) or "plain", f"v{self.version}", f"{self.cluster_size}"]
        said += [f"rc{self.refcount_bits}", "lazy" * self.is_lazy, self.cipher.replace("encrypt.", "")]
        over = f" over {self.base_nbytes} of {self.base}" if self.base else ""
        return " ".join(filter(None, said)) + over

    def options(self, data_file: str) -> str:
        """What `create -o` takes."""
        said = [f"cluster_size={self.cluster_size}", f"compat={'0.10' if self.version == 2 else '1.1'}"]
        if self.version == 3:
            said.append(f"refcount_bits={self.refcount_bits}")
            said.append(f"lazy_refcounts={'on' if self.is_lazy else 'off'}")
            said.append(f"compression_type={self.compression}")
        if "subclusters" in self.features:
            said.append("extended_l2=on")
        if self.has_data_file:
            said.append(f"data_file={data_file}")
        if "data-file-raw" in self.features:
            said.append("data_file_raw=on")
        if "encrypted" in self.features:
            said.append(f"encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10{self.cipher}")
        return ",".join(said)


def goes_with(feature: str, features: frozenset[str], cluster_bits: int, version: int, refcount_bits: int) -> bool:
    """Whether an image of *features* may have *feature*, too."""
    if features & {"luks", "raw"}:
        return False
    data_files = {"data-file", "data-file-raw"}
    match feature:
        case "subclusters":
            return version == 3 and cluster_bits >= 14
        case "data-file":
            return version == 3 and features <= {"bitmaps", "subclusters", "encrypted"}
        case "data-file-raw":
            return version == 3 and features <= {"bitmaps", "subclusters"}
        case "encrypted":  # in a raw file it is noise at first
            return cluster_bits >= 10 and not features & {"data-file-raw", "compressed"}
        case "snapshots":
            return refcount_bits > 1 and not features & data_files
        case "bitmaps":
            return version == 3
        case "compressed":
            return not features & {*data_files, "encrypted"}
    raise ValueError(feature)


def draw_shape(draw: Random, feature: str, *, depth: int = 2) -> Shape:
    """An image that has *feature*, or is "raw" or "qcow2", over at most *depth* others."""
    cluster_bits = draw.choice(
        [bits for bits in CLUSTERS if bits >= {"subclusters": 14, "encrypted": 10}.get(feature, 9)]
    )
    if feature in ("raw", "luks"):
        return Shape(frozenset([feature]), cluster_bits)
    needs_v3 = feature in ("subclusters", "data-file", "data-file-raw", "bitmaps")
    version = 2 if not needs_v3 and draw.random() < 0.15 else 3
    narrowest = 2 if feature == "snapshots" else 1
    widths = [width for width in (1, 2, 4, 8, 16, 32, 64) if width >= narrowest]
    refcount_bits = 16 if version == 2 else draw.choice(widths)
    features = frozenset([feature]) - {"qcow2"}
    for other in draw.sample(FEATURES, len(FEATURES)):
        is_wanted = other not in (feature, "luks") and draw.random() < 0.25
        if is_wanted and goes_with(other, features, cluster_bits, version, refcount_bits):
            features |= {other}
    shape = Shape(
        features,
        cluster_bits,
        refcount_bits,
        version,
        is_lazy=version == 3 and draw.random() < 0.4,
        compression="zstd" if version == 3 and draw.random() < 0.5 else "zlib",
        cipher=draw.choice(CIPHERS),
    )
    if depth and "data-file-raw" not in features and draw.random() < 0.6:
        base = draw_shape(draw, draw.choice(BASES), depth=depth - 1)
        parts = draw.choice([2, 3, 4, 5])
        return replace(shape, base=base, base_nbytes=shape.nbytes * parts // 4 // 512 * 512)
    return shape
