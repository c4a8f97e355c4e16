"""Every cluster type of images written from the specification reads as the recipe says, through backing chains too."""

import random
from pathlib import Path

import pytest

import qcow2
from tests.builder import Recipe, build
from tests.builder.record import BACKING_FORMAT
from tests.oracle import assert_same_bytes, qemu_img, sha256

GEOMETRIES = [
    (2, 9, 4),
    (2, 16, 4),
    (2, 21, 4),
    *((3, 9, order) for order in range(7)),
    (3, 12, 3),
    (3, 16, 4),
    (3, 21, 6),
]


def noise(seed: int, nbytes: int) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def text(seed: int, nbytes: int) -> bytes:
    """Bytes that compress to about half."""
    return bytes(random.Random(seed).choices(b"0123456789abcdef", k=nbytes))


def read_all(path: Path, piece: int = 1 << 20) -> bytes:
    with qcow2.open(str(path)) as disk:
        return b"".join(disk.read(at, min(piece, disk.size - at)) for at in range(0, disk.size, piece))


def every_cluster_type(seed: int, nclusters: int, **options: object) -> Recipe:
    """A random mixture of everything, with an end inside the last cluster."""
    rng = random.Random(seed)
    recipe = Recipe(size=0, seed=seed, **options)  # type: ignore[arg-type]
    size = recipe.cluster_size
    recipe.size = nclusters * size + size // 1024 * 512
    for index in range(nclusters + 1):
        match rng.randrange(6):
            case 0:
                recipe.data(index, rng.randbytes(size))
            case 1:
                recipe.data(index, rng.randbytes(size // 2))
            case 2 if recipe.version == 3:
                recipe.zero(index)
            case 3 if recipe.version == 3:
                recipe.preallocated_zero(index, hidden=rng.randbytes(512))
            case 4 if recipe.refcount_order >= 3:
                recipe.compressed(index, text(index, size // 2), skip=rng.randrange(9))
    return recipe


@pytest.mark.parametrize("layout", ["packed", "reversed", "scattered"])
@pytest.mark.parametrize(("version", "cluster_bits", "refcount_order"), GEOMETRIES)
def test_the_recipe_is_what_one_reads(
    tmp_path: Path, version: int, cluster_bits: int, refcount_order: int, layout: str
) -> None:
    nclusters = 300 if cluster_bits <= 12 else 9
    recipe = every_cluster_type(
        cluster_bits,
        nclusters,
        version=version,
        cluster_bits=cluster_bits,
        refcount_order=refcount_order,
        layout=layout,
    )
    build(recipe, tmp_path / "a")
    assert_same_bytes(read_all(tmp_path / "a"), recipe.contents())


@pytest.mark.parametrize("cluster_bits", [9, 10, 12, 16, 21])
@pytest.mark.parametrize("compression", ["deflate", "zstd"])
def test_compressed_clusters_read(tmp_path: Path, compression: str, cluster_bits: int) -> None:
    recipe = Recipe(size=20 << cluster_bits, cluster_bits=cluster_bits, compression=compression)  # type: ignore[arg-type]
    for index in range(0, 19, 2):
        recipe.compressed(index, text(index, recipe.cluster_size // 4), skip=index % 7)
    build(recipe, tmp_path / "a")
    assert_same_bytes(read_all(tmp_path / "a"), recipe.contents())


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_images_that_qemu_compressed_read(tmp_path: Path, compression: str) -> None:
    contents = text(1, 1 << 20) + bytes(1 << 20) + noise(2, 1 << 19)
    (tmp_path / "raw").write_bytes(contents)
    options = ("-O", "qcow2", "-o", f"compression_type={compression}")
    qemu_img("convert", "-c", "-f", "raw", *options, tmp_path / "raw", tmp_path / "a")
    assert_same_bytes(read_all(tmp_path / "a"), contents)


def test_reads_of_any_alignment_agree(tmp_path: Path) -> None:
    recipe = every_cluster_type(7, 200, cluster_bits=10, layout="scattered")
    build(recipe, tmp_path / "a")
    contents = recipe.contents()
    rng = random.Random(3)
    with qcow2.open(str(tmp_path / "a"), cache_size=1 << 20) as disk:
        for _ in range(500):
            start = rng.randrange(len(contents))
            nbytes = min(rng.choice([1, 511, 512, 513, 1024, 5000]), len(contents) - start)
            assert disk.read(start, nbytes) == contents[start : start + nbytes]


@pytest.mark.parametrize("base_format", ["qcow2", "raw"])
@pytest.mark.parametrize("shorter_by", [0, 700])
def test_a_chain_of_three_reads_through(tmp_path: Path, base_format: str, shorter_by: int) -> None:
    """Different cluster sizes, and a base that ends inside a cluster of the overlay."""
    base = every_cluster_type(1, 64, cluster_bits=9)
    base.size -= shorter_by * 2 // 512 * 512
    base.view = {i: c for i, c in base.view.items() if i << 9 < base.size}
    seen = base.contents()
    if base_format == "qcow2":
        build(base, tmp_path / "base")
    else:
        (tmp_path / "base").write_bytes(seen)
    middle = every_cluster_type(2, 16, cluster_bits=12, backing="base")
    middle.extensions.append((BACKING_FORMAT, base_format.encode()))
    build(middle, tmp_path / "middle")
    top = every_cluster_type(3, 40, cluster_bits=11, backing="middle", extensions=[(BACKING_FORMAT, b"qcow2")])
    build(top, tmp_path / "top")
    assert_same_bytes(read_all(tmp_path / "top"), top.contents(middle.contents(seen)))


def test_an_absolute_backing_name_is_found(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(noise(1, 4096))
    recipe = Recipe(size=4096, backing=str(tmp_path / "base"), extensions=[(BACKING_FORMAT, b"raw")])
    build(recipe, tmp_path / "top")
    assert read_all(tmp_path / "top") == noise(1, 4096)


@pytest.mark.parametrize("header_length", [104, 112])
def test_both_header_lengths_of_version_3_read(tmp_path: Path, header_length: int) -> None:
    recipe = Recipe(size=1 << 20, header_length=header_length)
    recipe.data(3, noise(3, 65536))
    build(recipe, tmp_path / "a")
    assert_same_bytes(read_all(tmp_path / "a"), recipe.contents())


def test_a_snapshotted_image_reads_its_active_view(tmp_path: Path) -> None:
    recipe = every_cluster_type(5, 100, cluster_bits=12)
    recipe.snapshot("one")
    recipe.data(3, noise(3, 4096))
    recipe.snapshot("two")
    recipe.zero(4)
    build(recipe, tmp_path / "a")
    assert_same_bytes(read_all(tmp_path / "a"), recipe.contents())


def test_reading_changes_no_byte(tmp_path: Path) -> None:
    recipe = every_cluster_type(5, 100, cluster_bits=12, autoclear=1 << 30, compatible=1 << 40)
    build(recipe, tmp_path / "a")
    before = sha256(tmp_path / "a")
    read_all(tmp_path / "a")
    assert sha256(tmp_path / "a") == before


@pytest.mark.parametrize("size", [0, 512, 65536 - 512, 65536 + 512])
def test_sizes_at_the_border_of_a_cluster(tmp_path: Path, size: int) -> None:
    recipe = Recipe(size=size)
    if size:
        recipe.data((size - 1) >> 16, noise(1, (size - 1) % 65536 + 1))
    build(recipe, tmp_path / "a")
    assert read_all(tmp_path / "a") == recipe.contents()
