"""A snapshot of the disk while a guest uses it: what is frozen, what is served, and who finds what after a death."""

import json
import os
import signal
import stat
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

import qcow2
from tests.frontend import FLUSH, IN, IOERR, OK, OUT, FrontEnd, Queue
from tests.load import Load
from tests.oracle import assert_clean, backing_name, qemu_img, qemu_io
from tests.packedqueue import PackedQueue
from tests.program import DAEMON, TIMEOUT, Daemon, qcow2_tool_ok, run
from tests.realfault.death import dying, dying_once_renamed, forgetful, waiting
from vhost.client import Control, ControlError

MIB = 1 << 20
SIZE = 16 * MIB
BLOCK = 4096


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qcow2_tool_ok("create", "-o", "compat=1.1,lazy_refcounts=on", path, str(SIZE))
    return path


def start(image: Path, *options: str, under: Sequence[str] = ()) -> Daemon:
    return Daemon(image, f"--control={image}.control", *options, under=under)


def snapshot(image: Path, name: str) -> subprocess.CompletedProcess[str]:
    return run(DAEMON, "ctl", f"--control={image}.control", "snapshot", name)


def freeze(image: Path, name: str) -> None:
    done = snapshot(image, name)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"snapshot": name}


def refusal(image: Path, name: str) -> str:
    done = snapshot(image, name)
    assert (done.returncode, done.stdout) == (1, "")
    return done.stderr.removeprefix("vhost-user-qcow2: ctl: ").rstrip("\n")


def content(image: Path) -> bytes:
    with qcow2.open(image) as disk:
        return disk.read(0, disk.size)


@pytest.mark.parametrize(
    "option", ["--cache=writeback", "--cache=writethrough", "--cache=none", "--aio=threads", "--sandbox"]
)
def test_three_snapshots_hold_what_the_disk_held(image: Path, option: str) -> None:
    moments = []
    with start(image, option) as daemon, FrontEnd(daemon.socket_path) as guest:
        load = Load(guest, SIZE // BLOCK, zeroes=True)
        for name in ("monday", "tuesday", "wednesday"):
            load.run(300)
            load.drain()
            freeze(image, name)
            moments.append((name, load.expected()))
        load.run(300)
        load.drain()
        daemon.stop()
    for name, held in moments:
        assert_clean(image.with_name(name))
        assert content(image.with_name(name)) == held
    assert_clean(image)
    assert content(image) == load.expected()
    assert [backing_name(image.with_name(name)) for name in ("disk.qcow2", "wednesday", "tuesday", "monday")] == [
        "wednesday",
        "tuesday",
        "monday",
        None,
    ]


@pytest.mark.parametrize("queue_type", [Queue, PackedQueue])
def test_requests_under_way_are_served(image: Path, queue_type: type[Queue]) -> None:
    with (
        start(image, "--num-queues=2") as daemon,
        FrontEnd(daemon.socket_path, queues=2, queue_type=queue_type) as guest,
    ):
        load = Load(guest, SIZE // BLOCK)
        failures: list[str] = []

        def take() -> None:
            failures.extend(snapshot(image, f"{i}.qcow2").stderr for i in range(4))

        taker = threading.Thread(target=take)
        taker.start()
        while taker.is_alive():
            load.run(100)
        load.drain()
        assert failures == ["", "", "", ""]
        daemon.stop()
    assert_clean(image)
    assert content(image) == load.expected()


def test_daemon_killed_after_a_snapshot_is_followed_by_one_with_its_command_line(image: Path) -> None:
    with start(image) as daemon, FrontEnd(daemon.socket_path) as guest:
        guest.write(0, b"a" * BLOCK)
        freeze(image, "frozen")
        guest.write(0, b"b" * BLOCK)
        daemon.kill()
    assert content(image.with_name("frozen"))[:BLOCK] == b"a" * BLOCK
    with start(image) as daemon, FrontEnd(daemon.socket_path) as guest:
        assert guest.read(0, BLOCK) == b"b" * BLOCK
        daemon.stop()
    assert_clean(image)
    assert_clean(image.with_name("frozen"))


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_sandboxed_daemon_names_files_in_the_directory_of_the_image_and_takes_them_again(
    image: Path, tmp_path: Path, cache: str
) -> None:
    options = ("--sandbox", f"--cache={cache}")
    with start(image, *options) as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            assert refusal(image, "../f").endswith(f"--sandbox leaves {tmp_path}")
            guest.write(0, b"a" * BLOCK)
            freeze(image, "frozen")
            guest.write(BLOCK, b"b" * BLOCK)
        with FrontEnd(daemon.socket_path) as guest:  # nobody held the image in between
            assert guest.read(0, 2 * BLOCK) == b"a" * BLOCK + b"b" * BLOCK
            freeze(image, "again")
        daemon.stop()
    assert [backing_name(image), backing_name(image.with_name("again"))] == ["again", "frozen"]
    assert_clean(image)


def test_overlay_has_subclusters_if_the_image_has(image: Path) -> None:
    qcow2_tool_ok("create", "-o", "extended_l2=on,cluster_size=128k", image, str(SIZE))
    with start(image) as daemon, FrontEnd(daemon.socket_path) as guest:
        guest.write(0, b"a" * BLOCK)
        freeze(image, "frozen")
        guest.write(BLOCK, b"b" * BLOCK)
        daemon.stop()
    assert_clean(image)
    assert content(image)[: 2 * BLOCK] == b"a" * BLOCK + b"b" * BLOCK
    assert json.loads(qemu_img("info", "--output=json", image).stdout)["format-specific"]["data"]["extended-l2"]


def test_frozen_name_must_be_one_that_the_next_daemon_may_open(image: Path, tmp_path: Path) -> None:
    (tmp_path / "allowed").mkdir()
    with start(image, f"--allow-files={tmp_path}/allowed") as daemon:
        with FrontEnd(daemon.socket_path):
            pass
        assert "is not allowed" in refusal(image, "frozen")
        freeze(image, "allowed/frozen")


def test_name_left_by_a_death_in_between_is_taken(image: Path) -> None:
    os.link(image, image.with_name("frozen"))
    image.with_name(".disk.qcow2.overlay").write_bytes(bytes(BLOCK) + b"half of one")
    with start(image) as daemon, FrontEnd(daemon.socket_path) as guest:
        guest.write(0, b"a" * BLOCK)
        freeze(image, "frozen")
    assert content(image.with_name("frozen"))[:BLOCK] == b"a" * BLOCK
    assert {path.name for path in image.parent.iterdir()} >= {"disk.qcow2", "frozen"}
    assert not image.with_name(".disk.qcow2.overlay").exists()


def test_overlay_is_as_accessible_as_the_image_was(image: Path) -> None:
    image.chmod(0o640)
    with start(image) as daemon, FrontEnd(daemon.socket_path):
        freeze(image, "frozen")
    assert stat.S_IMODE(image.stat().st_mode) == 0o640


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_frozen_image_may_be_read_by_others_while_the_guest_writes(image: Path, cache: str) -> None:
    with start(image, f"--cache={cache}") as daemon, FrontEnd(daemon.socket_path) as guest:
        guest.write(0, b"a" * BLOCK)
        freeze(image, "frozen")
        qemu_img("convert", "-O", "raw", str(image.with_name("frozen")), str(image.with_name("copy")))
        guest.write(0, b"b" * BLOCK)
    assert image.with_name("copy").read_bytes()[:BLOCK] == b"a" * BLOCK


@pytest.mark.parametrize("options", ["data_file=data", "data_file=data,data_file_raw=on"])
def test_data_file_stays_that_of_what_is_frozen(image: Path, tmp_path: Path, options: str) -> None:
    qcow2_tool_ok("create", "-o", options.replace("=data", f"={tmp_path}/data", 1), image, str(SIZE))
    with start(image, f"--data-file={tmp_path}/data") as daemon, FrontEnd(daemon.socket_path):
        assert "name its data file itself" in refusal(image, "frozen")
    with start(image, "--sandbox") as daemon, FrontEnd(daemon.socket_path) as guest:
        guest.write(0, b"a" * BLOCK)
        freeze(image, "frozen")
        guest.write(BLOCK, b"b" * BLOCK)
        qemu_img("convert", "-O", "raw", str(image.with_name("frozen")), str(tmp_path / "copy"))
        daemon.stop()
    assert content(image)[: 2 * BLOCK] == b"a" * BLOCK + b"b" * BLOCK
    assert content(image.with_name("frozen"))[: 2 * BLOCK] == b"a" * BLOCK + bytes(BLOCK)
    assert (tmp_path / "copy").read_bytes() == content(image.with_name("frozen"))
    assert_clean(image)
    assert_clean(image.with_name("frozen"))


@pytest.mark.parametrize("place", ["link", "elsewhere/link"])
def test_snapshot_without_a_guest_and_through_a_link(image: Path, place: str) -> None:
    link = image.parent / place
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(image)
    with start(link) as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            guest.write(0, b"a" * BLOCK)
        freeze(link, "frozen")
    assert link.is_symlink()
    assert content(image)[:BLOCK] == content(link)[:BLOCK] == b"a" * BLOCK


def test_what_is_refused_changes_nothing(image: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("precious")
    with start(image) as daemon, FrontEnd(daemon.socket_path) as guest:
        guest.write(0, b"a" * BLOCK)
        assert refusal(image, "taken") == f"{tmp_path}/taken: File exists"
        for own in ("disk.qcow2", "./disk.qcow2", f"../{tmp_path.name}/disk.qcow2", str(image)):
            assert refusal(image, own).endswith("File exists")
        assert "taken for what a death left" in refusal(image, ".disk.qcow2.overlay")
        assert refusal(image, "") == "'' is not the name of a file"
        assert refusal(image, "no/such/place").endswith("No such file or directory")
        assert refusal(image, "n" * 300).endswith("File name too long")
        freeze(image, "frozen")
        (tmp_path / "elsewhere").mkdir()
        assert "is named from its directory" in refusal(image, "elsewhere/frozen")
        image.rename(tmp_path / "moved")
        assert refusal(image, "again").endswith("No such file or directory")
        (tmp_path / "moved").rename(image)
    assert (tmp_path / "taken").read_text() == "precious"
    left = {path.name for path in tmp_path.iterdir() if not path.is_socket()}
    assert left == {"disk.qcow2", "frozen", "taken", "elsewhere"}


def test_another_file_system_is_refused_by_the_path_that_is_there(image: Path) -> None:
    with TemporaryDirectory(dir="/dev/shm") as other, start(image) as daemon, FrontEnd(daemon.socket_path):
        if os.stat(other).st_dev == image.stat().st_dev:
            pytest.skip("the image is in /dev/shm itself")
        assert refusal(image, f"{other}/frozen") == f"{other}/frozen: has to be on the file system of {image}"
        assert os.listdir(other) == []


@pytest.mark.parametrize("option", ["--read-only", "--trace-io=trace", "--format=raw"])
def test_daemon_that_may_not(image: Path, tmp_path: Path, option: str) -> None:
    with start(image, option.replace("=trace", f"={tmp_path}/trace")) as daemon:
        with FrontEnd(daemon.socket_path):  # once it answers, the control socket is there
            pass
        said = refusal(image, "frozen")
    assert {
        "--read-only": "opened read-only",
        "--trace-io=trace": "--trace-io keeps to the files it has",
        "--format=raw": "a raw image",
    }[option] in said
    assert not image.with_name("frozen").exists()


@pytest.mark.sample(2)
@pytest.mark.parametrize("at", [1, 17, 20, 22, 24, 26])
def test_death_before_any_call_leaves_the_old_disk_or_the_new_one(image: Path, at: int) -> None:
    """Before the *at*-th call that changes a file or a name; the next daemon can take a snapshot that is not there."""
    base = image.rename(image.with_name("base"))
    qemu_io(base, f"write -P 1 0 {SIZE}")  # so that links wait in the log
    qcow2_tool_ok("create", "-b", base, "-F", "qcow2", "-o", "lazy_refcounts=on", image)
    with start(image, "--aio=threads", under=dying(at, ".overlay")) as daemon, FrontEnd(daemon.socket_path) as guest:
        load = Load(guest, SIZE // BLOCK, seed=at, base=b"\1" * SIZE)
        load.run(300)
        load.drain()
        snapshot(image, "frozen")
        assert daemon.process.wait(TIMEOUT) == -signal.SIGKILL
    is_taken = image.with_name("frozen").exists() and not image.samefile(image.with_name("frozen"))
    with start(image) as daemon, FrontEnd(daemon.socket_path) as guest:
        for block, data in load.held.items():
            assert guest.read(block * BLOCK, BLOCK) == data
        done = snapshot(image, "frozen")
        assert done.returncode == is_taken, done.stderr
        guest.write(0, b"z" * BLOCK)
        daemon.stop()
    assert content(image.with_name("frozen")) == load.expected()
    assert content(image) == b"z" * BLOCK + load.expected()[BLOCK:]
    assert_clean(image)


def die_with_links_below(image: Path, at: int, options: str = "") -> Load:
    """Let a daemon die of a snapshot while links wait, before the *at*-th call once the overlay has its name.

    The image that is frozen was made with *options*.
    """
    base = image.rename(image.with_name("base"))
    qemu_io(base, f"write -P 1 0 {SIZE}")
    qcow2_tool_ok("create", "-b", base, "-F", "qcow2", "-o", f"lazy_refcounts=on{options}", image, str(SIZE))
    dying = dying_once_renamed(at, ".overlay")
    with start(image, "--aio=threads", under=dying) as daemon, FrontEnd(daemon.socket_path) as guest:
        load = Load(guest, SIZE // BLOCK, seed=at, base=b"\1" * SIZE)
        with Control(f"{image}.control") as client:
            client.ask("snapshot-begin", name="frozen")
            load.run(100)
            load.drain()
            client.ask("snapshot-next")
            with suppress(ControlError):
                client.ask("snapshot-next")
                client.ask("snapshot-next")
        assert daemon.process.wait(TIMEOUT) == -signal.SIGKILL
    assert not image.samefile(image.with_name("frozen"))
    return load


@pytest.mark.parametrize(("at", "options"), [(1, ""), (3, ""), (1, ",data_file={0}/data")])
def test_links_that_wait_below_are_brought_in_after_a_death(image: Path, at: int, options: str) -> None:
    load = die_with_links_below(image, at, options.format(image.parent))
    with start(image) as daemon, FrontEnd(daemon.socket_path) as guest:
        guest.write(0, b"z" * BLOCK)
        daemon.stop()
    assert content(image.with_name("frozen")) == load.expected()
    assert content(image) == b"z" * BLOCK + load.expected()[BLOCK:]
    assert_clean(image)


def test_check_of_an_overlay_brings_in_what_waits_below(image: Path) -> None:
    load = die_with_links_below(image, 1)
    qcow2_tool_ok("check", "-r", "all", image)
    assert content(image.with_name("frozen")) == load.expected()


def test_links_below_an_overlay_that_others_have_written_are_left_alone(image: Path) -> None:
    """Whoever does not know of logs has seen the disk without them, and clears the mark as he begins to write."""
    load = die_with_links_below(image, 1)
    qemu_io(image, f"write -P 2 0 {BLOCK}")
    seen = content(image)
    assert seen[BLOCK:] != load.expected()[BLOCK:]
    with start(image) as daemon, FrontEnd(daemon.socket_path) as guest:
        assert guest.read(BLOCK, 64 * BLOCK) == seen[BLOCK : 65 * BLOCK]
        daemon.stop()
    assert content(image) == seen


@pytest.mark.parametrize("promise", ["FLUSH", "write"])
def test_only_a_promise_waits_for_the_new_name(image: Path, promise: str) -> None:
    """While the second sync of the directory, which is that of the new name, takes its time, other requests go on."""
    pipe = image.with_name("pipe")
    os.mkfifo(pipe)
    cache = "--cache=writeback" if promise == "FLUSH" else "--cache=writethrough"
    with start(image, cache, under=waiting(2, pipe)) as daemon, FrontEnd(daemon.socket_path) as guest:
        guest.write(0, b"a" * BLOCK)
        taker = threading.Thread(target=freeze, args=(image, "frozen"))
        taker.start()
        with pipe.open("wb"):  # the sync has begun
            assert not image.samefile(image.with_name("frozen"))
            if promise == "FLUSH":
                guest.write(BLOCK, b"b" * BLOCK)
                asked = guest.submit(FLUSH)
            else:
                asked = guest.submit(OUT, BLOCK, b"b" * BLOCK)
            for _ in range(100):
                guest.submit(IN, 0, nbytes=BLOCK)
                (read,) = guest.wait()
                assert (read.slot != asked, read.data) == (True, b"a" * BLOCK)
        (kept,) = guest.wait()
        assert (kept.slot, kept.status) == (asked, OK)
        taker.join()
        guest.flush()
        daemon.stop()
    assert content(image)[: 2 * BLOCK] == b"a" * BLOCK + b"b" * BLOCK
    assert content(image.with_name("frozen"))[: 2 * BLOCK] == b"a" * BLOCK + bytes(BLOCK)


def test_names_that_are_not_stable_let_no_flush_succeed(image: Path) -> None:
    """The first sync is that of the name for what is frozen, and refuses; before the second the overlay is served."""
    with start(image, under=forgetful(1)) as daemon, FrontEnd(daemon.socket_path) as guest:
        assert "Input/output error" in refusal(image, "frozen")
        guest.write(0, b"a" * BLOCK)
        guest.flush()
        daemon.stop()
    assert not image.with_name("frozen").exists()
    with start(image, under=forgetful(2)) as daemon, FrontEnd(daemon.socket_path) as guest:
        assert "may not survive a power loss" in refusal(image, "frozen")
        assert guest.read(0, BLOCK) == b"a" * BLOCK
        assert guest.do(FLUSH).status == IOERR


def ask_each(client: Control, *commands: str) -> str:
    """The error of the last of them."""
    *steps, last = [(each, {} if each == "snapshot-next" else {"name": "frozen"}) for each in commands]
    for command, arguments in steps:
        client.ask(command, **arguments)
    with pytest.raises(ControlError) as refused:
        client.ask(last[0], **last[1])
    return str(refused.value)


UNSTABLE: dict[str, Callable[[Control], str]] = {
    "alone": lambda client: ask_each(client, "snapshot"),
    "together": lambda client: ask_each(client, "snapshot-begin", *["snapshot-next"] * 3),
    "commit": lambda client: client.wait(client.commit(active=True).job).error,
}


@pytest.mark.parametrize("way", UNSTABLE)
def test_who_subscribed_hears_of_a_snapshot_that_is_not_stable(image: Path, way: str) -> None:
    top = image.with_name("top.qcow2")
    qcow2_tool_ok("create", "-b", image.name, "-F", "qcow2", top)
    with (
        start(top, under=forgetful(2)) as daemon,
        FrontEnd(daemon.socket_path),
        Control(f"{top}.control") as listener,
        Control(f"{top}.control") as client,
    ):
        listener.subscribe("snapshot")
        said = UNSTABLE[way](client)
        event = listener.next_event(TIMEOUT)
        assert event is not None
        assert event.data == {"snapshot": "top.qcow2.committing" if way == "commit" else "frozen", "unstable": said}
        assert "may not survive a power loss" in said


# Several disks


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if not path.is_socket()}


def together(images: Sequence[Path], name: str) -> subprocess.CompletedProcess[str]:
    controls = [f"--control={image}.control" for image in images]
    command = [DAEMON, "ctl", *controls, "snapshot", *[f"{image.stem}-{name}" for image in images]]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{letter}.qcow2" for letter in "abc"]
    for path in paths:
        qcow2_tool_ok("create", "-o", "compat=1.1,lazy_refcounts=on", path, str(SIZE))
    return paths


def test_disks_are_frozen_at_one_instant(images: list[Path]) -> None:
    """A guest writes each number to one disk after the other: no disk may hold a later one than the disk before it."""
    with ExitStack() as stack:
        daemons = [stack.enter_context(start(image, "--sandbox")) for image in images]
        guests = [stack.enter_context(FrontEnd(daemon.socket_path)) for daemon in daemons]
        outcomes: list[subprocess.CompletedProcess[str]] = []
        taker = threading.Thread(target=lambda: outcomes.extend(together(images, f"{i}") for i in range(4)))
        taker.start()
        number = 0
        while taker.is_alive():
            number += 1
            for guest in guests:
                guest.write(0, number.to_bytes(8) * (BLOCK // 8))
        assert [(done.returncode, done.stderr) for done in outcomes] == [(0, "")] * 4
        assert json.loads(outcomes[0].stdout) == {"snapshots": [{"snapshot": f"{letter}-0"} for letter in "abc"]}
        for daemon in daemons:
            daemon.stop()
    for i in range(4):
        held = [int.from_bytes(content(image.with_name(f"{image.stem}-{i}"))[:8]) for image in images]
        assert held == sorted(held, reverse=True)
        assert held[0] - held[-1] <= 1
    for image in images:
        assert_clean(image)


def test_what_one_disk_refuses_no_disk_does(images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "c-frozen").write_text("precious")
    with ExitStack() as stack:
        daemons = [stack.enter_context(start(image)) for image in images]
        guests = [stack.enter_context(FrontEnd(daemon.socket_path)) for daemon in daemons]
        done = together(images, "frozen")
        assert done.returncode == 1
        assert f"{images[2]}.control: {tmp_path}/c-frozen: File exists" in done.stderr
        assert names_in(tmp_path) == {"a.qcow2", "b.qcow2", "c.qcow2", "c-frozen"}
        for guest in guests:
            guest.write(0, b"a" * BLOCK)
        (tmp_path / "c-frozen").unlink()
        assert together(images, "frozen").returncode == 0
        for daemon in daemons:
            daemon.stop()
    assert [backing_name(image) for image in images] == ["a-frozen", "b-frozen", "c-frozen"]


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_client_that_leaves_calls_its_snapshot_off(image: Path, steps: int) -> None:
    """After *steps*: when the overlay is made, when requests wait, when it has its name."""
    with start(image) as daemon, FrontEnd(daemon.socket_path) as guest:
        guest.write(0, b"a" * BLOCK)
        with Control(f"{image}.control") as client:
            client.ask("snapshot-begin", name="frozen")
            for _ in range(steps):
                client.ask("snapshot-next")
            with Control(f"{image}.control") as other:
                for command in ("flush", "snapshot-next", "snapshot-cancel", "quit"):
                    with pytest.raises(ControlError, match="under way"):
                        other.ask(command)
                assert other.status()["connected"]
        guest.write(BLOCK, b"b" * BLOCK)
        guest.flush()
        while names_in(image.parent) != {"disk.qcow2"}:
            pass
        daemon.kill()
    assert content(image)[: 2 * BLOCK] == b"a" * BLOCK + b"b" * BLOCK


def test_each_disk_wants_a_name(images: list[Path]) -> None:
    command = [DAEMON, "ctl", "--control=a", "snapshot", "--control=b", "one"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 1
    assert "2 of --control, 1 wanted" in done.stderr


@pytest.mark.parametrize(
    ("words", "cluster_size", "has_subclusters", "is_lazy"),
    [
        ([], MIB // 16, True, True),
        (["-o", "extended_l2=off,lazy_refcounts=off"], MIB // 16, False, False),
        (["-o", "cluster_size=128k"], MIB // 8, True, True),
        (["-o", "cluster_size=4k"], 4096, False, True),  # too small for any
    ],
)
def test_the_overlay_is_as_wanted(
    image: Path, words: list[str], cluster_size: int, has_subclusters: bool, is_lazy: bool
) -> None:
    with start(image) as daemon, FrontEnd(daemon.socket_path) as guest:
        for offset in range(0, MIB, MIB // 16):
            guest.write(offset, b"1" * (MIB // 16))
        done = run(DAEMON, "ctl", f"--control={image}.control", "snapshot", *words, "frozen")
        assert (done.returncode, done.stderr) == (0, "")
        guest.write(MIB // 2, b"2" * BLOCK)
        guest.flush()
        daemon.stop()
    assert_clean(image)
    with qcow2.open(image) as disk:
        assert disk.read(0, MIB) == b"1" * (MIB // 2) + b"2" * BLOCK + b"1" * (MIB // 2 - BLOCK)
        info = disk.info
    data = info["format-specific"]["data"]
    assert (info["cluster-size"], data["extended-l2"], data["lazy-refcounts"]) == (
        cluster_size,
        has_subclusters,
        is_lazy,
    )


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("extended_l2=on,cluster_size=4k", "extended_l2 on needs clusters of 16384 bytes at least, not 4096"),
        ("extended_l2=maybe", "extended_l2=maybe"),
        ("backing_file=x", "overlay option 'backing_file' is unknown"),
        ("extended_l2", "option 'extended_l2' needs a value"),
    ],
)
def test_an_overlay_that_cannot_be_is_refused(image: Path, option: str, text: str) -> None:
    with start(image) as daemon, FrontEnd(daemon.socket_path) as guest:
        done = run(DAEMON, "ctl", f"--control={image}.control", "snapshot", "-o", option, "frozen")
        assert (done.returncode, done.stdout, text in done.stderr) == (1, "", True), done.stderr
        guest.write(0, b"1" * BLOCK)
        daemon.stop()
    assert {path.name for path in image.parent.iterdir()} == {image.name}
