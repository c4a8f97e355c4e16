"""Images written by us read the same in QEMU, and the reverse, over random work on images of many shapes.

Every round ends with `qemu-img check` and a comparison of the whole disk with the model.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import qcow2
from tests.builder import Recipe, build
from tests.builder.record import BACKING_FORMAT, LAZY_REFCOUNTS
from tests.oracle import assert_clean, assert_same_bytes, assert_same_disk, qemu_img, qemu_io, qemu_read
from tests.program import qcow2_tool_ok
from tests.workload import Model, Step, random_steps


@dataclass(frozen=True)
class Shape:
    """What kind of image."""

    compat: str
    cluster_bits: int
    refcount_bits: int
    backing: bool
    lazy: bool = False

    def __str__(self) -> str:
        lazy, backing = "-lazy" * self.lazy, "-overlay" * self.backing
        return f"v{self.compat}-{1 << self.cluster_bits}-rc{self.refcount_bits}{backing}{lazy}"

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def size(self) -> int:
        """A few L2 tables where clusters are small, and a partial last cluster."""
        nclusters = {9: 1500, 16: 60, 21: 7}[self.cluster_bits]
        return nclusters * self.cluster_size + self.cluster_size // 1024 * 512

    def options(self) -> str:
        said = f"compat={self.compat},cluster_size={self.cluster_size},refcount_bits={self.refcount_bits}"
        return said + ",lazy_refcounts=on" * self.lazy


def _shapes() -> Iterator[Shape]:
    for cluster_bits in (9, 16, 21):
        for backing in (False, True):
            yield Shape("0.10", cluster_bits, 16, backing)
            for refcount_bits in (1, 16, 64):
                yield Shape("1.1", cluster_bits, refcount_bits, backing, lazy=refcount_bits == 16)
    yield Shape("1.1", 16, 16, backing=False)
    yield Shape("1.1", 16, 16, backing=True)


SHAPES = list(_shapes())


def make_base(shape: Shape, directory: Path) -> bytes:
    """A base that is shorter than the overlay, of other cluster size, and its contents."""
    recipe = Recipe(size=shape.size * 3 // 4 // 512 * 512, cluster_bits=12, layout="scattered")
    rng = random.Random(shape.cluster_bits)
    for index in range(recipe.size >> 12):
        if rng.randrange(3):
            recipe.data(index, rng.randbytes(4096))
    build(recipe, directory / "base")
    return recipe.contents().ljust(shape.size, b"\0")


def create(shape: Shape, directory: Path, *, by: str) -> bytes:
    """Make an empty image or overlay `a` in *directory*; returns its contents."""
    contents = make_base(shape, directory) if shape.backing else bytes(shape.size)
    backing = ["-b", "base", "-F", "qcow2"] if shape.backing else []
    arguments = ["create", "-q", "-f", "qcow2", *backing, "-o", shape.options(), directory / "a", str(shape.size)]
    if by == "qemu":
        qemu_img(*arguments)
    else:
        qcow2_tool_ok(*arguments)
    return contents


def work(path: Path, model: Model, steps: list[Step]) -> None:
    with qcow2.open(str(path), writable=True) as disk:
        for step in steps:
            model.apply(step, disk)


def qemu_work(path: Path, model: Model, steps: list[Step]) -> None:
    """The same kind of work through qemu-io, whose writes are one repeated byte."""
    commands = []
    for step in steps:
        start, end = step.guest_offset, step.guest_offset + step.nbytes
        pattern = step.seed % 255 + 1
        match step.kind:
            case "write":
                commands.append(f"write -q -P {pattern} {start} {step.nbytes}")
                model.contents[start:end] = bytes([pattern]) * step.nbytes
            case "zero" | "unmap":
                commands.append(f"write -q -z {'-u ' if step.kind == 'unmap' else ''}{start} {step.nbytes}")
                model.contents[start:end] = bytes(step.nbytes)
            case "flush":
                commands.append("flush")
    qemu_io(path, *commands, options=("-d", "unmap"))


def judge(path: Path, model: Model) -> None:
    assert_clean(path)
    assert_same_disk(path, bytes(model.contents))


@pytest.mark.sample(5)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_writers_that_take_turns_agree(tmp_path: Path, shape: Shape) -> None:
    """We write, QEMU writes, we write: each continues where the other left, and reads what the other wrote."""
    model = Model(create(shape, tmp_path, by="qemu"))
    rng = random.Random(str(shape))
    for turn in range(4):
        steps = list(random_steps(rng, size=shape.size, cluster_size=shape.cluster_size, count=25))
        if turn % 2:
            qemu_work(tmp_path / "a", model, steps)
            with qcow2.open(str(tmp_path / "a")) as disk:
                assert_same_bytes(disk.read(0, disk.size), model.contents)
        else:
            work(tmp_path / "a", model, steps)
        judge(tmp_path / "a", model)


@pytest.mark.sample(4)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_images_we_create_hold_what_we_write(tmp_path: Path, shape: Shape) -> None:
    model = Model(create(shape, tmp_path, by="us"))
    judge(tmp_path / "a", model)
    rng = random.Random(f"{shape} ours")
    for _ in range(2):
        steps = list(random_steps(rng, size=shape.size, cluster_size=shape.cluster_size, count=30))
        work(tmp_path / "a", model, steps)
        judge(tmp_path / "a", model)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("cluster_bits", [9, 12, 16])
def test_images_that_hold_everything_stay_true(tmp_path: Path, cluster_bits: int, version: int) -> None:
    """Scattered data, zeros, compressed clusters, a snapshot that shares them: writes change only the active view."""
    rng = random.Random(cluster_bits)
    recipe = Recipe(size=200 << cluster_bits, cluster_bits=cluster_bits, version=version, layout="scattered")
    for index in range(200):
        match rng.randrange(5):
            case 0 | 1:
                recipe.data(index, rng.randbytes(recipe.cluster_size))
            case 2 if version == 3:
                recipe.zero(index)
            case 3 if version == 3:
                recipe.preallocated_zero(index, hidden=b"\xee" * recipe.cluster_size)
            case 4:
                content = bytes(rng.choices(b"0123456789abcdef", k=recipe.cluster_size // 4))
                recipe.compressed(index, content, skip=rng.randrange(5))
    recipe.snapshot("kept")
    kept = recipe.contents()
    recipe.data(7, rng.randbytes(recipe.cluster_size))
    path = build(recipe, tmp_path / "a").path
    model = Model(recipe.contents())
    for _ in range(3):
        work(path, model, list(random_steps(rng, size=recipe.size, cluster_size=recipe.cluster_size, count=60)))
        judge(path, model)
    assert_same_bytes(qemu_read(path, snapshot="kept"), kept)


@pytest.mark.parametrize("refcount_order", range(7))
def test_refcount_structures_grow_at_every_width(tmp_path: Path, refcount_order: int) -> None:
    """512-byte clusters: a refcount block covers little, so blocks and the table itself must grow many times."""
    size = 1 << 21
    path = build(Recipe(size=size, cluster_bits=9, refcount_order=refcount_order), tmp_path / "a").path
    content = random.Random(refcount_order).randbytes(size)
    with qcow2.open(str(path), writable=True) as disk:
        for start in range(0, size, 3 * 4096):
            disk.write(start, content[start : start + 3 * 4096])
    assert_clean(path)
    assert_same_disk(path, content)


@pytest.mark.parametrize("lazy", [True, False])
def test_a_disk_that_is_written_wiped_and_written_again_does_not_grow_without_end(tmp_path: Path, lazy: bool) -> None:
    size = 4 << 20
    path = build(Recipe(size=size, cluster_bits=12, compatible=LAZY_REFCOUNTS if lazy else 0), tmp_path / "a").path
    lengths = []
    for _ in range(6):
        with qcow2.open(str(path), writable=True) as disk:
            disk.write(0, b"\x55" * size)
            disk.discard(0, size)
            disk.flush()
            disk.write(0, b"\xaa" * size)
        lengths.append(path.stat().st_size)
    assert max(lengths) < 3 * size
    assert_clean(path)


def test_unknown_autoclear_bits_are_cleared_by_the_first_writable_open(tmp_path: Path) -> None:
    built = build(Recipe(size=1 << 20, autoclear=1 << 17 | 1), tmp_path / "a")
    with qcow2.open(str(built.path), writable=True):
        pass
    assert built.peek(88, 8) == (1).to_bytes(8, "big")


@pytest.mark.parametrize("change", ["write", "write_zeroes", "discard", "resize"])
def test_bitmaps_are_void_from_the_first_change_on(
    tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    built = build(Recipe(size=1 << 20, autoclear=1), tmp_path / "a")
    with qcow2.open(str(built.path), writable=True) as disk:
        disk.flush()
        assert built.peek(95, 1) == b"\1"
        assert not caplog.messages
        if change == "write":
            disk.write(0, b"x")
        elif change == "resize":
            disk.resize(2 << 20)
        else:
            getattr(disk, change)(0, 1 << 16)
        assert built.peek(95, 1) == b"\0"
        disk.write(0, b"x")
    assert caplog.messages == [f"{built.path}: persistent bitmaps are not maintained: they are void from now on"]


def test_unknown_compatible_bits_fields_and_extensions_survive_writing(tmp_path: Path) -> None:
    recipe = Recipe(
        size=1 << 20,
        compatible=1 << 40 | LAZY_REFCOUNTS,
        header_tail=b"\xab" * 24,
        extensions=[(0xCAFE, b"odd"), (BACKING_FORMAT, b"raw"), (0xBEEF, b"x" * 9)],
    )
    built = build(recipe, tmp_path / "a")
    before = built.peek(96, 200)
    with qcow2.open(str(built.path), writable=True) as disk:
        disk.write(0, b"x" * 100_000)
    assert built.peek(96, 200) == before
    assert built.peek(80, 8) == (1 << 40 | LAZY_REFCOUNTS).to_bytes(8, "big")


def test_a_file_cut_after_its_last_byte_grows_by_whole_clusters(tmp_path: Path) -> None:
    """A host file cut at its last used byte, not at a cluster: allocation starts past it."""
    recipe = Recipe(size=1 << 20, cluster_bits=16)
    recipe.data(0, b"first", at=10)
    built = build(recipe, tmp_path / "a")
    built.truncate(10 * 65536 + 512)
    with qcow2.open(str(built.path), writable=True) as disk:
        disk.write(65536 * 5, b"second")
    assert_clean(built.path)
    assert qemu_read(built.path)[65536 * 5 :].startswith(b"second")
