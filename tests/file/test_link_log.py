"""The link log of a real daemon: what it keeps, when it counts, and that nothing found in its place does any harm."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import qcow2
from tests.builder import Recipe, build
from tests.builder.record import BACKING_FORMAT, LAZY_REFCOUNTS
from tests.forked import fork, status_of
from tests.frontend import F_CONFIG_WCE, F_FLUSH, FrontEnd
from tests.oracle import assert_clean, assert_not_corrupt, assert_same_bytes, qemu_img, qemu_io, qemu_read, read_header
from tests.program import TIMEOUT, TOOL, Daemon, qcow2_tool, qcow2_tool_ok

CLUSTER = 1 << 16
NCLUSTERS = 40
NEW = b"new!" * 1024
WRITES = range(1, NCLUSTERS, 2)


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """Where the daemon keeps its log."""
    directory = tmp_path / "logs"
    directory.mkdir()
    return directory


@pytest.fixture
def base(tmp_path: Path) -> bytes:
    content = b"".join(bytes([1 + index]) * CLUSTER for index in range(NCLUSTERS))
    (tmp_path / "base").write_bytes(content)
    return content


@pytest.fixture(params=[True, False], ids=["lazy", "accurate"])
def image(tmp_path: Path, base: bytes, request: pytest.FixtureRequest) -> Path:
    """An empty overlay."""
    recipe = Recipe(size=len(base), backing="base", extensions=[(BACKING_FORMAT, b"raw")])
    recipe.compatible = LAZY_REFCOUNTS if request.param else 0
    return build(recipe, tmp_path / "image").path


def written(base: bytes) -> bytes:
    """The disk after `write_some`."""
    disk = bytearray(base)
    for index in WRITES:
        start = index * CLUSTER + 512
        disk[start : start + len(NEW)] = NEW
    return bytes(disk)


def write_some(guest: FrontEnd) -> None:
    for index in WRITES:
        guest.write(index * CLUSTER + 512, NEW)


def daemon(image: Path, logs: Path, *options: str) -> Daemon:
    return Daemon(image, f"--link-log={logs}", *options)


def die(image: Path, logs: Path) -> Path:
    """Let a daemon be killed with writes that nobody flushed; its log."""
    with daemon(image, logs) as serving, FrontEnd(serving.socket_path) as guest:
        write_some(guest)
        serving.kill()
    (log,) = logs.iterdir()
    return log


def contents(image: Path, logs: Path) -> bytes:
    """Open the image as the next process would, and read all of it."""
    with qcow2.open(str(image), writable=True, log_directory=str(logs)) as disk:
        return disk.read(0, disk.size)


def test_unflushed_writes_outlive_the_daemon(image: Path, logs: Path, base: bytes) -> None:
    die(image, logs)
    assert_same_bytes(contents(image, logs), written(base))
    assert not list(logs.iterdir())
    assert_same_bytes(qemu_read(image), written(base))
    assert_not_corrupt(image)


def test_the_next_daemon_goes_on_with_them(image: Path, logs: Path, base: bytes) -> None:
    die(image, logs)
    with daemon(image, logs) as serving, FrontEnd(serving.socket_path) as guest:
        seen = b"".join(guest.read(start, CLUSTER) for start in range(0, len(base), CLUSTER))
        serving.stop()
    assert_same_bytes(seen, written(base))
    assert_same_bytes(qemu_read(image), written(base))


def test_a_clean_stop_leaves_no_log(image: Path, logs: Path, base: bytes) -> None:
    with daemon(image, logs) as serving, FrontEnd(serving.socket_path) as guest:
        write_some(guest)
        assert list(logs.iterdir())
        serving.stop()
    assert not list(logs.iterdir())
    assert read_header(image).fields["autoclear_features"] == 0
    assert_clean(image)
    assert_same_bytes(qemu_read(image), written(base))


def flush(guest: FrontEnd) -> None:
    guest.flush()


def stop_the_ring(guest: FrontEnd) -> None:
    guest.stop_queue()


def switch_to_writethrough(guest: FrontEnd) -> None:
    guest.set_writeback(False)


def copy_of(image: Path) -> Path:
    """A copy of the file alone, beside the same base, while a daemon has it open."""
    return shutil.copy(image, image.with_name("copy"))


def test_before_a_flush_the_file_knows_nothing_of_the_writes(image: Path, logs: Path, base: bytes) -> None:
    """Else nothing below proves anything."""
    with daemon(image, logs) as serving, FrontEnd(serving.socket_path) as guest:
        write_some(guest)
        assert_same_bytes(qemu_read(copy_of(image)), base)


@pytest.mark.parametrize("quiesce", [flush, stop_the_ring, switch_to_writethrough], ids=lambda act: act.__name__)
def test_a_quiet_daemons_file_is_whole(
    image: Path, logs: Path, base: bytes, quiesce: Callable[[FrontEnd], None]
) -> None:
    """Incident "quiesce without metadata": who pauses the guest may copy the file."""
    with daemon(image, logs) as serving, FrontEnd(serving.socket_path, features=F_FLUSH | F_CONFIG_WCE) as guest:
        write_some(guest)
        quiesce(guest)
        assert_same_bytes(qemu_read(copy_of(image)), written(base))


def test_a_file_whose_front_end_left_is_whole(image: Path, logs: Path, base: bytes) -> None:
    with daemon(image, logs) as serving:
        with FrontEnd(serving.socket_path) as guest:
            write_some(guest)
        with FrontEnd(serving.socket_path):  # served once the first is done with
            assert_same_bytes(qemu_read(copy_of(image)), written(base))


def test_in_writethrough_nothing_acknowledged_waits(image: Path, logs: Path, base: bytes) -> None:
    with daemon(image, logs, "--cache=writethrough") as serving, FrontEnd(serving.socket_path) as guest:
        write_some(guest)
        assert_same_bytes(qemu_read(copy_of(image)), written(base))


def test_a_write_in_place_is_flushed_with_the_link_it_needs(image: Path, logs: Path, base: bytes) -> None:
    """The data plane serves it alone; the FLUSH it must not."""
    with daemon(image, logs) as serving, FrontEnd(serving.socket_path) as guest:
        guest.write(5 * CLUSTER, b"a" * 4096)
        guest.write(5 * CLUSTER, b"b" * 4096)
        guest.flush()
        assert qemu_read(copy_of(image))[5 * CLUSTER :][:4096] == b"b" * 4096
        guest.write(5 * CLUSTER, b"c" * 4096)
        guest.flush()


def test_reading_tools_leave_the_log_valid(image: Path, logs: Path, base: bytes) -> None:
    die(image, logs)
    qemu_img("info", image)
    qemu_img("check", image, check=False)
    qcow2_tool("check", image)
    qcow2_tool_ok("info", image)
    assert_same_bytes(qemu_read(image), base)
    assert_same_bytes(contents(image, logs), written(base))


def test_another_program_that_writes_voids_the_log(
    image: Path, logs: Path, base: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """It may have used the very clusters. QEMU clears the tag when it opens an image for writing."""
    die(image, logs)
    qemu_io(image, f"write -P 170 {7 * CLUSTER} {CLUSTER}")
    assert read_header(image).fields["autoclear_features"] == 0
    expected = base[: 7 * CLUSTER] + b"\xaa" * CLUSTER + base[8 * CLUSTER :]
    assert_same_bytes(contents(image, logs), expected)
    assert "if another program wrote to it since" in caplog.text
    assert list(logs.iterdir())  # it may be another image's that had the same numbers
    assert_not_corrupt(image)


@pytest.mark.parametrize("command", [["check", "-r", "all"], ["resize"], ["rebase", "-u", "-b", "base", "-F", "raw"]])
def test_tools_that_write_bring_the_links_in_first(
    image: Path, base: bytes, command: list[str], tmp_path: Path
) -> None:
    with Daemon(image) as serving, FrontEnd(serving.socket_path) as guest:
        write_some(guest)
        serving.kill()
    size = [str(len(base))] if command == ["resize"] else []
    qcow2_tool_ok(*command, image, *size)
    assert_same_bytes(qemu_read(image), written(base))
    qcow2_tool_ok("check", "-r", "all", image)  # rebase does not repair a lazy image
    assert_same_bytes(qemu_read(image), written(base))


def garbage(log: Path) -> None:
    log.write_bytes(os.urandom(100_000))


def empty(log: Path) -> None:
    log.write_bytes(b"")


def cut(log: Path) -> None:
    os.truncate(log, 64 + 48 * 5 + 17)


def a_link_to_a_file(log: Path) -> None:
    log.rename(log.with_name("victim"))
    log.symlink_to("victim")


def a_file_of_two_names(log: Path) -> None:
    os.link(log, log.with_name("victim"))


def a_file_that_others_write(log: Path) -> None:
    log.chmod(0o666)


def a_directory(log: Path) -> None:
    log.rename(log.with_name("victim"))
    log.mkdir()


def a_pipe(log: Path) -> None:
    log.unlink()
    os.mkfifo(log, 0o600)


SPOILERS = [
    garbage,
    empty,
    cut,
    a_link_to_a_file,
    a_file_of_two_names,
    a_file_that_others_write,
    a_directory,
    a_pipe,
]


@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda spoil: spoil.__name__)
def test_whatever_lies_in_the_place_of_a_log_does_no_harm(
    image: Path, logs: Path, base: bytes, spoil: Callable[[Path], None]
) -> None:
    """Nobody goes on without a word: it is refused, until somebody says that what was not flushed may be lost."""
    log = die(image, logs)
    spoil(log)
    victim = log.with_name("victim")
    before = victim.read_bytes() if victim.exists() else b""
    with pytest.raises(qcow2.ImageError, match="acknowledged writes that were never flushed are in it"):
        contents(image, logs)
    with daemon(image, logs, "--discard-link-log") as serving, FrontEnd(serving.socket_path) as guest:
        seen = guest.read(0, 2 * CLUSTER)
        write_some(guest)
        guest.flush()
        serving.kill()
    assert seen == base[: 2 * CLUSTER]
    assert_same_bytes(contents(image, logs), written(base))
    assert_not_corrupt(image)
    assert (victim.read_bytes() if victim.exists() else b"") == before


def test_a_missing_log_is_a_refusal_and_other_images_logs_are_left_alone(
    image: Path, logs: Path, base: bytes, tmp_path: Path
) -> None:
    die(image, logs)
    other = tmp_path / "elsewhere"
    other.mkdir()
    for command in (["check", "-r", "all"], ["resize", "+1M"], ["rebase", "-u", "-b", "base", "-F", "raw"]):
        words = [
            *command[:1],
            f"--link-log={other}",
            *([image, command[1]] if "resize" in command else [*command[1:], image]),
        ]
        done = qcow2_tool(*words)
        assert (done.returncode, done.stdout) == (1, "")
        assert "acknowledged writes that were never flushed" in done.stderr
    assert_same_bytes(contents(image, logs), written(base))


def test_reboot_loses_the_log_with_a_line_and_needs_no_option(
    image: Path, logs: Path, base: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """The header says when the host was started: here, an hour before it was."""
    die(image, logs).unlink()
    with image.open("r+b") as file:
        file.seek(88)
        word = int.from_bytes(file.read(8), "big")
        boot = (word >> 28 & 0xFFF) - 900
        file.seek(88)
        file.write((word & ~(0xFFF << 28) | (boot & 0xFFF) << 28).to_bytes(8, "big"))
    assert_same_bytes(contents(image, logs), base)
    assert "started anew" in caplog.text


@pytest.mark.parametrize("flushed", [True, False])
def test_image_restored_over_the_same_inode_gets_no_later_log(
    image: Path, logs: Path, base: bytes, tmp_path: Path, flushed: bool
) -> None:
    """What waited when the copy was made is brought in; what was written after it never."""
    backup = tmp_path / "backup"
    with daemon(image, logs) as serving, FrontEnd(serving.socket_path) as guest:
        guest.write(0, NEW)
        if flushed:
            guest.flush()
        shutil.copyfile(image, backup)
        guest.write(CLUSTER, NEW)
        guest.discard(0, CLUSTER)
        guest.flush()
        write_some(guest)
        serving.kill()
    with backup.open("rb") as source, image.open("r+b") as target:
        target.truncate(0)
        shutil.copyfileobj(source, target)
    assert_same_bytes(contents(image, logs), NEW + base[len(NEW) :])
    assert_not_corrupt(image)


def test_copy_made_after_a_death_and_the_image_both_have_the_writes(
    image: Path, logs: Path, base: bytes, tmp_path: Path
) -> None:
    die(image, logs)
    copy = Path(shutil.copyfile(image, tmp_path / "copy"))
    assert_same_bytes(contents(copy, logs), written(base))
    assert list(logs.iterdir())
    assert_same_bytes(contents(image, logs), written(base))
    assert not list(logs.iterdir())


def test_log_of_links_that_are_in_the_image_goes_without_a_word(
    image: Path, logs: Path, base: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Who brings them in may die before it has removed the log."""
    log = die(image, logs)
    kept = log.read_bytes()
    assert_same_bytes(contents(image, logs), written(base))
    log.write_bytes(kept)
    log.chmod(0o600)
    assert_same_bytes(contents(image, logs), written(base))
    assert not list(logs.iterdir())
    log.write_bytes(kept)
    log.chmod(0o600)
    with qcow2.open(str(image), writable=True, log_directory=str(logs)) as disk:
        disk.discard(0, disk.size)
    assert caplog.messages == []
    log.write_bytes(kept)
    log.chmod(0o600)
    with qcow2.open(str(image), writable=True, log_directory=str(logs)):
        pass
    assert "never flushed" in caplog.text  # now it might be
    assert list(logs.iterdir()) == [log]


def test_logs_are_listed_and_removed_unless_they_are_in_use(image: Path, logs: Path, base: bytes) -> None:
    def listed() -> list[tuple[str, int, str]]:
        facts = json.loads(qcow2_tool_ok("link-logs", f"--link-log={logs}", "--output=json"))
        return [(each["state"], each["waiting"], each["image"]) for each in facts]

    assert listed() == []
    with daemon(image, logs) as serving, FrontEnd(serving.socket_path) as guest:
        write_some(guest)
        assert listed() == [("in use", len(WRITES), str(image))]
        (log,) = logs.iterdir()
        tag = log.name.removeprefix("qcow2-links-")
        assert qcow2_tool("link-logs", f"--link-log={logs}", "--remove", tag).returncode == 1
        serving.kill()
    assert listed() == [("needed", len(WRITES), str(image))]
    kept = log.read_bytes()
    assert_same_bytes(contents(image, logs), written(base))
    log.write_bytes(kept)
    log.chmod(0o600)
    assert listed() == [("stale", len(WRITES), str(image))]
    image.rename(image.with_name("moved"))
    shutil.copyfile(image.with_name("moved"), image)
    assert listed() == [("unknown", len(WRITES), str(image))]  # what is there by now is another file
    image.unlink()
    assert listed() == [("unknown", len(WRITES), str(image))]
    qcow2_tool_ok("link-logs", f"--link-log={logs}", "--clean")
    assert log.exists()
    qcow2_tool_ok("link-logs", f"--link-log={logs}", "--remove", tag)
    assert listed() == []
    assert "no link log ffffff" in qcow2_tool("link-logs", f"--link-log={logs}", "--remove", "ffffff").stderr


def test_only_logs_that_no_image_needs_are_cleaned(image: Path, logs: Path, base: bytes) -> None:
    log = die(image, logs)
    assert "needed" in qcow2_tool_ok("link-logs", f"--link-log={logs}", "--clean")
    kept = log.read_bytes()
    assert_same_bytes(contents(image, logs), written(base))
    log.write_bytes(kept)
    log.chmod(0o600)
    assert qcow2_tool_ok("link-logs", f"--link-log={logs}", "--clean") == ""
    assert not list(logs.iterdir())


@pytest.mark.parametrize("is_flushed", [True, False])
def test_log_of_an_image_that_was_renamed_goes_if_it_says_nothing(
    image: Path, logs: Path, base: bytes, is_flushed: bool
) -> None:
    """As the copy of a mirror is, which began under another name."""
    with daemon(image, logs) as serving, FrontEnd(serving.socket_path) as guest:
        write_some(guest)
        if is_flushed:
            guest.flush()
        serving.kill()
    kept = {log: log.read_bytes() for log in logs.iterdir()}
    moved = image.rename(image.with_name("moved"))
    assert_same_bytes(contents(moved, logs), written(base))
    assert not list(logs.iterdir())
    for log, content in kept.items():  # as if it had not been found
        log.write_bytes(content)
        log.chmod(0o600)
    assert_same_bytes(contents(moved, logs), written(base))
    assert bool(list(logs.iterdir())) == (not is_flushed)  # another file may have had these numbers


@pytest.mark.parametrize("there", ["another image", "no image", "a directory", "one that names it"])
def test_log_of_an_image_that_was_renamed_goes_unless_what_lies_there_now_names_it(
    image: Path, logs: Path, base: bytes, there: str
) -> None:
    """As that of what a mirror's copy has taken the place of."""
    with daemon(image, logs) as serving, FrontEnd(serving.socket_path) as guest:
        write_some(guest)
        shutil.copy(image, image.with_name("before"))
        guest.flush()
        serving.kill()
    (log,) = logs.iterdir()
    kept = log.read_bytes()
    moved = image.with_name("moved")
    image.rename(moved)
    match there:
        case "another image":
            qcow2_tool_ok("create", image, str(len(base)))
        case "no image":
            image.write_bytes(base)
        case "a directory":
            image.mkdir()
        case "one that names it":
            image.with_name("before").rename(image)
    assert_same_bytes(contents(moved, logs), written(base))
    log.write_bytes(kept)  # as if it had not been found
    log.chmod(0o600)
    assert_same_bytes(contents(moved, logs), written(base))
    assert bool(list(logs.iterdir())) == (there == "one that names it")


def test_what_is_longer_than_any_log_is_not_read(image: Path, logs: Path) -> None:
    log = die(image, logs)
    kept = log.read_bytes()
    contents(image, logs)
    log.write_bytes(kept)
    log.chmod(0o600)
    huge = logs / "qcow2-links-"  # listed first
    huge.touch(0o600)
    os.truncate(huge, 8 << 30)
    command = ["prlimit", f"--as={2 << 30}", TOOL, "link-logs", f"--link-log={logs}", "--clean"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 1
    assert f"{huge}: {8 << 30} bytes long, limit" in done.stderr
    assert list(logs.iterdir()) == [huge]


def test_log_that_cannot_be_read_is_named_and_the_list_is_no_success(tmp_path: Path) -> None:
    (tmp_path / "qcow2-links-000001").mkdir()
    (tmp_path / "qcow2-links-000002").write_bytes(b"none")
    (tmp_path / "qcow2-links-000002").chmod(0o600)
    (tmp_path / "qcow2-links-000003").symlink_to("000003")
    done = qcow2_tool("link-logs", f"--link-log={tmp_path}")
    assert done.returncode == 1
    assert [word in done.stderr for word in ("000001", "000002", "000003")] == [True, False, True]
    assert "000002" in done.stdout


@pytest.mark.parametrize("more", ["--clean", "--output=json", "--output=human"])
def test_what_removes_one_log_neither_cleans_nor_lists(tmp_path: Path, more: str) -> None:
    log = tmp_path / "qcow2-links-000001"
    log.write_bytes(b"none")
    log.chmod(0o600)
    done = qcow2_tool("link-logs", f"--link-log={tmp_path}", "--remove", "000001", more)
    said = f"qcow2: --remove and {more.partition('=')[0]} are mutually exclusive\n"
    assert (done.returncode, done.stderr, log.exists()) == (1, said, True)


def test_each_log_is_said_before_the_next_is_looked_at(tmp_path: Path) -> None:
    for name in ("000001", "000003"):
        (tmp_path / f"qcow2-links-{name}").write_bytes(b"none")
        (tmp_path / f"qcow2-links-{name}").chmod(0o600)
    (tmp_path / "qcow2-links-000002").mkdir()
    command = [TOOL, "link-logs", f"--link-log={tmp_path}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT)
    assert [line.partition("00000")[2][:1] for line in done.stdout.splitlines()] == ["1", "2", "3"]


def test_readers_say_that_they_do_not_show_all(
    image: Path, logs: Path, base: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    die(image, logs)
    with qcow2.open(str(image)) as disk:
        assert_same_bytes(disk.read(0, disk.size), base)
    assert "writes that wait in its link log are not shown" in caplog.text
    copy = image.with_name("copy")
    for words in (["convert", image, copy], ["dd", f"if={image}", f"of={copy}"]):
        done = qcow2_tool(*words)
        assert done.returncode == 1
        assert "writes wait in its link log and would be missing" in done.stderr
        assert not copy.exists()
    done = qcow2_tool("compare", "-F", "raw", image, image.with_name("base"))
    assert "writes wait in its link log and would be missing" in done.stderr
    assert done.returncode == 2
    for command in ("check", "info"):
        assert "writes that wait in its link log are not shown" in qcow2_tool(command, image).stderr
        assert "link log" not in qcow2_tool(command, "-U", image).stderr
    with pytest.raises(qcow2.UnsupportedImage, match="would be missing"):
        qcow2.convert(image, copy)
    with pytest.raises(qcow2.UnsupportedImage, match="would be missing"):
        qcow2.compare(image, image.with_name("base"), other_format="raw")
    qcow2_tool_ok("convert", "-U", image, copy)
    assert_same_bytes(copy.read_bytes(), base)


def test_a_directory_that_does_not_exist_costs_speed_and_nothing_else(image: Path, logs: Path, base: bytes) -> None:
    with daemon(image, logs / "nowhere") as serving, FrontEnd(serving.socket_path) as guest:
        write_some(guest)
        serving.kill()
        assert serving.process.stderr is not None
        assert "no link log" in serving.process.stderr.read()
    assert_same_bytes(contents(image, logs), written(base))


@pytest.mark.parametrize("place", ["nowhere", "file"])
def test_what_is_no_directory_is_told_at_the_start(image: Path, logs: Path, place: str) -> None:
    (logs / "file").touch()
    with daemon(image, logs / place) as serving:
        with FrontEnd(serving.socket_path):
            pass
        serving.process.send_signal(signal.SIGTERM)
        _, said = serving.process.communicate(timeout=TIMEOUT)
    assert said.startswith(f"vhost-user-qcow2: --link-log={logs / place}: is no directory: ")
    assert said.count("\n") == 1


def test_a_python_program_that_is_killed_loses_nothing(image: Path, logs: Path, base: bytes) -> None:
    def live() -> int:
        disk = qcow2.open(str(image), writable=True, log_directory=str(logs))
        for index in WRITES:
            disk.write(index * CLUSTER + 512, NEW)
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    assert status_of(fork(live)) == -signal.SIGKILL
    assert_same_bytes(contents(image, logs), written(base))
