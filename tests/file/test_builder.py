"""The builder's images mean to QEMU what their recipes say: it is the ruler everything else is measured with."""

import random
import struct
from pathlib import Path

import pytest

from tests.builder import Recipe, build
from tests.builder.record import DIRTY, FEATURE_NAMES, LAZY_REFCOUNTS, feature_name_table, pack_refcounts
from tests.oracle import assert_clean, assert_same_bytes, assert_same_disk, qemu_check, qemu_img, qemu_read, read_header


def noise(seed: int, nbytes: int) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def text(seed: int, nbytes: int) -> bytes:
    """Bytes that compress to about half."""
    return bytes(random.Random(seed).choices(b"0123456789abcdef", k=nbytes))


def every_cluster_type(**options: object) -> Recipe:
    """All types over several L2 tables where the cluster size allows, with a partial last cluster."""
    recipe = Recipe(size=0, **options)  # type: ignore[arg-type]
    size = recipe.cluster_size
    indices = [0, 1, 2, 3, 5, 6, 7, 9, 11]
    if recipe.cluster_bits <= 12:
        indices += [recipe.entries_per_table - 1, recipe.entries_per_table, 3 * recipe.entries_per_table + 2]
    recipe.size = (max(indices) + 1) * size + size // 1024 * 512  # ends inside a cluster, on a sector
    for position, index in enumerate(indices):
        match position % 5:
            case 0 | 3:
                recipe.data(index, noise(index, size))
            case 1:
                recipe.data(index, noise(index, size // 2))
            case 2 if recipe.version == 3:
                recipe.zero(index)
            case 4 if recipe.version == 3:
                recipe.preallocated_zero(index, hidden=noise(index, 512))
    return recipe


@pytest.mark.parametrize("layout", ["packed", "reversed", "scattered"])
@pytest.mark.parametrize(
    ("version", "cluster_bits", "refcount_order"),
    [(2, 9, 4), (2, 16, 4), (2, 21, 4), *((3, 9, order) for order in range(7)), (3, 12, 3), (3, 16, 4), (3, 21, 6)],
)
def test_qemu_reads_what_the_recipe_says(
    tmp_path: Path, version: int, cluster_bits: int, refcount_order: int, layout: str
) -> None:
    recipe = every_cluster_type(
        version=version, cluster_bits=cluster_bits, refcount_order=refcount_order, layout=layout, seed=cluster_bits
    )
    built = build(recipe, tmp_path / "a")
    assert_clean(built.path)
    assert_same_disk(built.path, recipe.contents())


@pytest.mark.sample(4)
@pytest.mark.parametrize("cluster_bits", [9, 10, 12, 16, 21])
@pytest.mark.parametrize("compression", ["deflate", "zstd"])
def test_compressed_clusters_start_at_any_byte_and_straddle(
    tmp_path: Path, compression: str, cluster_bits: int
) -> None:
    recipe = Recipe(size=20 << cluster_bits, cluster_bits=cluster_bits, compression=compression)  # type: ignore[arg-type]
    for index in range(0, 18, 2):
        recipe.compressed(index, text(index, recipe.cluster_size // 4), skip=index % 7)
    recipe.data(1, noise(1, recipe.cluster_size))
    built = build(recipe, tmp_path / "a")
    assert_clean(built.path)
    assert_same_disk(built.path, recipe.contents())
    starts = [cluster.host_offset for cluster in recipe.view.values() if cluster.kind == "compressed"]
    assert any(start % 512 for start in starts)


def test_a_compressed_cluster_straddles_host_clusters(tmp_path: Path) -> None:
    recipe = Recipe(size=1 << 20, cluster_bits=12)
    for index in range(4):
        recipe.compressed(index, text(index, 4096))
    build(recipe, tmp_path / "a")
    ends = [(c.host_offset >> 12, c.host_offset + c.nbytes - 1 >> 12) for c in recipe.view.values()]
    assert any(first != last for first, last in ends)
    assert_clean(tmp_path / "a")


@pytest.mark.parametrize("refcount_order", [1, 2, 4, 6])
def test_snapshots_share_clusters(tmp_path: Path, refcount_order: int) -> None:
    recipe = Recipe(size=1 << 20, cluster_bits=12, refcount_order=refcount_order)
    for index in range(8):
        recipe.data(index, noise(index, 4096))
    recipe.snapshot("before")
    before = recipe.contents()
    recipe.data(3, noise(33, 4096))
    recipe.zero(4)
    built = build(recipe, tmp_path / "a")
    assert_clean(built.path)
    assert_same_disk(built.path, recipe.contents())
    assert_same_bytes(qemu_read(built.path, snapshot="before"), before)


def test_a_snapshot_shares_whole_tables(tmp_path: Path) -> None:
    recipe = Recipe(size=1 << 20, cluster_bits=9)
    recipe.data(0, noise(0, 512))
    recipe.data(64, noise(1, 512))
    recipe.snapshot("before")
    recipe.data(64, noise(2, 512))
    built = build(recipe, tmp_path / "a")
    assert_clean(built.path)
    l1 = struct.unpack(">2Q", built.peek(built.l1_offset, 16))
    assert [entry >> 63 for entry in l1] == [0, 1]


def test_data_lies_where_asked(tmp_path: Path) -> None:
    recipe = Recipe(size=1 << 20, cluster_bits=12)
    recipe.data(0, b"far", at=70_000)
    recipe.data(1, b"near", at=1)
    built = build(recipe, tmp_path / "a")
    assert built.peek(70_000 << 12, 3) == b"far"
    assert_clean(built.path)
    assert_same_disk(built.path, recipe.contents())


def test_backing_file_with_its_format(tmp_path: Path) -> None:
    base = Recipe(size=1 << 20)
    base.data(0, b"base" * 100)
    base.data(1, b"hidden")
    build(base, tmp_path / "base")
    recipe = Recipe(size=1 << 20, backing="base", extensions=[(0xE2792ACA, b"qcow2")])
    recipe.zero(1)
    build(recipe, tmp_path / "a")
    assert_same_disk(tmp_path / "a", recipe.contents(base.contents()))


def test_bitmaps_are_listed_by_qemu(tmp_path: Path) -> None:
    recipe = Recipe(size=1 << 20, bitmaps=[("weekly", 16), ("daily", 12)])
    build(recipe, tmp_path / "a")
    assert_clean(tmp_path / "a")
    said = qemu_img("info", tmp_path / "a").stdout
    assert "weekly" in said
    assert "daily" in said


def test_unknown_fields_extensions_and_features_are_there(tmp_path: Path) -> None:
    recipe = Recipe(
        size=1 << 20,
        compatible=1 << 40,
        autoclear=1 << 41,
        header_tail=b"\xaa" * 16,
        extensions=[(0xCAFE, b"unknown"), (FEATURE_NAMES, feature_name_table([(0, 50, "flux")])), (0xBABE, b"")],
    )
    build(recipe, tmp_path / "a")
    assert_clean(tmp_path / "a")
    header = read_header(tmp_path / "a")
    assert header.fields["header_length"] == 128
    assert [kind for kind, _ in header.extensions] == [0xCAFE, FEATURE_NAMES, 0xBABE]


def test_an_unknown_incompatible_bit_is_refused_by_its_name(tmp_path: Path) -> None:
    names = feature_name_table([(0, 50, "flux capacitor")])
    build(Recipe(size=1 << 20, incompatible=1 << 50, extensions=[(FEATURE_NAMES, names)]), tmp_path / "a")
    assert "flux capacitor" in qemu_img("info", tmp_path / "a", check=False).stderr


def test_a_lazily_crashed_image_is_seen_by_qemu(tmp_path: Path) -> None:
    recipe = Recipe(size=1 << 20, incompatible=DIRTY, compatible=LAZY_REFCOUNTS)
    recipe.data(0, b"x")
    built = build(recipe, tmp_path / "a")
    built.set_refcount(recipe.view[0].host_offset, 0)
    code, report = qemu_check(built.path)
    assert code == 2
    assert report["corruptions"] == 2  # the count, and the COPIED flag it belies


@pytest.mark.parametrize("order", range(7))
def test_refcounts_pack_at_every_width(order: int) -> None:
    count = min((1 << (1 << order)) - 1, 1)
    packed = pack_refcounts([0] * 9 + [count] + [0] * 6, order)
    assert len(packed) == 16 * (1 << order) // 8
    bit = 9 << order
    assert packed[bit // 8 + max((1 << order) // 8 - 1, 0)] == 1 << bit % 8


@pytest.mark.parametrize("order", range(7))
def test_a_miscount_is_found(tmp_path: Path, order: int) -> None:
    recipe = Recipe(size=1 << 20, cluster_bits=12, refcount_order=order)
    for index in range(8):
        recipe.data(index, noise(index, 4096))
    built = build(recipe, tmp_path / "a")
    built.set_refcount(recipe.view[5].host_offset, 0)
    assert qemu_check(built.path)[1]["corruptions"] == 2  # the count, and the COPIED flag it belies
