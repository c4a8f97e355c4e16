"""Encrypted disks and disks in data files, served: few writes enter Python, and a flush makes both files stable."""

import json
import random
from pathlib import Path

import pytest

import qcow2
from ring.trace import Kind, Record, read_trace
from tests.blockguest import FLUSH, OUT
from tests.calm import assert_few_in_python, calm
from tests.frontend import FrontEnd
from tests.oracle import peers, qemu_img
from tests.program import Daemon, qcow2_tool_ok

SIZE, CLUSTER, BLOCK = 32 << 20, 1 << 16, 4096
KEY = b"key of the disk"
LUKS = "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10"
CACHES = pytest.mark.parametrize("cache", ["writeback", "writethrough"])


def counters(daemon: Daemon) -> dict[str, int]:
    """End the daemon cleanly -> what it has counted."""
    daemon.stop()
    assert daemon.process.stdout is not None
    told: dict[str, int] = json.loads(daemon.process.stdout.read())
    return told


def write_blocks(daemon: Daemon, model: bytearray) -> None:
    """A block in each of 400 clusters, then one beside it in half of them."""
    order = random.Random(3).sample(range(SIZE // CLUSTER), 400)
    with FrontEnd(daemon.socket_path) as guest:
        for number, cluster in enumerate(order + order[:200]):
            offset = cluster * CLUSTER + BLOCK * (1 + number // 400)
            model[offset : offset + BLOCK] = data = number.to_bytes(4, "big") * (BLOCK // 4)
            guest.write(offset, data)
            if number % 100 == 50:
                guest.flush()
        assert guest.read(order[0] * CLUSTER, 4 * BLOCK) == model[order[0] * CLUSTER :][: 4 * BLOCK]


@CACHES
@pytest.mark.parametrize("over", ["nothing", "a base"])
@calm
def test_few_writes_to_an_encrypted_disk_enter_python(tmp_path: Path, cache: str, over: str) -> None:
    path, key, model = tmp_path / "disk.qcow2", tmp_path / "key", bytearray(SIZE)
    key.write_bytes(KEY)
    secret, below = ["--object", f"secret,id=s0,file={key}"], []
    if over == "a base":
        base = tmp_path / "base.qcow2"
        qcow2_tool_ok("create", "-q", *secret, "-o", LUKS, base, str(SIZE))
        with qcow2.open(base, key=KEY, writable=True) as disk:
            model[:] = random.Random(5).randbytes(1 << 20) * (SIZE >> 20)
            disk.write(0, bytes(model))
        below = ["-b", str(base), "-F", "qcow2"]
    qcow2_tool_ok("create", "-q", *secret, "-o", LUKS, *below, path, str(SIZE))
    with Daemon(path, f"--key-file={key}", "--stats", f"--cache={cache}") as daemon:
        write_blocks(daemon, model)
        told = counters(daemon)
    flushes = 600 if over == "a base" and cache == "writethrough" else 0  # links wait: Python commits them
    assert_few_in_python(told, 150 + flushes)
    with qcow2.open(path, key=KEY) as disk:
        assert disk.read(0, SIZE) == model
    raw = tmp_path / "model"
    raw.write_bytes(model)
    image = f"driver=qcow2,file.filename={path},encrypt.key-secret=s0"
    image += ",backing.encrypt.key-secret=s0" if below else ""
    for peer in peers():
        qemu_img("check", "-q", *secret, "--image-opts", image, program=peer)
        qemu_img("compare", "-q", *secret, "--image-opts", image, f"driver=raw,file.filename={raw}", program=peer)


@CACHES
@pytest.mark.parametrize("options", ["", ",data_file_raw=on"], ids=["entries tell", "raw"])
@calm
def test_few_writes_to_a_disk_in_a_data_file_enter_python(tmp_path: Path, cache: str, options: str) -> None:
    path, data, model = tmp_path / "disk.qcow2", tmp_path / "disk.raw", bytearray(SIZE)
    qcow2_tool_ok("create", "-q", "-o", f"data_file={data}{options}", path, str(SIZE))
    with Daemon(path, "--stats", f"--cache={cache}") as daemon:
        write_blocks(daemon, model)
        told = counters(daemon)
    assert_few_in_python(told, 20)
    with qcow2.open(path) as disk:
        assert disk.read(0, SIZE) == model
    if options:
        assert data.read_bytes() == model
    for peer in peers():
        qemu_img("check", "-q", path, program=peer)
        qemu_img("convert", "-O", "raw", path, tmp_path / "copy", program=peer)
        assert (tmp_path / "copy").read_bytes() == model


def test_a_flush_syncs_the_image_only_if_it_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2_tool_ok("create", "-q", "-o", f"data_file={tmp_path / 'disk.raw'}", path, str(SIZE))
    with Daemon(path, "--stats") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            guest.write(0, b"a" * BLOCK)  # a table, in Python
            guest.write(CLUSTER, b"b" * BLOCK)
            guest.flush()  # both
            for _ in range(10):
                guest.write(CLUSTER, b"c" * BLOCK)
                guest.flush()  # the data
            guest.write(2 * CLUSTER, b"d" * BLOCK)
            guest.flush()  # both
        told = counters(daemon)
    assert told["python_requests"] <= 2
    assert 14 <= told["syncs"] <= 18, "two for a reservation and a dirty bit, and two at the end"


def unstable_at_answers(records: list[Record], types: tuple[int, ...]) -> list[int]:
    """How many of the writes, to either file, that had ended were not stable when such a request was answered."""
    ended, syncs, answers = dict[int, int](), dict[int, tuple[int, set[int]]](), list[int]()
    slot_of = dict[int, int]()
    for record in records:
        match record.kind:
            case Kind.WRITE:
                slot_of[record.id] = record.slot
            case Kind.SYNC:
                covered = {number for number, slot in ended.items() if slot == record.slot}
                syncs[record.id] = record.slot, covered
            case Kind.DONE if record.id in slot_of:
                ended[record.id] = slot_of[record.id]
            case Kind.DONE if record.id in syncs:
                for number in syncs[record.id][1]:
                    ended.pop(number, None)
            case Kind.ANSWER if record.type in types:
                answers.append(len(ended))
            case _:
                pass
    return answers


@CACHES
@pytest.mark.parametrize("options", ["", ",data_file_raw=on"], ids=["entries tell", "raw"])
def test_what_is_flushed_is_stable_in_both_files(tmp_path: Path, cache: str, options: str) -> None:
    path, draw = tmp_path / "disk.qcow2", random.Random(1)
    qcow2_tool_ok("create", "-q", "-o", f"data_file={tmp_path / 'disk.raw'}{options}", path, str(SIZE))
    trace = tmp_path / "trace"
    with Daemon(path, f"--trace-io={trace}", f"--cache={cache}") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            for _ in range(150):
                offset = draw.randrange(64) * CLUSTER
                match draw.randrange(6):
                    case 0:
                        guest.write_zeroes(offset, CLUSTER, unmap=draw.random() < 0.5)
                    case 1 | 2:
                        guest.flush()
                    case _:
                        guest.write(offset, draw.randbytes(BLOCK))
        daemon.stop()
    kinds = (FLUSH,) if cache == "writeback" else (FLUSH, OUT)
    answers = unstable_at_answers(list(read_trace(trace)), kinds)
    assert len(answers) > 30
    assert set(answers) == {0}
