"""The library's wider face: making, copying and comparing images, modes and descriptors, an event loop, fsspec."""

import asyncio
import errno
import gc
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import fsspec
import pytest

import qcow2
from qcow2.library.filesystem import DiskFileSystem
from tests.oracle import assert_clean, qemu_img, qemu_io, qemu_read
from tests.program import TIMEOUT

MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    image = tmp_path / "disk"
    qemu_img("create", "-q", "-f", "qcow2", image, "3M")
    qemu_io(image, "write -P 7 1M 64k", "write -z 2M 64k")
    return image


@pytest.mark.parametrize(
    "options",
    [
        {"size": 5000},
        {"size": MIB, "cluster_size": 512, "compat": "0.10"},
        {"size": MIB, "lazy_refcounts": True, "refcount_bits": 64, "compression": "zstd"},
        {"size": 3 * MIB, "preallocation": "metadata"},
        {"size": 3 * MIB, "preallocation": "falloc"},
        {"size": MIB, "format": "raw", "preallocation": "full"},
    ],
)
def test_images_are_made(tmp_path: Path, options: dict[str, object]) -> None:
    qcow2.create(tmp_path / "a", **options)  # type: ignore[arg-type]
    image_format = str(options.get("format", "qcow2"))
    if image_format == "qcow2":
        assert_clean(tmp_path / "a")
    with qcow2.open(tmp_path / "a", format=image_format) as disk:
        assert disk.size == -(-int(str(options["size"])) // 512) * 512
        assert disk.read(0, disk.size) == bytes(disk.size)


@pytest.mark.parametrize(
    "options",
    [{}, {"size": -1}, {"size": 1, "cluster_size": 1000}, {"size": 1, "format": "vmdk"}, {"size": 1, "compat": "2"}],
)
def test_nonsense_is_not_made(tmp_path: Path, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"size|format|compat"):
        qcow2.create(tmp_path / "a", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "a").exists()


def test_rebase_refuses_a_format_that_is_none(path: Path) -> None:
    before = path.read_bytes()
    for backing in ("base", None):
        with pytest.raises(qcow2.UnsupportedImage, match="format 'qcow22' is not supported"):
            qcow2.rebase(path, backing, backing_format="qcow22")
    assert path.read_bytes() == before


def test_numbers_that_count_nothing_are_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="cache_size -1 is not a number of bytes"):
        qcow2.open(path, cache_size=-1)
    with pytest.raises(ValueError, match="rate -1 is not a number of bytes a second"):
        qcow2.convert(path, path.with_name("new"), rate=-1)
    assert not path.with_name("new").exists()


def test_modes_and_descriptors(path: Path) -> None:
    with pytest.raises(TypeError, match="True is neither"):
        qcow2.open(True)  # meant as something else, and a descriptor to isinstance
    with qcow2.open(path, "r+") as disk:
        disk.write(0, b"x")
    with path.open("rb") as file:
        for mode in ("r", "rb"):
            with qcow2.open(file.fileno(), mode) as disk:
                assert disk.read(0, 1) == b"x"
                with pytest.raises(OSError, match="read-only"):
                    disk.write(0, b"y")
        os.fstat(file.fileno())  # still its owner's
    with pytest.raises(ValueError, match="mode 'w'"):
        qcow2.open(path, "w")


def test_descriptor_of_an_overlay_finds_its_backing_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qcow2.create(path.with_name("top"), backing="disk")
    monkeypatch.chdir("/")
    with path.with_name("top").open("rb") as file, qcow2.open(file.fileno()) as disk:
        assert disk.read(MIB, 1) == b"\7"


def test_copies_are_told_how_far_they_are(path: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    qcow2.convert(path, tmp_path / "raw", format="raw", progress=lambda done, total: told.append((done, total)))
    assert told[0] == (0, 3 * MIB)
    assert told[-1] == (3 * MIB, 3 * MIB)
    assert (tmp_path / "raw").read_bytes() == qemu_read(path)
    qcow2.convert(tmp_path / "raw", tmp_path / "packed", source_format="raw", compress=True, compression="zstd")
    assert_clean(tmp_path / "packed")
    assert qcow2.compare(path, tmp_path / "packed") is None
    with qcow2.open(path, "r+") as disk:
        disk.write(2 * MIB + 5, b"x")
    assert qcow2.compare(path, tmp_path / "raw", other_format="raw") == 2 * MIB


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"format": "raw", "compress": True}, "a raw image has no compress"),
        ({"format": "raw", "compression": "zstd", "level": 3}, "a raw image has no compression, level"),
        ({"format": "raw", "cluster_size": 4096}, "a raw image has no cluster_size"),
        ({"level": 3}, "level 3 without compress"),
    ],
)
def test_copies_drop_no_option(path: Path, tmp_path: Path, options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        qcow2.convert(path, tmp_path / "new", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


def test_progress_that_raises_ends_the_job(path: Path, tmp_path: Path) -> None:
    def refuse(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qcow2.convert(path, tmp_path / "new", progress=refuse)
    assert not (tmp_path / "new").exists()
    with pytest.raises(qcow2.ImageError, match="source"):
        qcow2.convert(path, path)


def test_snapshots_are_a_value_that_may_be_called(path: Path) -> None:
    with qcow2.open(path, "r+") as disk:
        disk.create_snapshot("one")
        assert [each.name for each in disk.snapshots] == ["one"]
        assert disk.snapshots() == disk.snapshots
        assert disk.info["snapshots"][0]["name"] == "one"
        assert disk.info["virtual-size"] == len(disk) == 3 * MIB


def test_event_loop_goes_on(path: Path) -> None:
    async def work() -> list[bytes]:
        async with qcow2.open(path, "r+") as disk:
            await disk.awrite(0, b"first")
            await disk.awrite_zeroes(MIB, 512)
            await disk.adiscard(2 * MIB, MIB)
            await disk.aflush()
            target = bytearray(5)
            await disk.areadinto(0, target)
            return [bytes(target), *await asyncio.gather(*(disk.aread(MIB + ahead, 1) for ahead in (0, 512)))]

    assert asyncio.run(work()) == [b"first", b"\0", b"\7"]
    assert_clean(path)


def test_awaited_calls_take_turns_as_they_were_made(path: Path) -> None:
    async def work() -> None:
        async with qcow2.open(path, "r+") as disk:
            first, second = disk.awrite(0, b"first"), disk.awrite(0, b"second")
            await second
            await first
            assert await disk.aread(0, 6) == b"second"
            for draw in range(20):
                writes = [disk.awrite(0, b"%03d" % number) for number in range(draw, draw + 50)]
                _, seen, *_ = await asyncio.gather(writes[-1], disk.aread(0, 3), *writes[:-1])
                assert seen == b"%03d" % (draw + 49)

    asyncio.run(work())


def test_awaited_call_is_made_before_there_is_a_loop(path: Path) -> None:
    with qcow2.open(path, "r+") as disk:
        asyncio.run(disk.awrite(0, b"x"))
        assert asyncio.run(disk.aread(0, 1)) == b"x"
        with pytest.raises(ValueError, match="not inside"):
            asyncio.run(disk.aread(3 * MIB, 1))


def test_awaited_call_that_failed_keeps_no_disk(path: Path) -> None:
    async def work() -> "weakref.ref[qcow2.Disk]":
        async with qcow2.open(path) as disk:
            with pytest.raises(ValueError, match="not inside"):
                await disk.aread(3 * MIB, 1)
            return weakref.ref(disk)

    before = set(threading.enumerate())
    gc.disable()
    try:
        disk = asyncio.run(work())
        for thread in set(threading.enumerate()) - before:  # the disk's own lets go of it when it has ended
            thread.join(TIMEOUT)
        assert disk() is None
    finally:
        gc.enable()


def test_who_gives_up_a_close_has_closed(path: Path) -> None:
    async def work() -> None:
        disk = qcow2.open(path, "r+")
        write = disk.awrite(0, b"written all the same")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.gather(write, disk.aclose()), 0)
        await disk.aclose()
        with pytest.raises(ValueError, match="closed"):
            await disk.aread(0, 1)

    asyncio.run(work())
    with qcow2.open(path) as disk:
        assert disk.read(0, 20) == b"written all the same"


def test_fsspec_reads_and_writes(path: Path) -> None:
    fsspec.register_implementation("qcow2", DiskFileSystem, clobber=True)  # which an installation does: see the recipe
    with fsspec.open(f"qcow2://{path}", "r+b") as file:
        file.seek(512)
        file.write(b"hello")
    system = fsspec.filesystem("qcow2")
    assert system.info(str(path)) == {"name": str(path), "size": 3 * MIB, "type": "file"}
    assert str(path) in system.ls(str(path.parent), detail=False)
    with system.open(str(path)) as file:
        assert file.read(517)[512:] == b"hello"


def test_fsspec_writes_no_part_of_what_does_not_fit(path: Path) -> None:
    with fsspec.open(f"qcow2://{path}", "r+b") as file:
        file.seek(3 * MIB - 4)
        with pytest.raises(OSError, match=f"ends at {3 * MIB}"):
            file.write(b"too long")
    with qcow2.open(path) as disk:
        assert disk.read(3 * MIB - 4, 4) == bytes(4)


def test_fsspec_reads_from_the_end_and_blocks(path: Path) -> None:
    with qcow2.open(path, "r+") as disk:
        disk.write(0, b"first")
        disk.write(disk.size - 4, b"last")
    system, name = DiskFileSystem(skip_instance_cache=True), f"qcow2://{path}"
    assert system.cat_file(name, start=-512) == bytes(508) + b"last"
    assert system.cat_file(name, end=-1)[-4:] == b"\0las"
    assert system.cat_file(name, start=1, end=3) == b"ir"
    assert system.read_block(name, 0, 5) == b"first"
    assert system.cat_ranges([name] * 2, [0, 1], [2, 3]) == [b"fi", b"ir"]
    assert system.cat([name, str(path)]) == {str(path): system.cat_file(name)}
    with system.open(name) as file:
        assert file.size == 3 * MIB


def test_fsspec_closes_what_it_cannot_flush(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    file = DiskFileSystem(skip_instance_cache=True).open(str(path), "r+b")
    file.write(b"hello")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", failing)
        with pytest.raises(OSError, match="Input/output error"):
            file.close()
    assert file.closed
    qcow2.open(path, "r+").close()  # it is not locked


def test_fsspec_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "fsspec.py").write_text("raise ImportError('none here')\n")
    code = "import qcow2.library.filesystem"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert "qcow2:// needs fsspec: pip install 'vhost-user-qcow2[fsspec]'" in done.stderr


def test_what_there_is_can_be_looked_up() -> None:
    assert {"create", "open", "convert", "commit", "rebase", "compare", "Disk", "__version__"} <= set(dir(qcow2))
    for name in qcow2.__all__:
        assert getattr(qcow2, name) is not None
    assert "Read" not in dir(qcow2)
    assert qcow2.create.__doc__ is not None


def test_users_code_is_typed(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    code = """
import qcow2

def size(path: str) -> int:
    qcow2.create(path, 1 << 20)
    with qcow2.open(path, "r+") as disk:
        data: bytes = disk.read(0, 512)
        disk.write(512, data)
        return disk.size + len([each.name for each in disk.snapshots])

offset: int | None = qcow2.compare("a", "b")
qcow2.convert("a", "b", progress=lambda done, total: print(done, total))
"""
    (tmp_path / "user.py").write_text(code)
    root = Path(qcow2.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "user.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "Success: no issues found in 1 source file\n"), done.stdout
