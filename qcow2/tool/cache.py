"""The cache modes of qemu-img's command lines."""

CACHE_MODES = ("none", "writeback", "writethrough", "directsync", "unsafe")
CACHE_IS_THE_HOSTS = "accepted; the host's page cache is used"
UNSAFE = "unsafe"  # no write waits for the disk, nor does the end
