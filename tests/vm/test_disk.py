"""A guest's disk on our daemon behaves like a disk."""

from contextlib import ExitStack
from pathlib import Path

import pytest
from guest import vhost_user_disk

from tests.patience import TIMEOUT
from tests.vm.conftest import Boot, Serve
from tests.vm.tool import digest, host_bytes, make_image, run

FIO = "fio --name=job --directory=/mnt --ioengine=libaio --direct=1 --verify=crc32c --verify_fatal=1 --output=/tmp/log"
MAKE_FILE_SYSTEM = "mkfs.ext4 -q /dev/vda; mount /dev/vda /mnt"


@pytest.mark.sample(8, of="guests")
def test_four_queues_write_and_verify_in_writethrough(boot: Boot, serve: Serve, lazy_image: Path) -> None:
    job = f"""
        test $(ls /sys/block/vda/mq | wc -l) = 4
        {MAKE_FILE_SYSTEM}
        {FIO} --rw=randwrite --bsrange=512-64k --blockalign=512 --size=5M --iodepth=16 --numjobs=4
        umount /mnt
        e2fsck -fn /dev/vda
    """
    with serve(lazy_image, "--cache=writethrough") as daemon:
        with boot(job, vhost_user_disk(daemon.socket_path, queues=4), cpus=4) as guest:
            guest.finish(TIMEOUT)
        daemon.stop()
    run("qemu-img", "check", lazy_image)


@pytest.mark.sample(8, of="guests")
@pytest.mark.parametrize("cache", ["none", "directsync", "unsafe"])
def test_cache_mode_verifies(boot: Boot, serve: Serve, lazy_image: Path, cache: str) -> None:
    job = f"""
        {MAKE_FILE_SYSTEM}
        {FIO} --rw=randrw --bsrange=512-128k --blockalign=512 --size=8M --iodepth=8 --fsync=8
        umount /mnt
    """
    with serve(lazy_image, f"--cache={cache}") as daemon:
        with boot(job, vhost_user_disk(daemon.socket_path)) as guest:
            guest.finish(TIMEOUT)
        daemon.stop()
    run("qemu-img", "check", lazy_image)


@pytest.mark.sample(8, of="guests")
def test_second_front_end_finds_what_the_first_wrote_and_fstrim_shrinks_the_host_file(
    boot: Boot, serve: Serve, lazy_image: Path
) -> None:
    fill = f"""
        {MAKE_FILE_SYSTEM}
        dd if=/dev/urandom of=/mnt/filler bs=1M count=24
        md5sum /mnt/filler > /mnt/sum
        umount /mnt
    """
    trim = """
        mount /dev/vda /mnt
        md5sum -c /mnt/sum
        rm /mnt/filler
        sync
        fstrim -v /mnt
        umount /mnt
        e2fsck -fn /dev/vda
    """
    with serve(lazy_image) as daemon:
        disk = vhost_user_disk(daemon.socket_path)
        with boot(fill, disk) as guest:
            guest.finish(TIMEOUT)
        filled = host_bytes(lazy_image)
        with boot(trim, disk) as guest:
            guest.finish(TIMEOUT)
        daemon.stop()
    assert filled - host_bytes(lazy_image) > 20 << 20
    run("qemu-img", "check", lazy_image)


@pytest.mark.sample(8, of="guests")
def test_guest_reset_keeps_the_disk(boot: Boot, serve: Serve, lazy_image: Path) -> None:
    job = f"""
        if mount -t ext4 /dev/vda /mnt 2> /dev/null; then
            md5sum -c /mnt/sum
        else
            {MAKE_FILE_SYSTEM}
            dd if=/dev/urandom of=/mnt/data bs=64k count=100
            md5sum /mnt/data > /mnt/sum
            sync
            echo written
            while true; do dd if=/dev/urandom of=/mnt/noise bs=4k count=256 conv=fsync 2> /dev/null; done
        fi
    """
    with serve(lazy_image) as daemon:
        with boot(job, vhost_user_disk(daemon.socket_path)) as guest:
            guest.wait_for("written", TIMEOUT)
            guest.command("system_reset")
            guest.finish(TIMEOUT)
        daemon.stop()
    run("qemu-img", "check", lazy_image)


@pytest.mark.sample(8, of="guests")
def test_paused_guest_goes_on_where_it_was(boot: Boot, serve: Serve, lazy_image: Path) -> None:
    job = f"""
        {MAKE_FILE_SYSTEM}
        {FIO} --rw=randwrite --bs=4k --size=16M --rate_iops=1000 --iodepth=16 --eta=always --eta-newline=1
        umount /mnt
    """
    with serve(lazy_image) as daemon:
        with boot(job, vhost_user_disk(daemon.socket_path)) as guest:
            for _pause in range(3):
                guest.wait_for("IOPS", TIMEOUT)
                guest.command("stop")
                assert guest.command("query-status")["status"] == "paused"
                guest.command("cont")
            guest.finish(TIMEOUT)
        daemon.stop()
    run("qemu-img", "check", lazy_image)


@pytest.mark.sample(8, of="guests")
def test_four_disks_are_each_what_their_command_line_says(boot: Boot, serve: Serve, tmp_path: Path) -> None:
    """One that is read only, one with a name and without a write cache, and two that do not mix."""
    raw, content = tmp_path / "disk.raw", tmp_path / "content"
    content.mkdir()
    (content / "greeting").write_text("hello\n")
    run("mke2fs", "-q", "-t", "ext4", "-d", content, raw, "16M")
    fixed, named, first, second = (tmp_path / f"{name}.qcow2" for name in ("fixed", "named", "first", "second"))
    run("qemu-img", "convert", "-O", "qcow2", raw, fixed)
    before = digest(fixed)
    for image in (named, first, second):
        make_image(image, "1G" if image is named else "64M", "compat=1.1")
    job = """
        test $(cat /sys/block/vda/ro) = 1
        ! dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=fsync
        mount -o ro,noload /dev/vda /mnt
        test $(cat /mnt/greeting) = hello
        umount /mnt

        test $(cat /sys/block/vdb/serial) = left-drawer
        test $(cat /sys/block/vdb/size) = 2097152
        test "$(cat /sys/block/vdb/cache_type)" = "write through"
        test $(cat /sys/block/vdb/queue/discard_max_bytes) -gt 0
        test $(cat /sys/block/vdb/queue/write_zeroes_max_bytes) -gt 0

        test "$(cat /sys/block/vdc/cache_type)" = "write back"
        echo "write through" > /sys/block/vdc/cache_type
        test "$(cat /sys/block/vdc/cache_type)" = "write through"
        dd if=/dev/urandom of=/dev/vdc bs=4k count=64 oflag=direct

        dd if=/dev/urandom of=/dev/vdc bs=1M count=8 oflag=direct
        dd if=/dev/vdc of=/dev/vdd bs=64k count=64 skip=64 seek=64
        cmp -n 4194304 /dev/zero /dev/vdd
        dd if=/dev/vdc bs=1M skip=4 count=4 | md5sum > /tmp/first
        dd if=/dev/vdd bs=1M skip=4 count=4 | md5sum > /tmp/second
        cmp /tmp/first /tmp/second
    """
    with ExitStack() as stack:
        daemons = [
            stack.enter_context(serve(image, *options))
            for image, *options in (
                (fixed, "--read-only"),
                (named, "--serial=left-drawer", "--cache=writethrough"),
                (first, "--stats"),
                (second,),
            )
        ]
        disks = [word for daemon in daemons for word in vhost_user_disk(daemon.socket_path)]
        with boot(job, disks) as guest:
            guest.finish(TIMEOUT)
        stats = [daemon.stop() for daemon in daemons]
    assert digest(fixed) == before
    assert stats[2]["syncs"] >= 64
