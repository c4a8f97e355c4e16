"""The benchmark runs, counts right, and sees wrong data. No figure is judged here."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from bench.frontend import FrontEnd
from bench.latency import Histogram
from bench.load import Job, Kind, Load, LoadFailure, Order, memory_nbytes
from bench.ratio import Ratio
from bench.server import Server, connect, listen
from tests.patience import TIMEOUT

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
DAEMON = Path(sysconfig.get_path("scripts"), "vhost-user-qcow2")


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False)


def processes_on(directory: Path) -> list[str]:
    """The command lines that name *directory*."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended meanwhile
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in found if str(directory) in line]


@contextmanager
def loaded(image: Path, job: Job) -> Iterator[Load]:
    """Put *job* on a daemon of ours that serves the raw *image*."""
    listening, address = listen()
    command = [str(DAEMON), f"--fd={listening.fileno()}", f"--blk-file={image}", "--format=raw"]
    with Server(command, listening) as server:
        with FrontEnd(connect(address), queues=job.queues, nbytes=memory_nbytes(job)) as front_end:
            with Load(job, front_end) as load:
                yield load
                load.drain()
        server.stop()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    return path


@pytest.mark.sample(3, of="runs of bench")
def test_a_case_is_stored_as_json(tmp_path: Path) -> None:
    where = ("--directory", tmp_path / "images", "--tmpfs", tmp_path, "--output", tmp_path / "out")
    run = bench("writeback-fresh-32", "--pairs=1", "--seconds=0.2", "--no-ceiling", *where)
    assert run.returncode == 0, run.stderr
    (case,) = json.loads((tmp_path / "out/results.json").read_text())["cases"]
    assert case["ours"][0]["requests"] > 0
    assert case["qemu"][0]["requests"] > 0
    assert case["qemu_traced"]["metadata_per_1000"] > 0
    assert case["ratio"]["low"] == case["ratio"]["median"]
    assert "writeback-fresh-32" in (tmp_path / "out/table.md").read_text()


@pytest.mark.sample(3, of="runs of bench")
def test_parts_of_a_run_are_joined_and_quoted(tmp_path: Path) -> None:
    cases = ["writeback-fresh-32", "overlay-tmpfs-1"]
    for case in cases:
        where = ("--directory", tmp_path / "images", "--tmpfs", tmp_path, "--output", tmp_path / case)
        run = bench(case, "--pairs=1", "--seconds=0.2", "--no-ceiling", *where)
        assert run.returncode == 0, run.stderr
    parts, whole = [str(tmp_path / case) for case in cases], tmp_path / "whole"
    command = [sys.executable, "-m", "bench.stored", *parts, f"--output={whole}", "--quote", *reversed(cases)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert run.returncode == 0, run.stderr
    stored = json.loads((whole / "results.json").read_text())
    assert [case["name"] for case in stored["cases"]] == cases
    for case in stored["cases"]:
        (part,) = json.loads((tmp_path / case["name"] / "results.json").read_text())["cases"]
        assert case == part
        assert f"| {case['name']}: " in (whole / "table.md").read_text()
        assert f"| {case['title']} | " in run.stdout


@pytest.mark.sample(3, of="runs of bench")
def test_nothing_is_left_behind(tmp_path: Path) -> None:
    images = tmp_path / "images"
    where = ("--directory", images, "--tmpfs", tmp_path, "--output", tmp_path / "out")
    assert bench("writeback-fresh-32", "--pairs=1", "--seconds=0.2", "--no-ceiling", *where).returncode == 0
    assert list(images.iterdir()) == []


@pytest.mark.sample(3, of="runs of bench")
def test_a_crowd_comes_on_as_many_queues_as_it_needs(tmp_path: Path) -> None:
    options = ("--passes=1", "--seconds=0.2", "--ring=1", "--largest=2")
    where = ("--directory", tmp_path / "images", "--plot", tmp_path / "plot.svg")
    command = [sys.executable, "-m", "bench.crowd", "fresh", *options, *map(str, where)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert run.returncode == 0, run.stderr
    assert [line.split()[1] for line in run.stdout.splitlines() if line.startswith(("| 1 ", "| 2 "))] == ["1", "2"]
    assert list((tmp_path / "images").iterdir()) == []


def test_a_client_that_is_not_ours_loads_both_servers(tmp_path: Path) -> None:
    client = Path(os.environ.get("QEMU_BIN", ""), "qemu-img")
    if not client.is_absolute() or "virtio-blk-vhost-user" not in subprocess.getoutput(f"{client} --help"):
        pytest.skip("no qemu-img with libblkio is here: QEMU_BIN names the directory of one")
    options = ("--pairs=1", "--seconds=0.2", f"--directory={tmp_path}", f"--client={client}")
    command = [sys.executable, "-m", "bench.second", "writethrough-fresh-32", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert run.returncode == 0, run.stderr
    (cells,) = [line.split("|") for line in run.stdout.splitlines() if line.startswith("| writethrough")]
    assert all(float(cell.split()[0].replace(",", "")) > 0 for cell in cells[2:5])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.sample(3, of="runs of bench")
def test_neighbours_work_beside_each_server(tmp_path: Path) -> None:
    options = ("--passes=1", "--seconds=0.1", "--neighbours=1", "--directory", str(tmp_path))
    command = [sys.executable, "-m", "bench.shared", "writeback-fresh-32", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert run.returncode == 0, run.stderr
    rows = [line.split("|") for line in run.stdout.splitlines() if line.startswith("| writeback")]
    assert [row[2].strip() for row in rows] == ["ours", "ours, polling off", "QEMU"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.sample(3, of="runs of bench")
@pytest.mark.parametrize("seconds", ["0.1", "0"], ids=["a guest writes", "nobody writes"])
def test_backups_of_both_servers_are_timed(tmp_path: Path, seconds: str) -> None:
    options = ("--gib=0.03125", "--passes=1", f"--seconds={seconds}", f"--directory={tmp_path}")
    command = [sys.executable, "-m", "bench.backup", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert run.returncode == 0, run.stderr
    assert [line.split()[0] for line in run.stdout.splitlines() if "MiB/s" in line] == ["ours", "QEMU's"]
    assert ("writes/s during it" in run.stdout) == (seconds != "0")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.sample(3, of="runs of bench")
def test_what_bitmaps_cost(tmp_path: Path) -> None:
    options = ("--mib=32", "--passes=2", "--seconds=0.05", f"--directory={tmp_path}")
    command = [sys.executable, "-m", "bench.bitmaps", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert run.returncode == 0, run.stderr
    assert 0 < float(run.stdout.split("enabled over disabled: ")[1].split()[0]) < 100
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, number: signal.Signals, status: int) -> None:
    images = tmp_path / "images"
    images.mkdir()
    where = ("--directory", images, "--tmpfs", images, "--output", tmp_path / "out")
    command = [sys.executable, "-m", "bench", "writeback-fresh-32", "--seconds=300", "--no-ceiling", *map(str, where)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert any("1/1" in line for line in run.stdout)  # from now on there are images, soon servers
        run.send_signal(number)
        run.communicate(timeout=TIMEOUT)
    assert run.returncode == status
    assert list(images.iterdir()) == []
    assert processes_on(images) == []


@pytest.mark.sample(3, of="runs of bench")
def test_parts_in_turn_are_the_whole(tmp_path: Path) -> None:
    def listed(*words: str) -> str:
        return bench("goals", "scale", "--list", "--output", tmp_path, *words).stdout

    assert listed() == "".join(listed(f"--part={number}/3") for number in (1, 2, 3))
    assert "size-15T" in listed()


def test_unknown_case_is_one_line(tmp_path: Path) -> None:
    run = bench("no-such-case", "--output", tmp_path)
    assert (run.returncode, run.stderr) == (1, "bench: no case is called 'no-such-case'; --list names them all\n")


def test_verified_load_reads_what_it_wrote(image: Path) -> None:
    job = Job(MIB, read_percent=50, depth=8, queues=2, flush_every=16, verify=True)
    with loaded(image, job) as load:
        load.run(0.1)
        while not (outcome := load.outcome()).flushes or outcome.writes in (0, outcome.requests):
            load.run(0.1)
    assert 0 < outcome.writes < outcome.requests
    assert outcome.flushes > 0
    assert outcome.latencies.total == outcome.requests


def look_until_wrong(load: Load) -> None:
    while load.run(0.1):
        load.outcome()


def test_bytes_changed_behind_the_server_are_seen(image: Path) -> None:
    with loaded(image, Job(MIB, read_percent=50, depth=8, verify=True)) as load:
        while load.outcome().writes < 100:
            load.run(0.1)
        image.write_bytes(bytes(MIB))
        with pytest.raises(LoadFailure, match="reads returned wrong data"):
            look_until_wrong(load)


@pytest.mark.parametrize("kind", list(Kind))
def test_every_stride_is_visited_once(image: Path, kind: Kind) -> None:
    with loaded(image, Job(MIB, kind=kind, depth=4, order=Order.ONCE, stride=16384)) as load:
        assert not load.run(TIMEOUT)
        assert load.outcome().writes == MIB // 16384
    if kind is Kind.WRITE:
        data = image.read_bytes()
        assert all(any(data[at : at + 16384]) for at in range(0, MIB, 16384))


def test_sequential_writes_cover_the_disk(image: Path) -> None:
    with loaded(image, Job(MIB, order=Order.SEQUENTIAL, block_size=65536, depth=4)) as load:
        while load.outcome().writes < 2 * MIB // 65536:
            load.run(0.05)
    data = image.read_bytes()
    assert all(any(data[at : at + 512]) for at in range(0, MIB, 512))


def test_percentile_is_the_end_of_its_bucket() -> None:
    counts = [0] * 128
    counts[10], counts[32 + 8] = 98, 2  # ten nanoseconds; forty
    histogram = Histogram(32, counts)
    assert [histogram.percentile(p) for p in (50, 98, 99, 100)] == [10, 10, 40, 40]
    assert histogram.buckets() == {10: 98, 40: 2}


def test_octaves_widen_their_buckets() -> None:
    counts = [0] * 128
    counts[3 * 32] = 1  # the first bucket of the third octave: 128 to 131
    assert Histogram(32, counts).percentile(50) == 131


def test_pairs_that_disagree_are_noise() -> None:
    ratio = Ratio.of_pairs([11, 9, 12], [10, 10, 10])
    assert (ratio.verdict(None), ratio.verdict(1.05)) == ("within noise", "within noise (reached by the median)")


def test_pairs_that_agree_are_not_noise() -> None:
    ratio = Ratio.of_pairs([20, 25, 30], [10, 10, 10])
    assert (ratio.verdict(None), ratio.verdict(2), ratio.verdict(4)) == ("ahead", "reached", "missed")


def test_two_pairs_are_never_sure() -> None:
    assert Ratio.of_pairs([20, 30], [10, 10]).verdict(None) == "ahead, too few pairs to be sure"
