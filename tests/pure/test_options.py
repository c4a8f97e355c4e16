"""The daemon's command line: what it accepts, and the one line it answers to what it does not."""

import pytest

from vhost.argument import UsageError
from vhost.command import CAPABILITIES, main
from vhost.option import CacheMode, Options, parse

REQUIRED = ["--socket-path=/tmp/s", "--blk-file=a.qcow2"]


def test_defaults_are_qcow2_writeback_and_many_queues() -> None:
    options = parse(REQUIRED)
    assert options == Options(blk_file="a.qcow2", socket_path="/tmp/s")
    assert (options.format, options.cache, options.lazy_refcounts) == ("qcow2", CacheMode.WRITEBACK, None)
    assert options.num_queues >= 64
    assert options.cache_size == 32 << 20


def test_every_option_is_understood() -> None:
    options = parse(
        [
            "--fd=7",
            "--blk-file=a.img",
            "--format=qcow2",
            "--read-only",
            "--cache=directsync",
            "--num-queues=256",
            "--serial=twenty bytes exactly",
            "--lazy-refcounts=off",
            "--cache-size=1M",
            "--link-log=/run/logs",
            "--stats",
            "--trace-io=a.trace",
        ]
    )
    assert options == Options(
        blk_file="a.img",
        fd=7,
        read_only=True,
        cache=CacheMode.DIRECTSYNC,
        num_queues=256,
        serial="twenty bytes exactly",
        lazy_refcounts=False,
        cache_size=1 << 20,
        link_log="/run/logs",
        stats=True,
        trace_io="a.trace",
    )


def test_each_field_of_the_record_is_an_option_with_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    said = capsys.readouterr().out
    assert [
        name for name in Options.__dataclass_fields__ if f"--{name.removesuffix('s').replace('_', '-')}" not in said
    ] == []


def test_raw_is_a_format() -> None:
    assert parse([*REQUIRED, "--format=raw"]).format == "raw"


@pytest.mark.parametrize(
    ("mode", "writeback", "direct", "sync"),
    [
        ("writeback", True, False, True),
        ("writethrough", False, False, True),
        ("none", True, True, True),
        ("directsync", False, True, True),
        ("unsafe", True, False, False),
    ],
)
def test_cache_modes_mean_what_they_mean_in_qemu(mode: str, writeback: bool, direct: bool, sync: bool) -> None:
    cache = parse([*REQUIRED, f"--cache={mode}"]).cache
    assert (cache.writeback, cache.direct, cache.sync) == (writeback, direct, sync)


@pytest.mark.parametrize(
    ("text", "nbytes"), [("1048576", 1 << 20), ("64m", 64 << 20), ("2G", 2 << 30), ("1T", 1 << 40), ("1.5M", 3 << 19)]
)
def test_cache_size_takes_suffixes(text: str, nbytes: int) -> None:
    assert parse([*REQUIRED, f"--cache-size={text}"]).cache_size == nbytes


BAD = [
    ([], "--blk-file"),
    (["--blk-file=a"], "--socket-path=PATH and --fd=N"),
    ([*REQUIRED, "--fd=3"], "--socket-path=PATH and --fd=N"),
    (["--socket-path=s", "--blk-file="], "path is empty"),
    (["--blk-file=a", "--socket-path=s", "--control=./s"], "--socket-path=s and --control=./s: one socket"),
    ([*REQUIRED, "--format=vmdk"], "'vmdk'"),
    ([*REQUIRED, "--format=auto"], "'auto'"),
    ([*REQUIRED, "--cache=fast"], "'fast'"),
    ([*REQUIRED, "--num-queues=0"], "0 is not between 1 and 256"),
    ([*REQUIRED, "--num-queues=257"], "257 is not between 1 and 256"),
    ([*REQUIRED, "--num-queues=-1"], "'-1' is not a number of queues"),
    ([*REQUIRED, "--num-queues=many"], "'many' is not a number of queues"),
    ([*REQUIRED, "--num-queues=²"], "'²' is not a number of queues"),
    (["--blk-file=a", "--fd=-1"], "'-1' is not a file descriptor"),
    (["--blk-file=a", "--fd=99999999999"], "99999999999 is not a file descriptor"),
    ([*REQUIRED, "--serial=twenty-one bytes long"], "21 bytes, the limit is 20"),
    ([*REQUIRED, "--serial=ééééééééééé"], "22 bytes, the limit is 20"),
    ([*REQUIRED, "--lazy-refcounts=maybe"], "'maybe'"),
    ([*REQUIRED, "--lazy-refcounts=on", "--format=raw"], "raw"),
    ([*REQUIRED, "--cache-size=0"], "0 bytes are not between 1048576 and"),
    ([*REQUIRED, "--cache-size=1k"], "1024 bytes are not between 1048576 and"),
    ([*REQUIRED, "--cache-size=M"], "'M' is not a size"),
    ([*REQUIRED, "--cache-size="], "'' is not a size"),
    ([*REQUIRED, "--cache-size=9999T"], "are not between"),
    ([*REQUIRED, "--blk"], "--blk"),
    ([*REQUIRED, "disk.qcow2"], "disk.qcow2"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[" ".join(arguments) or "nothing" for arguments, _ in BAD])
def test_bad_option_is_named_with_its_value(arguments: list[str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(arguments)
    assert words in str(caught.value)


def test_complaint_is_one_line_with_the_name_of_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    status = main([*REQUIRED, "--num-queues=0"])
    said = capsys.readouterr()
    assert status == 1
    assert said.out == ""
    assert said.err == "vhost-user-qcow2: argument --num-queues: 0 is not between 1 and 256\n"


def test_capabilities_win_over_every_other_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--nonsense", "--print-capabilities"]) == 0
    assert capsys.readouterr().out == CAPABILITIES + "\n"
