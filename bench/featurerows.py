"""The cases of the format's features."""

from bench.case import Case, Images
from bench.load import Job
from bench.recipe import Recipe
from bench.rows import FILLED, GIB, KIB, LAZY, OVERLAY
from vhost.option import CacheMode

PARTS = "extended_l2=on,cluster_size=128k"
FRESH_PARTS = Recipe(64 * GIB, f"{LAZY},{PARTS}", name="fresh, lazy refcounts, 64 GiB, extended L2")
FILLED_PARTS = Recipe(GIB, f"compat=1.1,{PARTS}", is_filled=True, name="1 GiB, all written, extended L2")
OVERLAY_PARTS = Recipe(2 * GIB, f"{LAZY},{PARTS}", base_nbytes=2 * GIB, name="overlay on 2 GiB, extended L2")
OVERLAY_DATA_FILE = Recipe(
    2 * GIB, LAZY, base_nbytes=2 * GIB, has_data_file=True, name="overlay on 2 GiB, in a data file"
)
RAW = "data_file_raw=on"
FRESH_DATA_FILE = Recipe(64 * GIB, LAZY, has_data_file=True, name="fresh, 64 GiB, in a data file")
FRESH_RAW = Recipe(64 * GIB, f"{LAZY},{RAW}", has_data_file=True, name="fresh, 64 GiB, in a raw data file")
FILLED_DATA_FILE = Recipe(GIB, has_data_file=True, is_filled=True, name="1 GiB, all written, in a data file")
FILLED_RAW = Recipe(
    GIB, f"compat=1.1,{RAW}", has_data_file=True, is_filled=True, name="1 GiB, all written, in a raw data file"
)
FRESH_LUKS = Recipe(64 * GIB, LAZY, is_encrypted=True, name="fresh, lazy refcounts, 64 GiB, LUKS")
FILLED_LUKS = Recipe(GIB, is_encrypted=True, is_filled=True, name="1 GiB, all written, LUKS")
FILLED_BITMAPS = Recipe(GIB, is_filled=True, nbitmaps=3, name="1 GiB, all written, three bitmaps")


def warm(
    name: str, recipe: Recipe, what: str, block_size: int = 4 * KIB, depth: int = 32, target: float | None = None
) -> tuple[Case, Case]:
    """Reads and overwrites of an image that is all written."""
    title = f"{what}, warm {block_size // KIB} KiB random {{}}, depth {depth}"
    reads = Job(GIB, read_percent=100, block_size=block_size, depth=depth)
    writes = Job(GIB, block_size=block_size, depth=depth)
    return (
        Case(f"{name}-read-{depth}", title.format("reads"), recipe, reads, Images.SHARED, target=target),
        Case(
            f"{name}-overwrite-{depth}",
            title.format("overwrites"),
            recipe,
            writes,
            Images.PER_SERVER,
            target=target,
        ),
    )


def fresh(name: str, recipe: Recipe, what: str) -> Case:
    """Stable writes to an image that holds nothing."""
    title = f"writethrough, fresh, {what}, 4 KiB random writes, depth 32"
    job = Job(recipe.nbytes, depth=32)
    return Case(f"{name}-fresh-32", title, recipe, job, Images.PER_RUN, CacheMode.WRITETHROUGH, target=8)


def over_base(name: str, recipe: Recipe, what: str, depth: int, target: float | None) -> Case:
    """Random writes to an overlay, which meet clusters again."""
    title = f"overlay, writeback, {what}, 4 KiB random writes, depth {depth}"
    job = Job(recipe.nbytes, depth=depth)
    return Case(f"{name}-overlay-{depth}", title, recipe, job, Images.PER_RUN, target=target)


FEATURES = (
    over_base("parts", OVERLAY_PARTS, "extended L2, 128 KiB clusters", 1, 2),
    over_base("parts", OVERLAY_PARTS, "extended L2, 128 KiB clusters", 32, 3),
    over_base("data-file", OVERLAY_DATA_FILE, "in a data file", 1, None),
    over_base("data-file", OVERLAY_DATA_FILE, "in a data file", 32, None),
    over_base("plain", OVERLAY, "64 KiB clusters", 1, None),
    over_base("plain", OVERLAY, "64 KiB clusters", 32, None),
    *warm("parts", FILLED_PARTS, "extended L2"),
    *warm("data-file", FILLED_DATA_FILE, "data file"),
    *warm("raw-data-file", FILLED_RAW, "raw data file"),
    *warm("luks", FILLED_LUKS, "LUKS", target=1.5),
    *warm("luks-large", FILLED_LUKS, "LUKS", block_size=128 * KIB, depth=16, target=1.5),
    *warm("plain-large", FILLED, "plain", block_size=128 * KIB, depth=16),
    *warm("bitmaps", FILLED_BITMAPS, "three bitmaps"),
    fresh("parts", FRESH_PARTS, "extended L2"),
    fresh("data-file", FRESH_DATA_FILE, "data file"),
    fresh("raw-data-file", FRESH_RAW, "raw data file"),
    fresh("luks", FRESH_LUKS, "LUKS"),
)
