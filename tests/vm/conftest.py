"""Real guests in QEMU: the machinery is that of the demo, in examples/guest."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from guest import Backend, Failure, Guest, Kernel, debian_kernel, initramfs, installed_program  # noqa: E402

from tests.vm.tool import make_image  # noqa: E402

Boot = Callable[..., Guest]
Serve = Callable[..., Backend]


@contextmanager
def _said_in_one_line() -> Iterator[None]:
    try:
        yield
    except Failure as failure:
        pytest.fail(str(failure), pytrace=False)


@pytest.fixture(scope="session")
def kernel() -> Kernel:
    with _said_in_one_line():
        return debian_kernel(ROOT / ".cache" / "guest", print)


@pytest.fixture(scope="session")
def initrd(kernel: Kernel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with _said_in_one_line():
        return initramfs(kernel, tmp_path_factory.mktemp("guest") / "initrd")


@pytest.fixture
def boot(kernel: Kernel, initrd: Path) -> Boot:
    """Return what makes a guest: boot(job, disks, root=..., cpus=...), a context manager. The job is traced."""

    def start(job: str, disks: list[str], **options: object) -> Guest:
        return Guest(kernel, initrd, f"set -x\n{job}", disks, on_line=print, **options)

    return start


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """Return what starts our daemon: serve(image, *options, name=of the socket), a context manager."""

    def start(image: Path, *options: str, name: str = "") -> Backend:
        socket_path = tmp_path / f"{name or image.stem}.sock"
        program = installed_program("vhost-user-qcow2")
        return Backend([program, f"--socket-path={socket_path}", f"--blk-file={image}", *options], socket_path)

    return start


@pytest.fixture
def lazy_image(tmp_path: Path) -> Path:
    """A fresh, lazy image of 1 GiB."""
    return make_image(tmp_path / "disk.qcow2", "1G", "compat=1.1,lazy_refcounts=on")
