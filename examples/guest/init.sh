#!/bin/busybox sh
# The guest's first program, both in the initramfs and in a root file system on a disk.
# Lines that start with "@@" are for the host; see machine.py.

export PATH=/sbin:/bin LD_LIBRARY_PATH=/lib
job=/sys/firmware/qemu_fw_cfg/by_name/opt/guest/job/raw

# report NAME FILE: hand a file to the host. A trace of the job must not mix with the file.
report() {
    echo "@@ file $1"
    cat "$2"
    echo
    echo "@@ end"
} 2> /dev/null

if [ ! -e /proc/self ]; then
    mount -t proc proc /proc
    mount -t sysfs sys /sys
    mount -t devtmpfs dev /dev
    for module in /modules/*; do
        insmod "$module" || echo "@@ broken cannot insert $module"
    done
    root=$(sed -n 's/.*guest.root=\([^ ]*\).*/\1/p' /proc/cmdline)
    if [ -n "$root" ]; then
        mount -t ext4 "$root" /newroot || echo "@@ broken cannot mount $root"
        for directory in proc sys dev; do
            mount --move /$directory /newroot/$directory
        done
        exec switch_root /newroot /init
        echo "@@ broken cannot switch to $root"
    fi
fi

echo "@@ begin $(cut -d' ' -f1 /proc/uptime)"
(set -eu; . $job)
status=$?
sync
if grep -q guest.root= /proc/cmdline; then
    mount -o remount,ro / || echo "@@ broken cannot make the root file system read-only"
fi
echo "@@ exit $status"
poweroff -f
