"""What `import qcow2` gives: a disk, and a file object on it."""
