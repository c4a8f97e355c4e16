"""Who performs operations, and what an operation is: files, memory, locks, the boot of the host."""
