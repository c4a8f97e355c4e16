"""Law 10 with a real second process: who may use an image while another does, we or QEMU."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import qcow2
from qcow2.lock import ImageLocked
from tests.builder import Recipe, build
from tests.crash.explorer import Violation
from tests.oracle import held_by_qemu, qemu_img


def _keeps_out_qemu(path: Path, *, writable: bool) -> None:
    """QEMU would write what we have open."""
    with qcow2.open(str(path), writable=writable):
        done = qemu_img("resize", "-f", "qcow2", path, "2M", check=False)
    if done.returncode == 0 or "lock" not in done.stderr:
        raise Violation(f"qemu-img resize gets in while we hold the image: exit {done.returncode} {done.stderr}")


def _keeps_out_ourselves(path: Path) -> None:
    """A second open of ours beside a writer."""
    with qcow2.open(str(path), writable=True):
        _require_refusal(path, "a writer of ours")


def _respects_qemu(path: Path, *, read_only: bool) -> None:
    """We would write what QEMU has open."""
    with held_by_qemu(path, read_only=read_only):
        _require_refusal(path, "QEMU")


def _require_refusal(path: Path, holder: str) -> None:
    with ExitStack() as stack:
        try:
            stack.enter_context(qcow2.open(str(path), writable=True))
        except ImageLocked:
            return
        raise Violation(f"we get in while {holder} holds the image")


CASES: dict[str, Callable[[Path], None]] = {
    "qemu-beside-our-writer": lambda path: _keeps_out_qemu(path, writable=True),
    "qemu-beside-our-reader": lambda path: _keeps_out_qemu(path, writable=False),
    "we-beside-our-writer": _keeps_out_ourselves,
    "we-beside-a-writing-qemu": lambda path: _respects_qemu(path, read_only=False),
    "we-beside-a-reading-qemu": lambda path: _respects_qemu(path, read_only=True),
}


def meet(case: str) -> int:
    """Let the two of *case* meet on a new image; how many meetings that were.

    Raises: Violation if the second one gets in.
    """
    with TemporaryDirectory() as directory:
        CASES[case](build(Recipe(size=1 << 20), Path(directory) / "image").path)
    return 1
