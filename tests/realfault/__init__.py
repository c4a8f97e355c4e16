"""The real daemon on real files, on a host whose system calls fail: law 7, enumerated."""
