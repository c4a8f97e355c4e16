"""The `qcow2` tool prints what qemu-img prints, and asks for -U where qemu-img does."""

import json
import os
from pathlib import Path

import pytest

from qcow2.tool.quantity import format_size, parse_size
from tests.builder import Recipe, build
from tests.oracle import held_by_qemu, qemu_img, qemu_io, sha256
from tests.program import qcow2_tool, qcow2_tool_ok


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """Three images over one another: data, zeros, compressed clusters, a snapshot, a base that ends early."""
    raw, base, top = tmp_path / "raw", tmp_path / "base", tmp_path / "top"
    raw.write_bytes(bytes(1 << 16) + b"x" * (1 << 16))
    os.truncate(raw, 1 << 20)
    qemu_img("create", "-q", "-f", "qcow2", "-b", "raw", "-F", "raw", base, "2M")
    qemu_io(base, "write 512k 64k", "write -z 640k 64k", "write -c 768k 64k")
    qemu_img("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", "-b", "base", "-F", "qcow2", top, "3M")
    qemu_io(top, "write 1M 256k", "write 2M 64k", "write -z 2M 64k", "discard 1M 64k")
    qemu_img("snapshot", "-c", "one", top)
    return top


@pytest.mark.parametrize(
    "arguments",
    [["info"], ["info", "--backing-chain"], ["info", "-U"], ["check"]],
    ids=" ".join,
)
def test_json_equals_qemus(chain: Path, arguments: list[str]) -> None:
    ours = json.loads(qcow2_tool_ok(*arguments, "--output=json", chain))
    assert ours == json.loads(qemu_img(*arguments, "--output=json", chain).stdout)


@pytest.mark.parametrize("arguments", [["info"], ["info", "--backing-chain"], ["check"]], ids=" ".join)
def test_text_equals_qemus(chain: Path, arguments: list[str]) -> None:
    assert qcow2_tool_ok(*arguments, chain) == qemu_img(*arguments, chain).stdout


def test_the_map_as_text_equals_qemus(tmp_path: Path) -> None:
    made = Recipe(size=1 << 20)
    for index in (0, 1, 5, 9):
        made.data(index, b"data" * (1 << 14))
    path = build(made, tmp_path / "a").path
    assert qcow2_tool_ok("map", path) == qemu_img("map", path).stdout


def test_info_of_a_raw_image_equals_qemus(chain: Path) -> None:
    raw = chain.with_name("raw")
    ours = json.loads(qcow2_tool_ok("info", "-f", "raw", "--output=json", raw))
    assert ours == json.loads(qemu_img("info", "-f", "raw", "--output=json", raw).stdout)


@pytest.mark.parametrize("command", ["info", "check", "map", "dump-header"])
def test_an_image_in_use_needs_force_share(chain: Path, command: str) -> None:
    with held_by_qemu(chain):
        refused = qcow2_tool(command, "--output=json", chain)
        assert refused.returncode == 1
        assert "lock" in refused.stderr
        qcow2_tool_ok(command, "-U", "--output=json", chain)


def test_repair_and_sharing_exclude_each_other(chain: Path) -> None:
    before = sha256(chain)
    done = qcow2_tool("check", "-r", "all", "-U", chain)
    assert done.returncode == 1
    assert "--force-share" in done.stderr
    assert sha256(chain) == before


def test_a_raw_image_has_no_check(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(512))
    assert qcow2_tool("check", "-f", "raw", tmp_path / "a").returncode == 63


def test_dump_header_as_json_holds_every_byte_of_an_extension(tmp_path: Path) -> None:
    build(Recipe(size=1 << 20, extensions=[(0xCAFE, bytes(range(100)))], header_tail=b"\x01" * 8), tmp_path / "a")
    told = json.loads(qcow2_tool_ok("dump-header", "--output=json", tmp_path / "a"))
    assert told["extensions"][0] == {
        "magic": 0xCAFE,
        "name": None,
        "length": 100,
        "data": bytes(range(100)).hex(),
    }
    assert told["unknown-fields"].endswith("01" * 8)
    assert told["fields"]["cluster_bits"] == 16


@pytest.mark.parametrize(
    ("arguments", "word"), [([], "COMMAND"), (["frobnicate"], "frobnicate"), (["info"], "filename")]
)
def test_a_senseless_command_line_gets_one_line(arguments: list[str], word: str) -> None:
    done = qcow2_tool(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("qcow2: ")
    assert word in line


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "0.977 KiB"), (1 << 20, "1 MiB"), (10 << 30, "10 GiB"), (1 << 62, "4 EiB")],
)
def test_sizes_are_written_as_qemu_writes_them(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text


@pytest.mark.parametrize("text", ["", "k", "1.5", "1e3", "0x", "0xg", "-1", " 1", "1 k", "1kk", "8E"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)
