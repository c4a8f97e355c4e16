"""`qcow2 amend`: another version, other refcounts, the same disk, also wherever it is interrupted."""

import itertools
import json
import random
import shutil
from pathlib import Path

import pytest

import qcow2
from qcow2.format.header import Header as OurHeader
from qcow2.format.header import read_header as load
from qcow2.format.header import rewrite_header
from qcow2.job.pace import Cancelled, Pace
from qcow2.judge.check import check
from qcow2.judge.repair import change_width
from qcow2.library.amend import Amendment, amend_image
from tests.builder.recipe import Recipe
from tests.builder.writer import build
from tests.crash.driver import CrashDriver, SimulatedFile
from tests.crash.images import check_image, open_image, read_all, start
from tests.crash.moments import states
from tests.file.test_rebase import image as random_image
from tests.oracle import assert_clean, qemu_img, qemu_io, qemu_read, read_header
from tests.program import qcow2_tool, qcow2_tool_ok

MIB = 1 << 20


@pytest.mark.sample(2)
@pytest.mark.parametrize("seed", range(6))
def test_there_and_back_again(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    base = random_image(draw, tmp_path / "base", None, 2 * MIB) if draw.random() < 0.5 else None
    path = tmp_path / "a"
    under = ("-b", "base", "-F", "qcow2" if base and base.read_bytes()[:4] == b"QFI\xfb" else "raw") if base else ()
    cluster = draw.choice(("512", "4k", "64k", "1M"))
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", *under, path, str(3 * MIB + 512))
    qemu_io(path, "write -P 1 100k 1M", "write -z 300k 1200k", "write -P 2 2M 5k", "write -z -u 2M 1M")
    before = qemu_read(path)
    for words in (
        "refcount_bits=64",
        "refcount_bits=1",
        "refcount_bits=16,lazy_refcounts=on",
        "compat=0.10",
        "compat=v3,lazy_refcounts=off,refcount_bits=8",
    ):
        assert qcow2_tool_ok("amend", "-f", "qcow2", "-o", words, path) == ""
        assert_clean(path)
        assert qemu_read(path) == before, words
        if words == "compat=0.10":
            assert (
                json.loads(qemu_img("info", "--output=json", path).stdout)["format-specific"]["data"]["compat"]
                == "0.10"
            )
    facts = json.loads(qemu_img("info", "--output=json", path).stdout)["format-specific"]["data"]
    assert (facts["compat"], facts["refcount-bits"], facts["lazy-refcounts"]) == ("1.1", 8, False)


def test_snapshots_of_another_size_than_the_disk_gets_prevent_a_downgrade(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    qemu_img("snapshot", "-c", "one", path)
    done = qcow2_tool("amend", "-o", "compat=0.10,size=2M", path)
    assert (done.returncode, "Internal snapshots prevent downgrade of image" in done.stderr) == (1, True)
    with qcow2.open(path) as disk:
        assert disk.size == 1 << 20
    qcow2_tool_ok("amend", "-o", "compat=0.10,size=1M", path)


def test_snapshots_stay(tmp_path: Path) -> None:
    path = tmp_path / "a"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", path, "1M")
    qemu_io(path, "write -P 1 0 512k")
    qemu_img("snapshot", "-c", "one", path)
    qemu_io(path, "write -P 2 0 100k")
    before, kept = qemu_read(path), qemu_read(path, snapshot="one")
    for words in ("compat=1.1", "refcount_bits=32", "refcount_bits=16", "compat=0.10"):
        qcow2_tool_ok("amend", "-o", words, path)
        assert_clean(path)
        assert (qemu_read(path), qemu_read(path, snapshot="one")) == (before, kept)


def test_the_disk_grows(tmp_path: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "a", "1M")
    qcow2_tool_ok("amend", "-o", "size=3M", tmp_path / "a")
    assert read_header(tmp_path / "a").fields["size"] == 3 * MIB


REFUSED = {
    "": ("Must specify options (-o)", ""),
    "compat=0.10,lazy_refcounts=on": ("Lazy refcounts only supported with compatibility level 1.1", ""),
    "compat=0.10,refcount_bits=8": ("Refcount widths other than 16 bits require compatibility level 1.1 or above", ""),
    "compat=0.42": ("Unknown compatibility level 0.42", ""),
    "refcount_bits=3": ("Refcount width must be a power of two and may not exceed 64 bits", ""),
    "cluster_size=32k": ("Invalid parameter 'cluster_size'", ""),
    "backing_file=other": ("Cannot amend the backing file", ""),
    "size=512k": ("would lose", ""),
    "compat=0.10": ("persistent bitmaps", "bitmap"),
    "refcount_bits=1": ("cannot have refcounts of 1 bits", "snapshot"),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_is_refused_and_changes_nothing(tmp_path: Path, words: str) -> None:
    said, having = REFUSED[words]
    path = tmp_path / "a"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    qemu_io(path, "write -P 1 0 64k")
    if having == "bitmap":
        qemu_img("bitmap", "--add", path, "b")
    if having == "snapshot":
        qemu_img("snapshot", "-c", "s", path)
    before = qemu_read(path), read_header(path)
    done = qcow2_tool("amend", *(["-o", words] if words else []), path)
    assert (done.returncode, said in done.stderr) == (1, True), done.stderr
    assert (qemu_read(path), read_header(path)) == before
    assert_clean(path)


def test_the_data_file_gets_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    qemu_img("create", "-q", "-f", "qcow2", "-o", "data_file=old,data_file_raw=on", "a", "1M")
    qemu_io(Path("a"), "write -P 7 0 64k")
    before = qemu_read(Path("a"))
    Path("old").rename("new")
    qcow2_tool_ok("amend", "-o", "data_file=new,data_file_raw=off", "a")
    assert qemu_read(Path("a")) == before
    facts = json.loads(qemu_img("info", "--output=json", "a").stdout)["format-specific"]["data"]
    assert (facts["data-file"], facts["data-file-raw"]) == ("new", False)
    qemu_img("create", "-q", "-f", "qcow2", "b", "1M")
    for path, words, said in (
        ("b", "data_file=new", "data-file can only be set for images that use an external data file"),
        ("a", "data_file_raw=on", "data-file-raw cannot be set on existing images"),
    ):
        content = Path(path).read_bytes()
        done = qcow2_tool("amend", "-o", words, path)
        assert (done.returncode, said in done.stderr) == (1, True), done.stderr
        assert Path(path).read_bytes() == content


FAST = "encrypt.state=active,encrypt.iter-time=10,encrypt.new-secret=s"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("data_file=new,compat=0.42", "Unknown compatibility level 0.42"),
        ("data_file=new,refcount_bits=3", "must be a power of two"),
        ("data_file=new,lazy_refcounts=maybe", "expects 'on' or 'off'"),
        ("data_file=new,size=512", "would lose"),
        ("data_file=new,size=7E", "limit"),
        ("data_file=new,compat=0.10", "Cannot downgrade an image with a data file"),
        (f"{FAST},data_file=new,data_file_raw=on", "data-file-raw cannot be set"),
        (f"{FAST},data_file_raw=maybe", "expects 'on' or 'off'"),
        (f"{FAST},compat=0.42", "Unknown compatibility level 0.42"),
        (f"{FAST},size=512", "would lose"),
        (f"{FAST},size=7E", "limit"),
        ("encrypt.state=inactive,encrypt.keyslot=0,size=2M,data_file=new", "the only active keyslot"),
    ],
)
def test_of_several_changes_none_is_made_if_one_is_refused(tmp_path: Path, words: str, said: str) -> None:
    path = tmp_path / "a"
    qcow2.create(path, MIB, data_file="old", key=b"k", iter_time=10)
    (tmp_path / "new").write_bytes(bytes(MIB))
    secrets = ["--object", "secret,id=k,data=k", "--object", "secret,id=s,data=s"]
    assert_refused_as_it_is(path, *secrets, "-o", words, said=said)


@pytest.mark.parametrize("words", ["size=2M,refcount_bits=1", "refcount_bits=1,lazy_refcounts=on"])
def test_refcounts_that_are_too_narrow_are_refused_before_anything_changes(tmp_path: Path, words: str) -> None:
    path = tmp_path / "a"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    qemu_io(path, "write -P 1 0 64k")
    qemu_img("snapshot", "-c", "s", path)
    assert_refused_as_it_is(path, "-o", words, said="cannot have refcounts of 1 bits")


@pytest.mark.parametrize("words", ["compat=1.1", "compat=1.1,size=2M,lazy_refcounts=on"])
def test_a_corrupt_entry_does_not_become_zeros(tmp_path: Path, words: str) -> None:
    """Bit 0 of an L2 entry is reserved in version 2; in version 3 it says that the cluster reads as zeros."""
    path, recipe = tmp_path / "a", Recipe(MIB, version=2)
    recipe.data(0, b"data")
    built = build(recipe, path)
    built.set_l2(0, built.l2(0) | 1)
    assert_refused_as_it_is(path, "-o", words, said="not consistent: repair it")


def test_a_header_that_has_no_room_for_the_newer_one_is_refused_before_anything_changes(tmp_path: Path) -> None:
    path, name = tmp_path / "a", "./" * 165 + "bb"
    qemu_img("create", "-q", "-f", "raw", tmp_path / "bb", "1M")
    options = "compat=0.10,cluster_size=512"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, "-b", name, "-F", "raw", path)
    assert_refused_as_it_is(path, "-o", "compat=1.1,size=2M", said="limit 512")


def test_zeros_of_a_snapshot_are_refused_before_anything_changes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    qemu_img("create", "-q", "-f", "qcow2", path, "2M")
    qemu_io(path, "write -P 1 0 64k", "write -z 0 64k")
    qemu_img("snapshot", "-c", "s", path)
    qemu_img("resize", "-q", "--shrink", path, "1M")
    assert_refused_as_it_is(path, "-o", "compat=0.10,size=2M", said="which version 2 does not know")


def assert_refused_as_it_is(path: Path, *words: str, said: str) -> None:
    before = path.read_bytes()
    done = qcow2_tool("amend", *words, path)
    assert (done.returncode, said in done.stderr) == (1, True), done.stderr
    assert path.read_bytes() == before


def test_a_longer_disk_is_one_with_the_data_file_of_the_new_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("a")
    qcow2.create(path, MIB, data_file="old")
    with qcow2.open(path, "r+") as disk:
        disk.write(0, b"data")
    (tmp_path / "old").rename(tmp_path / "new")
    qcow2_tool_ok("amend", "-o", "data_file=new,size=2M", path)
    assert not (tmp_path / "old").exists()
    assert (tmp_path / "new").stat().st_size == 2 * MIB
    assert qemu_read(path) == b"data".ljust(2 * MIB, b"\0")


def seen(file: SimulatedFile, kind: str) -> bytes:
    driver = CrashDriver()
    disk = driver.run(open_image(file, start(kind).backing))
    driver.run(check_image(file))
    return driver.run(read_all(disk))


@pytest.mark.parametrize("kind", ["small", "small-lazy", "small-backing", "width-64", "accurate", "backing"])
def test_every_moment_of_saying_zeros_otherwise(kind: str) -> None:
    begun = start(kind)
    file = begun.image.copy()
    initial, driver = file.copy(), CrashDriver(3)
    disk = driver.run(open_image(file, begun.backing))
    driver.run(disk.expand_zeros())
    driver.run(disk.close())
    for state in states(driver, initial, file, 1, samples=3):
        assert seen(state, kind) == begun.contents


@pytest.mark.parametrize("order", [3, 4, 5, 6])
@pytest.mark.parametrize("kind", ["small", "compressed", "snapshot", "width-64"])
def test_every_moment_of_another_width(kind: str, order: int) -> None:
    file = start(kind).image.copy()
    initial, driver = file.copy(), CrashDriver(3)
    driver.run(change_width(file, order))
    widths = set()
    for state in states(driver, initial, file, 1, samples=3):
        widths.add(driver.run(load(state)).record.refcount_order)
        report = driver.run(check(state))
        assert not report.corruptions
        assert seen(state, kind) == start(kind).contents
    assert order in widths
    assert not driver.run(check(file)).leaks


class CalledOff(Pace):
    """Is told to end when the job looks for the *last* time."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self._left = last

    def require_going(self) -> None:
        self._left -= 1
        if not self._left:
            self.cancel()
        super().require_going()


def call_off(path: Path, wanted: Amendment, last: int) -> bool:
    """Whether the amendment was at its end before."""
    try:
        amend_image(str(path), wanted, CalledOff(last))
    except Cancelled:
        return False
    return True


@pytest.mark.parametrize(
    "wanted",
    [Amendment(refcount_order=6), Amendment(version=2, refcount_order=4), Amendment(lazy_refcounts=True)],
    ids=str,
)
def test_wherever_it_is_called_off_the_image_is_sound(tmp_path: Path, wanted: Amendment) -> None:
    begun, path = tmp_path / "begun", tmp_path / "a"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512,refcount_bits=8", begun, "256k")
    qemu_io(begun, "write -P 1 0 100k", "write -z 50k 20k", "write -z 200k 10k")
    before = qemu_read(begun)
    for last in itertools.count(1):
        shutil.copy(begun, path)
        is_done = call_off(path, wanted, last)
        assert_clean(path)
        assert qemu_read(path) == before
        header = read_header(path).fields
        if is_done:
            break
        assert (header["version"], header.get("refcount_order")) == (3, 3)
    assert last > 2
    assert wanted.version in (None, header["version"])
    assert wanted.refcount_order in (None, header.get("refcount_order", 4))


@pytest.mark.parametrize("name", ["", "b", "x" * 700])
@pytest.mark.parametrize("other", ["", "c" * 10, "y" * 1000])
@pytest.mark.parametrize("version", [2, 3])
def test_every_moment_of_another_header(name: str, other: str, version: int) -> None:
    """Also where it takes more than a sector."""
    driver = CrashDriver(3)
    file = SimulatedFile("a", dict(start("accurate").image.sectors), start("accurate").image.size)
    old = driver.run(rewrite_header(file, driver.run(load(file)).with_backing(name or None, "raw" if name else None)))
    initial, driver = file.copy(), CrashDriver(3)
    new = old.with_version(version) if version < 3 else old
    new = driver.run(rewrite_header(file, new.with_backing(other or None, "raw" if other else None)))
    found = {said(driver.run(load(state))) for state in states(driver, initial, file, 1, samples=8)}
    assert found == {said(old), said(new)}
    assert driver.run(load(file)) == new


def said(header: OurHeader) -> tuple[int, str | None, str | None]:
    return header.record.version, header.backing_name, header.backing_format


def test_an_image_that_is_open_is_not_amended(tmp_path: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "a", "1M")
    with qcow2.open(tmp_path / "a"):
        assert "lock" in qcow2_tool("amend", "-o", "lazy_refcounts=on", tmp_path / "a").stderr
