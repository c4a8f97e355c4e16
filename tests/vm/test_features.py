"""A guest on what the format has besides clusters: its file system is there, is changed, and is whole afterwards."""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from guest import vhost_user_disk

import qcow2 as library
from tests.bitmapreader import bitmaps_of
from tests.oracle import assert_same_bytes
from tests.patience import TIMEOUT
from tests.vm.conftest import Boot, Serve
from tests.vm.tool import digest, make_image, qcow2, run

SIZE = "96M"
KEYS = {"below": b"the key of the base\n", "top": b"the key of the overlay"}
JOB = """
    mount /dev/vda /mnt
    (cd /mnt/old; md5sum -c ../sums > /dev/null)
    for file in /mnt/old/*5; do echo more >> $file; done
    rm /mnt/old/*7
    fio --name=job --directory=/mnt --ioengine=libaio --direct=1 --verify=crc32c --verify_fatal=1 --output=/tmp/log \
        --rw=randwrite --bsrange=512-64k --blockalign=512 --size=8M --iodepth=16 --numjobs=2 --fsync=32
    fstrim /mnt
    fio --name=part --filename=/mnt/old/file-00 --ioengine=libaio --direct=1 --verify=crc32c --verify_fatal=1 \
        --output=/tmp/log --rw=randwrite --bs=512 --size=128k --iodepth=4
    (cd /mnt; find old -type f | sort | xargs md5sum > new-sums)
    umount /mnt
    mount /dev/vda /mnt
    (cd /mnt; md5sum -c new-sums > /dev/null)
    report sums /mnt/new-sums
    umount /mnt
    e2fsck -fn /dev/vda
"""


@pytest.fixture
def file_system(tmp_path: Path) -> Path:
    """A raw disk with an ext4 in which files, and their sums, are."""
    draw, content = random.Random(3), tmp_path / "content"
    (content / "old").mkdir(parents=True)
    sums = ""
    for index in range(40):
        text = draw.randbytes(200_000) + b"over and over " * 5000
        (content / "old" / f"file-{index:02}").write_bytes(text)
        sums += f"{hashlib.md5(text).hexdigest()}  file-{index:02}\n"
    (content / "sums").write_text(sums)
    run("mke2fs", "-q", "-t", "ext4", "-d", content, tmp_path / "disk.raw", SIZE)
    return tmp_path / "disk.raw"


@dataclass
class Served:
    """An image for the guest, what the daemon is told, and how QEMU reads it."""

    path: Path
    options: list[str] = field(default_factory=list)
    secrets: list[str] = field(default_factory=list)
    name: str = ""  # for QEMU
    unchanged: list[Path] = field(default_factory=list)
    job: str = JOB
    after: Callable[[Path], None] = lambda content: None  # with all of the disk, as QEMU has read it


def subclusters(raw: Path) -> Served:
    """An overlay with subclusters over a compressed base, which has some, too."""
    base, top = raw.with_name("base.qcow2"), raw.with_name("top.qcow2")
    run("qemu-img", "convert", "-c", "-O", "qcow2", "-o", "extended_l2=on", raw, base)
    make_image(top, SIZE, f"extended_l2=on,cluster_size=128k,lazy_refcounts=on,backing_file={base},backing_fmt=qcow2")
    return Served(top, unchanged=[base])


def raw_data_file(raw: Path) -> Served:
    """The file system that was there all along, with metadata beside it; it is the disk at any time."""
    top = raw.with_name("top.qcow2")
    make_image(top, SIZE, f"data_file={raw},data_file_raw=on,data_file_use=keep,lazy_refcounts=on")

    def same(content: Path) -> None:
        assert digest(raw) == digest(content)

    return Served(top, after=same)


def encrypted(raw: Path) -> Served:
    """An encrypted overlay over an encrypted base, each with a key of its own."""
    base, top = raw.with_name("base.qcow2"), raw.with_name("top.qcow2")
    secrets, options = [], []
    for name, key in KEYS.items():
        raw.with_name(name).write_bytes(key)
        secrets += ["--object", f"secret,id={name},file={raw.with_name(name)}"]
        options.append(f"--key-file={raw.with_name(name)}")
    luks = "encrypt.format=luks,encrypt.iter-time=10,encrypt.key-secret="
    run("qemu-img", "convert", *secrets, "-O", "qcow2", "-o", f"{luks}below", raw, base)
    over = f"{luks}top,lazy_refcounts=on,backing_file={base},backing_fmt=qcow2"
    qcow2("create", *secrets, "-o", over, top, SIZE)
    name = f"driver=qcow2,file.filename={top},encrypt.key-secret=top,backing.driver=qcow2"
    name += f",backing.file.filename={base},backing.encrypt.key-secret=below"
    return Served(top, options, secrets, name, unchanged=[base])


def bitmaps(raw: Path) -> Served:
    """A full copy, and three bitmaps that know what has changed since: with them it becomes the disk."""
    top = raw.with_name("top.qcow2")
    run("qemu-img", "convert", "-O", "qcow2", "-o", "lazy_refcounts=on", raw, top)
    for name, granularity in (("fine", "512"), ("middle", "64k"), ("coarse", "2M")):
        run("qemu-img", "bitmap", "--add", "-g", granularity, top, name)

    def copy(content: Path) -> None:
        now = content.read_bytes()
        assert run("qemu-img", "info", top).count("granularity") == 3
        for name, bitmap in bitmaps_of(top).items():
            assert bitmap.is_valid
            backup = bytearray(raw.read_bytes())
            for bit in bitmap.dirty:
                at = slice(bit * bitmap.granularity, (bit + 1) * bitmap.granularity)
                backup[at] = now[at]
            assert_same_bytes(backup, now)
            with library.open(top) as disk:
                nbytes = sum(nbytes for _, nbytes in disk.bitmaps.dirty(name))
            assert nbytes == len(bitmap.dirty) * bitmap.granularity
            if name == "fine":
                assert nbytes < len(now) * 3 // 4

    return Served(top, after=copy, job=JOB.replace("fstrim /mnt", "sync"))  # what is trimmed has changed, too


@pytest.mark.sample(8, of="guests")
@pytest.mark.parametrize("kind", [subclusters, raw_data_file, encrypted, bitmaps], ids=lambda kind: kind.__name__)
def test_guest_lives_on(
    boot: Boot, serve: Serve, tmp_path: Path, file_system: Path, kind: Callable[[Path], Served]
) -> None:
    served = kind(file_system)
    before = [digest(path) for path in served.unchanged]
    with serve(served.path, *served.options) as daemon:
        with boot(served.job, vhost_user_disk(daemon.socket_path, queues=2), cpus=2) as guest:
            sums = guest.finish(TIMEOUT).files["sums"]
        daemon.stop()
    qcow2("check", served.path)
    name = ["--image-opts", *served.secrets, served.name] if served.name else [served.path]
    run("qemu-img", "check", *name)
    run("qemu-img", "convert", "-O", "raw", *name, tmp_path / "after.raw")
    run("e2fsck", "-fn", tmp_path / "after.raw")
    assert run("debugfs", "-R", "cat /new-sums", tmp_path / "after.raw") == sums
    served.after(tmp_path / "after.raw")
    assert [digest(path) for path in served.unchanged] == before
