"""A guest's disk on our daemon behaves like a disk."""

from pathlib import Path

import pytest
from guest import vhost_user_disk

from tests.vm.conftest import Boot, Serve
from tests.vm.tool import digest, host_bytes, make_image, run

FIO = "fio --name=job --directory=/mnt --ioengine=libaio --direct=1 --verify=crc32c --verify_fatal=1 --output=/tmp/log"
MAKE_FILE_SYSTEM = "mkfs.ext4 -q /dev/vda; mount /dev/vda /mnt"


def test_four_queues_write_and_verify_in_writethrough(boot: Boot, serve: Serve, lazy_image: Path) -> None:
    job = f"""
        test $(ls /sys/block/vda/mq | wc -l) = 4
        {MAKE_FILE_SYSTEM}
        {FIO} --rw=randwrite --bsrange=512-64k --blockalign=512 --size=12M --iodepth=16 --numjobs=4
        umount /mnt
        e2fsck -fn /dev/vda
    """
    with serve(lazy_image, "--cache=writethrough") as daemon:
        with boot(job, vhost_user_disk(daemon.socket_path, queues=4), cpus=4) as guest:
            guest.finish(90)
        daemon.stop()
    run("qemu-img", "check", lazy_image)


@pytest.mark.sample(1)
@pytest.mark.parametrize("cache", ["none", "directsync", "unsafe"])
def test_cache_mode_verifies(boot: Boot, serve: Serve, lazy_image: Path, cache: str) -> None:
    job = f"""
        {MAKE_FILE_SYSTEM}
        {FIO} --rw=randrw --bsrange=512-128k --blockalign=512 --size=8M --iodepth=8 --fsync=8
        umount /mnt
    """
    with serve(lazy_image, f"--cache={cache}") as daemon:
        with boot(job, vhost_user_disk(daemon.socket_path)) as guest:
            guest.finish(60)
        daemon.stop()
    run("qemu-img", "check", lazy_image)


def test_fstrim_shrinks_the_host_file(boot: Boot, serve: Serve, lazy_image: Path) -> None:
    fill = f"{MAKE_FILE_SYSTEM}; dd if=/dev/urandom of=/mnt/filler bs=1M count=48; umount /mnt"
    trim = "mount /dev/vda /mnt; rm /mnt/filler; sync; fstrim -v /mnt; umount /mnt; e2fsck -fn /dev/vda"
    with serve(lazy_image) as daemon:
        disk = vhost_user_disk(daemon.socket_path)
        with boot(fill, disk) as guest:
            guest.finish(60)
        filled = host_bytes(lazy_image)
        with boot(trim, disk) as guest:
            guest.finish(60)
        daemon.stop()
    assert filled - host_bytes(lazy_image) > 40 << 20
    run("qemu-img", "check", lazy_image)


def test_second_front_end_finds_what_the_first_wrote(boot: Boot, serve: Serve, lazy_image: Path) -> None:
    write = f"""
        {MAKE_FILE_SYSTEM}
        dd if=/dev/urandom of=/mnt/data bs=64k count=100
        md5sum /mnt/data > /mnt/sum
        umount /mnt
    """
    with serve(lazy_image) as daemon:
        for job in (write, "mount /dev/vda /mnt; md5sum -c /mnt/sum"):
            with boot(job, vhost_user_disk(daemon.socket_path)) as guest:
                guest.finish(60)
        daemon.stop()


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
            guest.wait_for("written", 60)
            guest.command("system_reset")
            guest.finish(60)
        daemon.stop()
    run("qemu-img", "check", lazy_image)


def test_paused_guest_goes_on_where_it_was(boot: Boot, serve: Serve, lazy_image: Path) -> None:
    job = f"""
        {MAKE_FILE_SYSTEM}
        {FIO} --rw=randwrite --bs=4k --size=16M --rate_iops=1000 --iodepth=16 --eta=always --eta-newline=1
        umount /mnt
    """
    with serve(lazy_image) as daemon:
        with boot(job, vhost_user_disk(daemon.socket_path)) as guest:
            for _pause in range(3):
                guest.wait_for("IOPS", 60)
                guest.command("stop")
                assert guest.command("query-status")["status"] == "paused"
                guest.command("cont")
            guest.finish(60)
        daemon.stop()
    run("qemu-img", "check", lazy_image)


def test_read_only_disk_refuses_writes_and_leaves_the_image_alone(boot: Boot, serve: Serve, tmp_path: Path) -> None:
    raw, image = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    (tmp_path / "content").mkdir()
    (tmp_path / "content" / "greeting").write_text("hello\n")
    run("mke2fs", "-q", "-t", "ext4", "-d", tmp_path / "content", raw, "16M")
    run("qemu-img", "convert", "-O", "qcow2", raw, image)
    before = digest(image)
    job = """
        test $(cat /sys/block/vda/ro) = 1
        ! dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=fsync
        mount -o ro,noload /dev/vda /mnt
        test $(cat /mnt/greeting) = hello
    """
    with serve(image, "--read-only") as daemon:
        with boot(job, vhost_user_disk(daemon.socket_path)) as guest:
            guest.finish(60)
        daemon.stop()
    assert digest(image) == before


def test_guest_sees_what_the_command_line_says(boot: Boot, serve: Serve, lazy_image: Path) -> None:
    job = """
        test $(cat /sys/block/vda/serial) = left-drawer
        test $(cat /sys/block/vda/size) = 2097152
        test "$(cat /sys/block/vda/cache_type)" = "write through"
        test $(cat /sys/block/vda/queue/discard_max_bytes) -gt 0
        test $(cat /sys/block/vda/queue/write_zeroes_max_bytes) -gt 0
    """
    with serve(lazy_image, "--serial=left-drawer", "--cache=writethrough") as daemon:
        with boot(job, vhost_user_disk(daemon.socket_path)) as guest:
            guest.finish(60)
        daemon.stop()


def test_guest_switches_the_write_cache_off(boot: Boot, serve: Serve, lazy_image: Path) -> None:
    job = """
        test "$(cat /sys/block/vda/cache_type)" = "write back"
        echo "write through" > /sys/block/vda/cache_type
        test "$(cat /sys/block/vda/cache_type)" = "write through"
        dd if=/dev/urandom of=/dev/vda bs=4k count=64 oflag=direct
    """
    with serve(lazy_image, "--stats") as daemon:
        with boot(job, vhost_user_disk(daemon.socket_path)) as guest:
            guest.finish(60)
        assert daemon.stop()["syncs"] >= 64


def test_two_disks_do_not_mix(boot: Boot, serve: Serve, tmp_path: Path) -> None:
    images = [make_image(tmp_path / f"{name}.qcow2", "64M", "compat=1.1") for name in ("first", "second")]
    job = """
        dd if=/dev/urandom of=/dev/vda bs=1M count=8 oflag=direct
        dd if=/dev/vda of=/dev/vdb bs=64k count=64 skip=64 seek=64
        cmp -n 4194304 /dev/zero /dev/vdb
        dd if=/dev/vda bs=1M skip=4 count=4 | md5sum > /tmp/first
        dd if=/dev/vdb bs=1M skip=4 count=4 | md5sum > /tmp/second
        cmp /tmp/first /tmp/second
    """
    with serve(images[0]) as first, serve(images[1]) as second:
        with boot(job, [*vhost_user_disk(first.socket_path), *vhost_user_disk(second.socket_path)]) as guest:
            guest.finish(60)
