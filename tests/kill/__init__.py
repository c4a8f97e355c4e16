"""Killing the daemon for real: a guest that remembers, SIGKILL at drawn moments, every acknowledged write read back."""
