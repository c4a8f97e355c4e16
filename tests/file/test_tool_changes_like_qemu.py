"""Command lines that change images, side by side with qemu-img: status, output, complaint, and what images are then."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.file.test_tool_like_qemu import about, adapted, has_other_words, said
from tests.oracle import assert_clean, peers, qemu_img, qemu_io
from tests.program import TOOL

CHANGES = ("commit", "resize", "amend", "rebase", "snapshot", "bitmap")
RAW = ("raw", "odd")
IMAGES = ("base", "top", "summit", "kept", "old", "noted")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("originals")
    old = os.getcwd()
    os.chdir(place)
    qemu_img("create", "-q", "-f", "qcow2", "base", "1M")
    qemu_io(Path("base"), "write -P 1 0 512k")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top", "2M")
    qemu_io(Path("top"), "write -P 2 128k 128k", "write -z 256k 64k", "write -P 3 1536k 64k")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "top", "-F", "qcow2", "summit", "2M")
    qemu_io(Path("summit"), "write -P 4 640k 64k")
    qemu_img("create", "-q", "-f", "qcow2", "kept", "1M")
    qemu_io(Path("kept"), "write -P 5 0 64k")
    qemu_img("snapshot", "-c", "one", "kept")
    qemu_io(Path("kept"), "write -P 6 64k 64k")
    qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", "old", "1M")
    qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", "oldkept", "1M")
    qemu_img("snapshot", "-c", "one", "oldkept")
    qemu_img("create", "-q", "-f", "raw", "raw", "1M")
    Path("odd").write_bytes(b"\1" * 1000)
    qemu_img("create", "-q", "-f", "qcow2", "noted", "1M")
    for name in ("b0", "b1"):
        qemu_img("bitmap", "--add", "-g", "64k", "noted", name)
    qemu_io(Path("noted"), "write -P 7 64k 128k")
    qemu_img("bitmap", "--disable", "noted", "b1")
    os.chdir(old)
    return place


ROWS = [
    "create -f qcow2 -o refcount_bits=3 new 1M",
    "create -f qcow2 -o cluster_size=1000 new 1M",
    "create -f qcow2 -o cluster_size=512 new 1T",
    "create -f qcow2 -o compat=0.10,lazy_refcounts=on new 1M",
    "create -f qcow2 -o compat=0.10,refcount_bits=8 new 1M",
    "create -f qcow2 -o compat=9 new 1M",
    "create -f qcow2 -o preallocation=foo new 1M",
    "create -f qcow2 -o lazy_refcounts=maybe new 1M",
    "create -f qcow2 -o nosuch=1 new 1M",
    "create -f qcow2 -o backing_fmt=raw new 1M",
    "create -f qcow2 -b nosuch -F qcow2 new",
    "create -f qcow2 -b nosuch new",
    "create -f qcow2 -b base -F qcow2 -o preallocation=full new 1M",
    "create -f qcow2 new 1x",
    "create -f qcow2 new",
    "create -f nosuch new 1M",
    "create new 1M",
    "create -f qcow2 -o size=x new",
    "create -f qcow2 -o size=3M new 1M",
    "create -u -f raw -o size=3M new 1M",
    "create -f raw new",
    "create -f raw -o encrypt.format=aes new 1M",
    "create -f luks -o compression_type=zstd new 1M",
    "create -f nosuch -o help new",
    "convert -O raw -o extended_l2=on base new",
    "convert -O raw -B base top new",
    "convert -r x base new",
    "convert -S x base new",
    "commit -r x summit",
    "commit -b base base",
    "bitmap --add noted new",
    "bitmap --add -g 128k noted new",
    "bitmap --add --disable noted new",
    "bitmap --add -g 100 noted new",
    "bitmap --add -g x noted new",
    "bitmap --remove -g x noted b0",
    "bitmap --add noted b0",
    "bitmap --add --merge b0 noted new",
    "bitmap --merge b0 noted b1",
    "bitmap --merge nosuch noted b1",
    "bitmap --merge b0 -F qcow2 noted b1",
    "bitmap --remove noted b0",
    "bitmap --remove noted nosuch",
    "bitmap --clear noted b0",
    "bitmap --clear -F raw noted",
    "bitmap --enable noted b1",
    "bitmap --enable noted b0",
    "bitmap --disable noted b0",
    "bitmap noted b0",
    "bitmap --add noted",
    "bitmap -b noted --add noted new",
    "commit top",
    "commit -d top",
    "commit -q top",
    "commit -b base summit",
    "commit -b top summit",
    "commit -b nosuch summit",
    "commit base",
    "commit nosuch",
    "resize base 2M",
    "resize base +512k",
    "resize base 1M",
    "resize base 512k",
    "resize --shrink base 512k",
    "resize --shrink -q base -512k",
    "resize --shrink base -2M",
    "resize base x",
    "resize base",
    "resize",
    "resize --preallocation=nosuch base 2M",
    "resize --preallocation=metadata base 2M",
    "resize --preallocation=full base 2M",
    "resize --preallocation=off --shrink base 64k",
    "resize --shrink --preallocation=full base 64k",
    "resize -f raw raw 2M",
    "resize -f raw --shrink raw 64k",
    "resize -f raw --preallocation=metadata raw 2M",
    "resize -f raw --preallocation=metadata raw 1M",
    "resize -f raw raw 1048577",
    "resize -f raw odd 1500",
    "resize -f raw odd +1",
    "resize -f raw odd 1010",
    "resize -f raw --shrink odd 1010",
    "resize -f raw --shrink odd 1",
    "resize -f raw --shrink odd 0",
    "resize -f raw --preallocation=full odd 1500",
    "resize -f raw --preallocation=falloc odd 1500",
    "resize --shrink base 0",
    "resize base 0",
    "resize base 1048577",
    "resize base 1.1M",
    "resize base +1000",
    "resize base 1000",
    "resize --shrink base 1000",
    "resize --shrink base -1000",
    "resize kept 2M",
    "resize --shrink kept 512k",
    "resize top 3M",
    "resize old 3M",
    "resize oldkept 3M",
    "resize -f qcow2 nosuch 3M",
    "amend -o lazy_refcounts=on base",
    "amend -o compat=0.10 base",
    "amend -o compat=1.1 old",
    "amend -o compat=v3,refcount_bits=8 old",
    "amend -o refcount_bits=64 kept",
    "amend -o refcount_bits=1 base",
    "amend -o refcount_bits=16 base",
    "amend -o compat=0.10,lazy_refcounts=on base",
    "amend -o compat=0.10,refcount_bits=32 base",
    "amend -o refcount_bits=32 old",
    "amend -o lazy_refcounts=on old",
    "amend -o compat=0.42 base",
    "amend -o refcount_bits=3 base",
    "amend -o refcount_bits=128 base",
    "amend -o size=2M base",
    "amend -f raw -o size=2M raw",
    "amend base",
    "amend",
    "amend -o lazy_refcounts=on",
    "amend -o backing_file=base,backing_fmt=qcow2 top",
    "amend -o backing_file=base top",
    "amend -o backing_fmt=qcow2 top",
    "amend -q -o compat=0.10 kept",
    "rebase -u -b base -F qcow2 top",
    "rebase -F qcow2 summit",
    "rebase -F qcow2 raw",
    "rebase -b nosuch -F raw top",
    "rebase -u -b base top",
    "rebase -u -b base -F qcow22 top",
    "rebase -b base -F nosuch top",
    "rebase -u -F nosuch top",
    "create -u -f qcow2 -b base -F vmdk new 1M",
    "rebase -u -b base -F qcow2 nosuch",
    "snapshot -l kept",
    "snapshot -c two base",
    "snapshot -c two -U base",
    "snapshot -d one -U kept",
    "snapshot -a one -d one base",
    "snapshot -c two -c three base",
    "snapshot -d one -d one kept",
    "snapshot -l -l kept",
    "snapshot -d one kept",
    "snapshot -d nosuch kept",
    "snapshot -a one kept",
    "snapshot -a nosuch kept",
    "check base",
    "check -q base",
    "check -T none base",
    "check --output=json kept",
    "check -r leaks base",
    "check -f raw raw",
    "check nosuch",
    "info --output=json summit",
    "info summit",
    "info --backing-chain top",
    "info --output=json --backing-chain summit",
    "info -f raw raw",
    "info kept",
    "info nosuch",
    "map base",
    "map --output=json kept",
    "map -f raw raw",
    "measure -O qcow2 --output=json top",
    "measure -o extended_l2=on base",
    "measure -O qcow2 -o cluster_size=x base",
    "measure -l one",
    "measure",
    "measure base top",
    "measure --size 1G base",
    "measure -o ,",
    "measure -o , base",
    "measure -l snapshot.foo=bar",
    "measure -O foo base",
    "measure -l snapshot.foo",
    "measure -l snapshot.id,snapshot.foo=1 kept",
    "convert -n -O qcow2 -o preallocation=metadata base top",
    "convert -n -O qcow2 -B base top top2",
    "create -f qcow2 -o encryption=off new 1M",
    "create -f qcow2 -o encryption=x new 1M",
    "create -f raw -o encryption=off new 1M",
    "create -f qcow2 new 0",
    "info --image-opts driver=foo",
    "info --image-opts driver=foo,file.filename=base",
    "info --image-opts driver=qcow2",
    "info json:{'driver':'foo'}",
    "map --output=json --image-opts driver=qcow2,file.filename=top,backing.driver=qcow2,backing.file.filename=base",
    "measure --size 0x100000",
    "measure -O qcow2 -o cluster_size=0x10000 base",
    "measure -O qcow2 -o nocow=off,extent_size_hint=1M base",
    "measure -O qcow2 -o nocow=x base",
    "measure -O qcow2 --size 2251799813685248",
    "convert -l snapshot.foo=bar kept new",
    "convert base",
    "convert",
    "convert -m 17 base new",
    "convert -r +1M -O qcow2 base new",
    "create -f raw new +1M",
    "create -f raw new 1.M",
    "convert -F raw base new",
    "convert -c -S 0 -C base new",
    "compare -T foo base top",
    "compare -q base nosuch",
    "bench -w -U base",
    "create",
    "create -f qcow2",
    "create -f qcow2 -o , new 1M",
    "bitmap base",
    "bitmap --add base",
    "bitmap --add -b base -F qcow2 base x",
    "dd if=base",
    "dd if=base of=new bs=0",
    "dd if=base of=new foo=1",
    "info .",
    "check .",
    "map .",
    "measure .",
    "compare base .",
    "convert . new",
    "measure -O qcow2 --size 3P",
    "measure -O qcow2 --size 1500T -o extended_l2=on",
    "measure -O qcow2 --size 1M -o extended_l2=on,cluster_size=8k",
    "measure -O qcow2 --size 1M -o compat=foo",
    "measure -O qcow2 --size 1M -o refcount_bits=8,compat=0.10",
    "measure -O qcow2 -o refcount_bits=8,compat=0.10 base",
    "measure -O qcow2 -o extended_l2=on,cluster_size=4k base",
    "measure -O qcow2 --size 1M -o lazy_refcounts=on,compat=0.10",
    "measure -O qcow2 --size 1M -o refcount_bits=7",
    "measure -O qcow2 --size 1M -o cluster_size=3k",
    "measure -O qcow2 --size 1M -o preallocation=x",
    "create -f qcow2 file:new 1M",
    "create -f raw file:new:of 1M",
    "create -f qcow2 -b file:base -F qcow2 file:new",
    "create -f qcow2 -o extended_l2=on,cluster_size=8k new 1M",
    "create -f qcow2 -o extended_l2=on,compat=0.10 new 1M",
    "create -f qcow2 -o extended_l2=on new 1500T",
    "create -f qcow2 -o cluster_size=0x10000 new 0x100000",
    "convert -O qcow2 file:base file:new",
    "convert -n -O raw file:base file:raw",
    "dd -O qcow2 if=file:base of=file:new",
    "map -s 0x10000 base",
    "resize base 0x200000",
    "resize base +0x10000",
    "measure -f raw --size 1G",
    "measure --size x",
    "map --image-opts base",
    "map -s x base",
    "dd bs=x if=base of=new",
    "dd bs=9E if=base of=new",
    "dd skip=9223372036854775807 if=base of=new",
    "dd bs=4k skip=9223372036854775807 if=base of=new",
    "dd count=9223372036854775807 if=base of=new",
    "dd skip=9223372036854775808 if=base of=new",
    "dd count=8E if=base of=new",
    "dd count=99E if=base of=new",
    "dd skip=x if=base of=new",
    "bench --flush-interval=10 base",
    "bench -w --flush-interval=10 base",
    "bench",
    "bench --pattern=300 -w base",
    "bench -i foo base",
]


@pytest.mark.sample(25)
@pytest.mark.parametrize("words", ROWS)
@pytest.mark.parametrize("peer", peers(), ids=os.path.basename)
def test_same_words_change_the_same(originals: Path, tmp_path: Path, peer: str, words: str) -> None:
    results = []
    for name, program in (("ours", linked(tmp_path)), ("theirs", peer)):
        place = tmp_path / name
        shutil.copytree(originals, place)
        status, text = said(program, place, words)
        changed = [place / each for each in IMAGES if each in words.split() and words.split()[0] in CHANGES]
        raw = [(place / each).read_bytes() for each in RAW if each in words.split() and words.startswith("resize")]
        raw += (
            [(place / "new").read_bytes()] if words.startswith("dd") and words.endswith("of=new") and not status else []
        )
        results.append((status, adapted(without_times(text), peer), [facts(path) for path in changed], raw))
        for path in changed if name == "ours" else ():
            assert_clean(path)
    ours, theirs = results
    assert ours[0] == theirs[0], (ours[1], theirs[1])
    assert ours[1] == theirs[1] or (has_other_words(peer, words) and "No such file" not in theirs[1])
    assert ours[2:] == theirs[2:]


def linked(tmp_path: Path) -> Path:
    """Our tool under qemu-img's name: what was written for that is what is compared."""
    path = tmp_path / "qemu-img"
    path.symlink_to(TOOL)
    return path


def without_times(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if "actual-size" not in line and "disk size" not in line)


def facts(path: Path) -> tuple[object, ...]:
    info, extents = about(path, "qcow2")  # also of the chain: what shows through
    for snapshot in info.get("snapshots", []):  # type: ignore[attr-defined]
        for key in ("date-sec", "date-nsec"):
            snapshot.pop(key)
    return json.dumps(info, sort_keys=True), [(each["start"], each["length"], each["data"]) for each in extents]
