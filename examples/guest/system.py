"""What the guest runs: an initramfs with busybox, chosen programs of this host and the kernel's modules."""

import subprocess
from collections.abc import Iterable
from pathlib import Path

from guest.elf import insertion_order, loaded_with, module_content, needs
from guest.kernel import Kernel
from guest.program import MissingProgram, find_program
from guest.tree import Tree, write_cpio

INIT = Path(__file__).with_name("init.sh")
MODULES = ("virtio_pci", "virtio_blk", "ext4", "qemu_fw_cfg")
PROGRAMS = {"mkfs.ext4": "e2fsprogs", "e2fsck": "e2fsprogs", "fio": "fio"}
MOUNT_POINTS = ("proc", "sys", "dev", "tmp", "run", "mnt", "newroot")


def initramfs(kernel: Kernel, path: Path, more: Iterable[Path] = ()) -> Path:
    """Write the guest's first file system to *path* and return it; in it are *more* programs.

    Most of its 85 MiB are the 60 libraries that Debian's fio loads; they cost a boot about 0.6 s.
    """
    tree = root_tree()
    _add_programs(tree, [*(find_program(name, package) for name, package in PROGRAMS.items()), *more])
    _add_modules(tree, insertion_order(kernel.modules, MODULES))
    with path.open("wb") as out:
        write_cpio(tree, out)
    return path


def root_tree() -> Tree:
    """Return a file system that boots by itself: static busybox, every applet, and the init program."""
    tree = Tree()
    for name in MOUNT_POINTS:
        tree.add_directory(name)
    busybox = find_program("busybox", "busybox-static")
    if needs(busybox).interpreter is not None:
        raise MissingProgram(f"{busybox} is not static: install the package busybox-static")
    tree.add_file("bin/busybox", busybox)
    listed = subprocess.run([busybox, "--list"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    for applet in listed.stdout.split():
        if applet != "busybox":
            tree.add_link(f"bin/{applet}", "busybox")
    tree.add_file("init", INIT)
    return tree


def _add_programs(tree: Tree, programs: Iterable[Path]) -> None:
    """Add *programs* to /sbin and what they load, flat, to /lib, where init points the loader."""
    programs = list(programs)
    for program in programs:
        tree.add_file(f"sbin/{program.name}", program)
    for name, path in loaded_with(programs).items():
        tree.add_file(name.lstrip("/") if "/" in name else f"lib/{name}", path)


def _add_modules(tree: Tree, ordered: Iterable[Path]) -> None:
    """Add modules under names that sort in insertion order."""
    for index, path in enumerate(ordered):
        tree.add_file(f"modules/{index:02}-{path.name.removesuffix('.xz')}", module_content(path), 0o644)
