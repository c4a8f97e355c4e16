"""`qcow2.create` with each feature of the format: QEMU finds what was asked for, and what is written is read back."""

import json
import os
from array import array
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import qcow2
from qcow2.library.hostfile import created
from tests.oracle import qemu_img

MIB = 1 << 20
KEY = b"some secret\n"


def info(path: Path, *words: str) -> dict[str, Any]:
    """What QEMU says of it."""
    return dict(json.loads(qemu_img("info", "--output=json", *words, str(path)).stdout))


def use(path: Path, **options: Any) -> None:
    """Raises: AssertionError unless it takes a write."""
    with qcow2.open(path, writable=True, **options) as disk:
        disk.write(5000, b"here" * 1000)
    with qcow2.open(path, **options) as disk:
        assert disk.read(5000, 4000) == b"here" * 1000


def test_with_extended_entries(tmp_path: Path) -> None:
    qcow2.create(tmp_path / "disk", 10 * MIB, extended_l2=True, cluster_size=128 << 10)
    use(tmp_path / "disk")
    found = info(tmp_path / "disk")
    assert (found["format-specific"]["data"]["extended-l2"], found["cluster-size"]) == (True, 128 << 10)
    assert qemu_img("check", str(tmp_path / "disk")).returncode == 0


@pytest.mark.parametrize("more", [{}, {"extended_l2": True}, {"data_file": "data"}], ids=str)
def test_encrypted(tmp_path: Path, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where QEMU looks for a data file with such a name
    qcow2.create(tmp_path / "disk", 10 * MIB, key=KEY, iter_time=10, **more)
    use(tmp_path / "disk", key=KEY)
    assert info(tmp_path / "disk")["encrypted"]
    with pytest.raises(qcow2.ImageError):
        qcow2.open(tmp_path / "disk", key=KEY.strip())
    (tmp_path / "key").write_bytes(KEY)
    secret = ("--object", f"secret,id=s,file={tmp_path / 'key'}")
    options = f"driver=qcow2,file.filename={tmp_path / 'disk'},encrypt.key-secret=s"
    qemu_img("convert", *secret, "--image-opts", options, "-O", "raw", str(tmp_path / "plain"))
    assert (tmp_path / "plain").read_bytes()[5000:9000] == b"here" * 1000


@pytest.mark.parametrize("given", [bytes, bytearray, memoryview, lambda key: array("B", key)])
def test_a_key_is_any_buffer(tmp_path: Path, given: Callable[[bytes], Any]) -> None:
    path, key = tmp_path / "disk", given(KEY)
    qcow2.create(path, MIB, key=key, iter_time=10)
    for keys in (key, [b"wrong", key], (each for each in [key]), lambda path: key, lambda path: [key]):
        qcow2.open(path, key=keys).close()
    assert bytes(key) == KEY


def test_each_image_of_a_chain_is_tried_with_all_keys(tmp_path: Path) -> None:
    for name, backing in (("base", None), ("top", "base")):
        qcow2.create(tmp_path / name, MIB, backing=backing, key=name.encode(), iter_time=10)
    qcow2.open(tmp_path / "top", key=(key for key in (b"top", b"base"))).close()


@pytest.mark.parametrize("key", ["text", "", 5, [b"bytes", "text"], [1, 2], lambda path: "text"])
def test_what_is_no_key_is_said(tmp_path: Path, key: Any) -> None:
    path = tmp_path / "disk"
    if not callable(key):
        with pytest.raises(TypeError, match=r"a key is bytes, not (str|int|list)"):
            qcow2.create(path, MIB, key=key)
        assert not path.exists()
    qcow2.create(path, MIB, key=KEY, iter_time=10)
    with pytest.raises(TypeError, match=r"a key is bytes, not (str|int)"):
        qcow2.open(path, key=key)


@pytest.mark.parametrize("mode", ["off", "falloc", "full"])
def test_raw_luks(tmp_path: Path, mode: str) -> None:
    qcow2.create(tmp_path / "disk", 10 * MIB, format="luks", key=KEY, iter_time=10, preallocation=mode)
    assert ((tmp_path / "disk").stat().st_blocks * 512 >= 10 * MIB) is (mode != "off")
    use(tmp_path / "disk", format="luks", key=KEY)
    assert info(tmp_path / "disk", "-f", "luks")["virtual-size"] == 10 * MIB


def test_over_what_a_data_file_holds(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"kept" * MIB)
    with pytest.raises(ValueError, match="exists: say data_file_use=keep"):
        qcow2.create(tmp_path / "disk", 10 * MIB, data_file="data", data_file_raw=True)
    assert not (tmp_path / "disk").exists()
    qcow2.create(tmp_path / "disk", data_file="data", data_file_raw=True, data_file_use="keep")
    with qcow2.open(tmp_path / "disk") as disk:
        assert disk.read(0, disk.size) == b"kept" * MIB
    use(tmp_path / "disk")
    assert (tmp_path / "data").read_bytes()[5000:9000] == b"here" * 1000
    assert info(tmp_path / "disk")["format-specific"]["data"]["data-file-raw"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"format": "vmdk"}, "format 'vmdk' cannot be created, only qcow2, raw"),
        ({"format": "luks"}, "a luks image needs a key"),
        ({"format": "raw", "key": KEY}, "a raw one has none"),
        ({"key": b""}, "the passphrase is empty"),
        ({"format": "raw", "data_file": "data"}, "a raw image has no data file"),
        (
            {"format": "raw", "cluster_size": 4096, "lazy_refcounts": True},
            "raw image has no cluster_size, lazy_refcounts",
        ),
        ({"format": "raw", "compat": "0.10", "refcount_bits": 8}, "a raw image has no compat, refcount_bits"),
        ({"format": "raw", "data_file_use": "empty"}, "a raw image has no data_file_use"),
        ({"format": "luks", "key": KEY, "extended_l2": True}, "a luks image has no extended_l2"),
        ({"format": "luks", "key": KEY, "compression": "zstd"}, "a luks image has no compression"),
        ({"backing_format": "raw"}, "backing_format 'raw' without a backing file"),
        ({"data_file_use": "empty"}, "data_file_use 'empty' without a data file"),
        ({"preallocation": "some"}, "preallocation 'some' is not one of off, metadata"),
        ({"extended_l2": True, "cluster_size": 4096}, "extended_l2 on needs clusters of 16384 bytes"),
        ({"extended_l2": True, "compat": "0.10"}, "needs 1.1"),
        ({"data_file_raw": True}, "data-file-raw requires data-file"),
        ({"key": KEY, "iter_time": -1}, "iter_time -1 is not a number of milliseconds from 0 to 60000"),
    ],
)
def test_what_cannot_be_made_is_refused(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        qcow2.create(tmp_path / "disk", MIB, **options)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("name", ["lazy_refcounts", "extended_l2", "data_file_raw"])
def test_off_is_not_taken_for_true(tmp_path: Path, name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} 'off' is not True or False"):
        qcow2.create(tmp_path / "disk", MIB, **{name: "off"})  # type: ignore[arg-type]
    assert [*tmp_path.iterdir()] == []


def test_what_it_would_rest_on_is_left_alone(tmp_path: Path) -> None:
    for name, options in (("base", {"size": MIB}), ("mid", {"backing": "base"})):
        qcow2.create(tmp_path / name, **options)
        use(tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for name, options in (
        ("base", {"backing": "base"}),
        ("base", {"backing": "mid"}),
        ("new", {"backing": "mid", "data_file": "base", "data_file_use": "empty"}),
    ):
        with pytest.raises(ValueError, match=r"its own backing file|rests on it"):
            qcow2.create(tmp_path / name, **options)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def interfere(monkeypatch: pytest.MonkeyPatch, path: Path, between: Callable[[], object]) -> None:
    """Call *between()* when somebody has just made the file *path*."""
    really_open = os.open

    def opening(name: Any, flags: int, *rest: Any, **options: Any) -> int:
        fd = really_open(name, flags, *rest, **options)
        if flags & os.O_EXCL and os.fspath(name) == str(path):
            between()
        return fd

    monkeypatch.setattr(os, "open", opening)


def test_a_file_that_somebody_else_has_locked_first_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        interfere(monkeypatch, tmp_path / "disk", lambda: stack.enter_context(created(str(tmp_path / "disk"))))
        with pytest.raises(OSError, match="is another process using the image"):
            qcow2.create(tmp_path / "disk", MIB)
        assert (tmp_path / "disk").exists()


def test_a_file_that_somebody_else_has_filled_first_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").touch()
    interfere(monkeypatch, tmp_path / "disk", lambda: (tmp_path / "disk").write_bytes(b"somebody's"))
    with pytest.raises(ValueError, match="exists: say data_file_use=keep"):
        qcow2.create(tmp_path / "disk", MIB, data_file="data")
    assert (tmp_path / "disk").read_bytes() == b"somebody's"
