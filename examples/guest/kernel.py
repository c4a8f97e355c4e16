"""Debian's cloud kernel, downloaded and unpacked into a cache directory, never installed."""

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from guest.program import Failure

METAPACKAGE = "linux-image-cloud-amd64"


class KernelUnavailable(Failure):
    """No kernel in the cache and none to be had; the message says what is missing."""


@dataclass(frozen=True)
class Kernel:
    """A bootable image and the modules that belong to it."""

    image: Path
    modules: Path

    @property
    def release(self) -> str:
        return self.modules.name


def debian_kernel(cache: Path, progress: Callable[[str], None] = lambda line: None) -> Kernel:
    """Return the kernel unpacked below *cache*, downloading it when there is none yet.

    Safe to call from several processes at once: the first one downloads, the others wait for it.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / "lock"):
        present = [path for path in cache.glob("linux-image-*") if path.is_dir()]
        return _kernel_in(max(present, key=lambda path: path.stat().st_mtime) if present else _fetch(cache, progress))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _kernel_in(unpacked: Path) -> Kernel:
    images = list((unpacked / "boot").glob("vmlinuz-*"))
    modules = list((unpacked / "lib" / "modules").glob("*"))
    if len(images) != 1 or len(modules) != 1:
        raise KernelUnavailable(f"{unpacked} does not hold exactly one kernel; remove it to download it again")
    return Kernel(images[0], modules[0])


def _fetch(cache: Path, progress: Callable[[str], None]) -> Path:
    package = _versioned_package()
    progress(f"downloading {package} (Debian's kernel for the guest, kept in {cache})")
    with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as name:
        scratch = Path(name)
        # As root, apt drops to the user _apt, who must be able to write here.
        scratch.chmod(0o777)
        _run("apt-get", "-q", "download", package, cwd=scratch)
        archive = next(scratch.glob("*.deb"))
        unpacked = scratch / archive.stem
        _run("dpkg-deb", "-x", str(archive), str(unpacked), cwd=scratch)
        shutil.rmtree(unpacked / "usr", ignore_errors=True)
        return Path(shutil.move(os.fspath(unpacked), cache / unpacked.name))


def _versioned_package() -> str:
    """Name the package that *METAPACKAGE* depends on, such as linux-image-6.1.0-18-cloud-amd64."""
    record = _run("apt-cache", "show", "--no-all-versions", METAPACKAGE, cwd=Path.cwd())
    match = re.search(r"^Depends:.*?(linux-image-[0-9][^ ,]*)", record, re.MULTILINE)
    if match is None:
        raise KernelUnavailable(f"apt knows no kernel behind {METAPACKAGE}")
    return match[1]


def _run(*command: str, cwd: Path) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise KernelUnavailable(f"{command[0]} not found: the guest's kernel comes from Debian's archive") from None
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise KernelUnavailable(f"{' '.join(command)} failed: {reason}")
    return done.stdout
