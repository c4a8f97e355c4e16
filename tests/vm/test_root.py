"""A guest lives on an overlay of a compressed base: its root file system is ours to serve."""

import random
from pathlib import Path

import pytest
from guest import Tree, root_tree, vhost_user_disk, write_directory

from tests.patience import TIMEOUT
from tests.vm.conftest import Boot, Serve
from tests.vm.tool import digest, make_image, run

NFILES, FILE_BYTES = 40, 300_000

INSTALL = """
cp -a /packages /installed
for file in /installed/*; do echo more >> $file; done
rm /installed/file-07
dd if=/dev/urandom of=/large bs=64k count=200
find /installed /packages /large -type f | sort | xargs md5sum > /sums
sync
echo 3 > /proc/sys/vm/drop_caches
md5sum -c /sums > /dev/null
report sums /sums
"""


@pytest.fixture(scope="module")
def base_tree() -> Tree:
    tree = root_tree()
    generator = random.Random(7)
    for index in range(NFILES):
        # Half random, half repetitive: compressed clusters of many sizes, and some that do not compress.
        noise = generator.randbytes(generator.randrange(FILE_BYTES))
        tree.add_file(f"packages/file-{index:02}", noise + b"all work and no play " * (len(noise) // 21))
    return tree


@pytest.mark.sample(8, of="guests")
@pytest.mark.parametrize("compression", ["zstd", "zlib"])
def test_guest_installs_files_on_an_overlay_of_a_compressed_base(
    boot: Boot, serve: Serve, tmp_path: Path, base_tree: Tree, compression: str
) -> None:
    raw, base, overlay = tmp_path / "base.raw", tmp_path / "base.qcow2", tmp_path / "overlay.qcow2"
    (tmp_path / "root").mkdir()
    write_directory(base_tree, tmp_path / "root")
    run("mke2fs", "-q", "-t", "ext4", "-d", tmp_path / "root", raw, "128M")
    run("qemu-img", "convert", "-c", "-O", "qcow2", "-o", f"compression_type={compression}", raw, base)
    before = digest(base)
    make_image(overlay, "128M", f"compat=1.1,lazy_refcounts=on,backing_file={base},backing_fmt=qcow2")

    with serve(overlay, "--cache=writeback") as daemon:
        with boot(INSTALL, vhost_user_disk(daemon.socket_path), root="/dev/vda") as guest:
            sums = guest.finish(TIMEOUT).files["sums"]
        daemon.stop()

    run("qemu-img", "check", overlay)
    run("qemu-img", "convert", "-O", "raw", overlay, tmp_path / "after.raw")
    run("e2fsck", "-fn", tmp_path / "after.raw")
    assert run("debugfs", "-R", "cat /sums", tmp_path / "after.raw") == sums
    assert digest(base) == before
