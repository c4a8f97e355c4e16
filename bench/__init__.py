"""Measure the daemon against qemu-storage-daemon and the disk itself; never imported by the product."""
