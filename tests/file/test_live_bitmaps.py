"""Bitmaps of a disk that is in use: changed beside a guest that writes, and exact, also after a kill."""

import json
import random
import signal
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import qcow2
from tests.bitmapreader import AUTO, bitmaps_of
from tests.ctl import ctl, told
from tests.frontend import FrontEnd
from tests.load import Load
from tests.oracle import assert_clean, assert_not_corrupt, peers, qemu_img, qemu_io
from tests.program import TIMEOUT, Daemon, qcow2_tool_ok
from tests.realfault.death import dying
from vhost import Control, ControlError

MIB = 1 << 20
SIZE = 12 * MIB
BLOCK = 4096
GRANULARITIES = [512, 4096, 65536, MIB]


class Life:
    """A disk, its guest, and what its bitmaps should be."""

    def __init__(self, directory: Path, seed: int, *options: str) -> None:
        self.rng = random.Random(seed)
        self.image = directory / "disk"
        self.directory = directory
        self.options = options
        self.bitmaps: dict[str, tuple[int, bool, set[int]]] = {}  # granularity, enabled, dirty
        self.serial = 0
        self._stack = ExitStack()

    def begin(self) -> None:
        control = self.directory / "control"
        options = (f"--control={control}", f"--link-log={self.directory}", *self.options)
        self.daemon = self._stack.enter_context(Daemon(self.image, *options))
        self.guest = self._stack.enter_context(FrontEnd(self.daemon.socket_path))
        self.control = self._stack.enter_context(Control(control))

    def kill(self) -> None:
        self.daemon.kill()
        self._stack.close()

    def stop(self) -> None:
        self.daemon.stop()
        self._stack.close()

    def work(self, requests: int = 15) -> None:
        for _ in range(requests):
            offset, nbytes = self.rng.randrange(SIZE // BLOCK) * BLOCK, BLOCK
            kind = self.rng.choice(["write", "write", "write", "discard", "zeroes", "flush"])
            if kind == "write":
                self.guest.write(offset, bytes([self.rng.randrange(1, 256)]) * nbytes)
            elif kind == "flush":
                self.guest.flush()
                continue
            else:
                offset, nbytes = offset >> 16 << 16, 65536
                if kind == "discard":
                    self.guest.discard(offset, nbytes)
                else:
                    self.guest.write_zeroes(offset, nbytes, unmap=True)
            for granularity, enabled, dirty in self.bitmaps.values():
                if enabled:
                    dirty.update(range(offset // granularity, (offset + nbytes - 1) // granularity + 1))

    def plan(self, action: str) -> dict[str, Any]:
        """One action, which the model has done."""
        name = self.rng.choice([*self.bitmaps]) if self.bitmaps else ""
        if action == "add":
            self.serial += 1
            name, granularity, enabled = f"b{self.serial}", self.rng.choice(GRANULARITIES), self.rng.random() < 0.7
            self.bitmaps[name] = granularity, enabled, set()
            return {"action": "add", "name": name, "granularity": granularity, "enabled": enabled}
        granularity, enabled, dirty = self.bitmaps[name]
        if action == "remove":
            del self.bitmaps[name]
        elif action == "clear":
            dirty.clear()
        elif action == "merge":
            source = self.rng.choice([*self.bitmaps])
            theirs = self.bitmaps[source][0]
            for bit in [*self.bitmaps[source][2]]:
                dirty.update(range(bit * theirs // granularity, ((bit + 1) * theirs - 1) // granularity + 1))
            return {"action": "merge", "name": name, "source": source}
        else:
            self.bitmaps[name] = granularity, action == "enable", dirty
        return {"action": action, "name": name}

    def judge_list(self) -> None:
        """What the daemon says."""
        assert {each.name: (each.granularity, each.enabled, each.dirty) for each in self.control.bitmaps} == {
            name: (granularity, enabled, len(dirty) * granularity)
            for name, (granularity, enabled, dirty) in self.bitmaps.items()
        }

    def judge_file(self) -> None:
        """What the file says, and QEMU, whichever there are."""
        found = bitmaps_of(self.image)
        assert {name: (each.granularity, each.flags, each.dirty) for name, each in found.items()} == {
            name: (granularity, AUTO if enabled else 0, dirty)
            for name, (granularity, enabled, dirty) in self.bitmaps.items()
        }
        for program in peers():
            info = json.loads(qemu_img("info", "--output=json", self.image, program=program).stdout)
            listed = info["format-specific"]["data"].get("bitmaps", [])
            assert {each["name"]: each["flags"] for each in listed} == {
                name: ["auto"] if enabled else [] for name, (_, enabled, _) in self.bitmaps.items()
            }
            assert qemu_img("check", self.image, program=program, check=False).returncode in (0, 3), "a kill may leak"


ACTIONS = ["add", "merge", "clear", "disable", "enable", "remove"]


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("cache", "killed_after"), [("writeback", ACTIONS), ("writethrough", ["add", "remove"])], ids=["all", "some"]
)
def test_bitmaps_are_exact_after_each_action_and_a_kill(tmp_path: Path, cache: str, killed_after: list[str]) -> None:
    life = Life(tmp_path, 11, f"--cache={cache}")
    (tmp_path / "base").write_bytes(b"old!" * (SIZE // 4))
    qcow2_tool_ok("create", "-b", tmp_path / "base", "-F", "raw", "-o", "lazy_refcounts=on", life.image, str(SIZE))
    life.begin()
    life.work()  # links wait by the first action
    for action in killed_after:
        life.control.bitmaps.change(life.plan(action))
        life.judge_list()
        life.work()
        life.kill()
        found = bitmaps_of(life.image)  # as another program finds them
        assert all(found[name].dirty >= dirty for name, (_, _, dirty) in life.bitmaps.items())
        qcow2.open(life.image, writable=True, log_directory=str(tmp_path)).close()
        life.judge_file()
        life.begin()
        life.judge_list()
        while len(life.bitmaps) < 2:
            life.control.bitmaps.change(life.plan("add"))
    for _ in range(12):
        life.work(4)
        life.control.bitmaps.change(*(life.plan(action) for action in life.rng.choices(ACTIONS[:5], k=3)))
        life.judge_list()
    life.stop()
    life.judge_file()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    qcow2_tool_ok("create", path, str(SIZE))
    return path


def test_actions_beside_a_guest_that_writes_lose_no_bit_and_no_byte(image: Path) -> None:
    with Daemon(image, f"--control={image}.control") as daemon, FrontEnd(daemon.socket_path, queues=2) as guest:
        load = Load(guest, SIZE // BLOCK, zeroes=True)
        failures: list[BaseException] = []

        def change() -> None:
            try:
                with Control(f"{image}.control") as control:
                    for index in range(6):
                        control.bitmaps.add(f"b{index}", 4096)
                        control.bitmaps.merge(f"b{index}", "all")
                    control.bitmaps.remove("b1")
                    control.bitmaps.disable("b2")
            except ControlError as error:
                failures.append(error)

        load.run(50)
        load.drain()
        told(image, "bitmap", "add", "-g", "512", "all")
        before = dict(load.held)
        changer = threading.Thread(target=change)
        changer.start()
        while changer.is_alive():
            load.run(50)
        load.run(50)
        load.drain()
        assert failures == []
        daemon.stop()
    found = bitmaps_of(image)
    assert [*found] == ["all", "b0", "b2", "b3", "b4", "b5"]
    changed = {block for block, data in load.held.items() if data != before.get(block)}
    reported = {sector * 512 // BLOCK for sector in found["all"].dirty}
    assert changed <= reported <= load.held.keys()
    assert found["b5"].dirty == reported, "it began with all that was reported, and records"
    with qcow2.open(image) as disk:
        assert all(disk.read(block * BLOCK, BLOCK) == data for block, data in load.held.items())
    assert_clean(image)


def test_the_command_line(image: Path) -> None:
    with Daemon(image, f"--control={image}.control", "--sandbox") as daemon, FrontEnd(daemon.socket_path) as guest:
        assert told(image, "bitmap", "list") == ""
        assert told(image, "bitmap", "add", "day") == ""
        told(image, "bitmap", "add", "-g", "1M", "--disabled", "week")
        guest.write(MIB, b"x" * 8192)
        assert (
            told(image, "bitmap", "list")
            == "day: 64 KiB dirty, 64 KiB a bit, enabled\nweek: 0 B dirty, 1 MiB a bit, disabled\n"
        )
        told(image, "bitmap", "together", "merge week day", "clear day", "disable day", "add 'next day'")
        listed = json.loads(told(image, "bitmap", "list", "--json"))
        fine = {"valid": True, "busy": False}
        assert listed == [
            {"name": "day", "granularity": 65536, "enabled": False, "dirty": 0, **fine},
            {"name": "week", "granularity": MIB, "enabled": False, "dirty": MIB, **fine},
            {"name": "next day", "granularity": 65536, "enabled": True, "dirty": 0, **fine},
        ]
        for action in ("enable", "clear", "disable"):
            for _ in range(2):
                told(image, "bitmap", action, "day")
        told(image, "bitmap", "remove", "day")
        daemon.stop()
    assert [*bitmaps_of(image)] == ["week", "next day"]


REFUSED = {
    "Bitmap already exists: b": ["add", "b"],
    "Dirty bitmap 'c' not found": ["remove", "c"],
    "Granularity must be power of 2 and at least 512": ["add", "c", "-g", "1000"],
    "Dirty bitmap 'd' not found": ["together", "add c", "clear b", "merge c d"],
    "No closing quotation": ["together", "add 'c"],
    "invalid choice: 'list'": ["together", "list"],
}


def test_what_is_refused_changes_nothing(image: Path) -> None:
    with Daemon(image, f"--control={image}.control") as daemon, FrontEnd(daemon.socket_path) as guest:
        told(image, "bitmap", "add", "b")
        guest.write(0, b"x" * BLOCK)
        before = told(image, "bitmap", "list", "--json")
        for text, arguments in REFUSED.items():
            done = ctl(image, "bitmap", *arguments)
            assert (done.returncode, done.stdout) == (1, "")
            assert text in done.stderr
            assert done.stderr.count("\n") == 1
            assert told(image, "bitmap", "list", "--json") == before


@pytest.mark.parametrize(
    "actions",
    [None, {}, [], [None], [{}], [{"action": "add"}], [{"action": "list", "name": "b"}], [{"action": [], "name": "b"}]]
    + [[{"action": "add", "name": "b", key: value}] for key, value in (("granularity", True), ("enabled", 1), ("x", 1))]
    + [[{"action": "merge", "name": "b"}], [{"action": "add", "name": "b", "granularity": -4096}]],
    ids=str,
)
def test_what_is_no_list_of_actions_is_refused(shared: Control, actions: object) -> None:
    with pytest.raises(ControlError, match=r"action|takes no|source|Granularity|none of|name of"):
        shared.ask("bitmap-change", actions=actions)
    assert list(shared.bitmaps) == []


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    image = tmp_path_factory.mktemp("shared") / "disk"
    qcow2_tool_ok("create", image, "1M")
    with Daemon(image, f"--control={image}.control") as daemon, FrontEnd(daemon.socket_path):
        with Control(f"{image}.control") as control:
            yield control


def test_disks_that_have_none(tmp_path: Path, image: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(MIB))
    with Daemon(raw, "--format=raw", f"--control={raw}.control") as daemon, FrontEnd(daemon.socket_path):
        assert "a raw image has neither bitmaps nor" in ctl(raw, "bitmap", "list").stderr
    with Daemon(image, "--read-only", f"--control={image}.control") as daemon, FrontEnd(daemon.socket_path):
        assert told(image, "bitmap", "list") == ""
        assert "opened read-only" in ctl(image, "bitmap", "add", "b").stderr


def test_bitmaps_of_a_disk_that_no_guest_uses(image: Path) -> None:
    with Daemon(image, f"--control={image}.control") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            told(image, "bitmap", "add", "b")
            guest.write(0, b"x" * BLOCK)
            guest.stop_queue()  # the image is let go
        told(image, "bitmap", "add", "c")
        qemu_io(image, "write 1M 64k")  # nobody holds it
        assert [each["dirty"] for each in json.loads(told(image, "bitmap", "list", "--json"))] == [131072, 65536]


def reported(image: Path) -> dict[str, set[int]]:
    """The blocks that each bitmap has."""
    return {
        name: {bit * each.granularity // BLOCK + i for bit in each.dirty for i in range(each.granularity // BLOCK)}
        for name, each in bitmaps_of(image).items()
    }


def test_no_name_draws_lines_of_its_own(image: Path) -> None:
    name = "day\nnight: 0 B dirty\x1b[2K"
    with Daemon(image, f"--control={image}.control") as daemon, FrontEnd(daemon.socket_path):
        told(image, "bitmap", "add", name)
        told(image, "snapshot-internal", "create", name)
        for command in ("bitmap", "snapshot-internal"):
            (line,) = told(image, command, "list").splitlines()
            assert "day?night: 0 B dirty?[2K" in line
            assert json.loads(told(image, command, "list", "--json"))[0]["name"] == name


def test_a_backup_by_bitmap_outlives_a_snapshot_that_carries_it(image: Path) -> None:
    nightly = ("backup", "--wait", "--bitmap=nightly")
    with Daemon(image, f"--control={image}.control") as daemon, FrontEnd(daemon.socket_path):
        told(image, "bitmap", "add", "nightly")
        told(image, "snapshot", "carried", "--carry-bitmaps")
        told(image, *nightly, "night1", "--backing=carried")
        told(image, "snapshot", "left")
        assert "nightly" in ctl(image, *nightly, "night2", "--backing=night1").stderr


def test_a_snapshot_with_bitmaps(image: Path) -> None:
    frozen = image.with_name("frozen")
    with Daemon(image, f"--control={image}.control", f"--link-log={image.parent}") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            told(image, "bitmap", "together", "add -g 4k kept", "add off --disabled -g 4k", "add -g 4k more")
            for block in (1, 2, 9):
                guest.write(block * BLOCK, b"a" * BLOCK)
            told(image, "bitmap", "together", "merge off kept", "clear more")
            done = ctl(image, "snapshot", "frozen", "--bitmap-add=kept", "--carry-bitmaps")
            assert (done.returncode, "Bitmap already exists: kept" in done.stderr, frozen.exists()) == (1, True, False)
            guest.write(3 * BLOCK, b"b" * BLOCK)
            told(image, "snapshot", "frozen", "--bitmap-add=day", "--bitmap-add=night", "--carry-bitmaps")
            for block in (4, 16):
                guest.write(block * BLOCK, b"c" * BLOCK)
            daemon.kill()
    qcow2.open(image, writable=True, log_directory=str(image.parent)).close()
    before, off = {1, 2, 3, 9}, {1, 2, 9}
    assert reported(frozen) == {"kept": before, "off": off, "more": {3}}
    day = {*range(32)}
    wanted = {"day": day, "night": day, "kept": before | {4, 16}, "off": off, "more": {3, 4, 16}}
    assert reported(image) == wanted
    assert_not_corrupt(image)


@pytest.mark.sample(1)
@pytest.mark.parametrize("at", [14, 20, 26, 32, 38])
def test_no_death_in_a_snapshot_forgets_what_is_carried(image: Path, at: int) -> None:
    """Before the *at*-th call that changes a file or a name, from that on that removes an old overlay."""
    qcow2_tool_ok("bitmap", "--add", "-g", "4k", image, "kept")
    with (
        Daemon(image, f"--control={image}.control", "--aio=threads", under=dying(at, ".overlay")) as daemon,
        FrontEnd(daemon.socket_path) as guest,
    ):
        for block in (1, 2, 9):
            guest.write(block * BLOCK, b"a" * BLOCK)
        ctl(image, "snapshot", "frozen", "--carry-bitmaps")
        assert daemon.process.wait(TIMEOUT) == -signal.SIGKILL
    with Daemon(image, f"--control={image}.control") as daemon, FrontEnd(daemon.socket_path) as guest:
        guest.write(5 * BLOCK, b"a" * BLOCK)
        daemon.stop()
    assert reported(image) == {"kept": {1, 2, 5, 9}}
