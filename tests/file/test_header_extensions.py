"""What we do not understand of a header survives what we change in it: the same bytes in the same order."""

import json
from pathlib import Path

import pytest

import qcow2
from tests.builder import Recipe, build
from tests.builder.record import BACKING_FORMAT, FEATURE_NAMES, LAZY_REFCOUNTS, feature_name_table
from tests.oracle import Header, assert_clean, qemu_img, read_header
from tests.program import qcow2_tool, qcow2_tool_ok

UNKNOWN = [(0xCAFE_BABE, b"first, 15 bytes"), (0x1234_5678, b""), (0xCAFE_BABE, bytes(range(256)))]


def image(path: Path, version: int, *, backing: str | None = None) -> Header:
    """Unknown extensions around the known ones, one of them twice."""
    recipe = Recipe(size=1 << 20, version=version, backing=backing, compatible=1 << 50 if version == 3 else 0)
    recipe.extensions = [UNKNOWN[0]]
    if backing:
        recipe.extensions.append((BACKING_FORMAT, b"qcow2"))
    recipe.extensions += [UNKNOWN[1], (FEATURE_NAMES, feature_name_table([(1, 50, "sparkle")])), UNKNOWN[2]]
    recipe.header_tail = b"\xde\xad\xbe\xef" * 4 if version == 3 else b""
    recipe.data(0, b"data")
    build(recipe, path)
    return read_header(path)


def unknown(header: Header) -> list[tuple[int, bytes]]:
    return [extension for extension in header.extensions if extension[0] != BACKING_FORMAT]


@pytest.fixture
def bases(tmp_path: Path) -> Path:
    for name in ("base", "other"):
        build(Recipe(size=1 << 20), tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("after", ["other", ""])
@pytest.mark.parametrize("before", ["base", None])
@pytest.mark.parametrize("version", [2, 3])
def test_rebase_keeps_unknown_extensions(bases: Path, version: int, before: str | None, after: str) -> None:
    path = bases / "a"
    old = image(path, version, backing=before)
    qcow2_tool_ok("rebase", "-u", "-b", after, *(["-F", "qcow2"] if after else []), path)
    new = read_header(path)
    assert unknown(new) == unknown(old)
    assert new.backing == after
    assert [data for kind, data in new.extensions if kind == BACKING_FORMAT] == ([b"qcow2"] if after else [])


@pytest.mark.parametrize("version", [2, 3])
def test_rebase_keeps_the_place_of_the_format(bases: Path, version: int) -> None:
    old = image(bases / "a", version, backing="base")
    qcow2_tool_ok("rebase", "-u", "-b", "other", "-F", "raw", bases / "a")
    new = read_header(bases / "a")
    assert [kind for kind, _ in new.extensions] == [kind for kind, _ in old.extensions]


def test_rebase_keeps_unknown_fields_and_features(bases: Path) -> None:
    path = bases / "a"
    old = image(path, 3, backing="base")
    qcow2_tool_ok("rebase", "-u", "-b", "other", "-F", "qcow2", path)
    new = read_header(path)
    changed = {name for name in old.fields if old.fields[name] != new.fields[name]}
    assert changed <= {"backing_file_size", "backing_file_offset"}
    with path.open("rb") as file:
        assert file.read(128)[112:] == b"\xde\xad\xbe\xef" * 4


def test_an_older_version_is_refused_to_unknown_fields(bases: Path) -> None:
    path = bases / "a"
    image(path, 3)
    before = path.read_bytes()
    done = qcow2_tool("amend", "-o", "compat=0.10,size=2M", path)
    assert (done.returncode, "header fields that are not known" in done.stderr) == (1, True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("version", [2, 3])
def test_qemu_finds_the_image_sound_after_a_rebase(bases: Path, version: int) -> None:
    image(bases / "a", version, backing="base")
    qcow2_tool_ok("rebase", "-u", "-b", "other", "-F", "qcow2", bases / "a")
    assert_clean(bases / "a")
    told = json.loads(qemu_img("info", "--output=json", bases / "a").stdout)
    assert (told["backing-filename"], told["backing-filename-format"]) == ("other", "qcow2")


def test_a_shorter_name_leaves_no_trace_of_the_longer(bases: Path) -> None:
    path = bases / "a"
    image(path, 3, backing="base-with-a-very-long-name")
    qcow2_tool_ok("rebase", "-u", "-b", "", path)
    assert b"very-long" not in path.read_bytes()[:65536]


def test_a_name_too_long_for_the_cluster_is_refused(bases: Path) -> None:
    path = bases / "a"
    build(Recipe(size=1 << 20, cluster_bits=9, extensions=[(0xCAFE, bytes(300))]), path)
    before = path.read_bytes()
    done = qcow2_tool("rebase", "-u", "-b", "x" * 200, "-F", "raw", path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert path.read_bytes() == before


def test_a_name_of_1024_bytes_is_refused(bases: Path) -> None:
    image(bases / "a", 3)
    done = qcow2_tool("rebase", "-u", "-b", "x" * 1024, "-F", "raw", bases / "a")
    assert done.returncode == 1
    assert "1023" in done.stderr


@pytest.mark.parametrize("version", [2, 3])
def test_dump_header_shows_every_extension(bases: Path, version: int) -> None:
    image(bases / "a", version, backing="base")
    said = qcow2_tool_ok("dump-header", bases / "a").lower()
    for kind in (0xCAFE_BABE, 0x1234_5678, BACKING_FORMAT, FEATURE_NAMES):
        assert f"{kind:#010x}" in said
    assert said.count("0xcafebabe") == 2
    assert "l1_table_offset" in said


def test_dump_header_shows_an_image_we_must_refuse(bases: Path) -> None:
    build(Recipe(size=1 << 20, incompatible=1 << 60, extensions=[(0xCAFE, b"odd")]), bases / "a")
    assert "0x0000cafe" in qcow2_tool_ok("dump-header", bases / "a").lower()


@pytest.mark.parametrize("version", [2, 3])
def test_repair_and_writing_keep_unknown_extensions(bases: Path, version: int) -> None:
    path = bases / "a"
    recipe = Recipe(size=1 << 20, version=version, extensions=list(UNKNOWN))
    recipe.compatible = LAZY_REFCOUNTS | 1 << 50 if version == 3 else 0
    recipe.data(0, b"data")
    built = build(recipe, path)
    built.set_refcount(recipe.view[0].host_offset, 0)
    old = read_header(path)
    qcow2_tool_ok("check", "-r", "all", path)
    with qcow2.open(str(path), writable=True) as disk:
        disk.write(500_000, b"more")
    new = read_header(path)
    assert new.extensions == old.extensions
    assert new.fields.get("compatible_features") == old.fields.get("compatible_features")
    assert_clean(path)


def test_created_images_carry_the_feature_names(tmp_path: Path) -> None:
    qcow2_tool_ok("create", "-q", "-f", "qcow2", "-o", "compat=1.1,lazy_refcounts=on", tmp_path / "a", "1G")
    table = dict(read_header(tmp_path / "a").extensions)[FEATURE_NAMES]
    assert b"dirty bit" in table
    assert b"lazy refcounts" in table


def test_of_two_formats_the_last_one_counts_as_with_qemu(bases: Path) -> None:
    path = bases / "a"
    recipe = Recipe(size=1 << 20, backing="base")
    recipe.extensions = [(BACKING_FORMAT, b"raw"), (BACKING_FORMAT, b"qcow2")]
    build(recipe, path)
    theirs = json.loads(qemu_img("info", "--output=json", path).stdout)
    with qcow2.open(path) as disk:
        assert disk.info["backing-filename-format"] == theirs["backing-filename-format"] == "qcow2"
        assert disk.chain.nodes[1].size == 1 << 20
    qcow2_tool_ok("rebase", "-u", "-b", "other", "-F", "raw", path)
    assert [data for kind, data in read_header(path).extensions if kind == BACKING_FORMAT] == [b"raw"]
