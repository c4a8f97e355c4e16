"""The open qcow2 image: map, read, write, zero, allocate, link, commit, snapshots. Its coroutines yield operations."""
