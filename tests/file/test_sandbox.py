"""What a daemon in its sandbox can still do, and what it cannot."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.file.test_control import ask
from tests.frontend import BackendGone, FrontEnd
from tests.oracle import assert_clean
from tests.program import TIMEOUT, Daemon, complaints, qcow2_tool_ok

MIB = 1 << 20


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.raw"
    path.write_bytes(b"b" * MIB)
    return path


@pytest.fixture
def image(tmp_path: Path, base: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qcow2_tool_ok("create", "-b", base, "-F", "raw", path, "4M")
    return path


@pytest.fixture
def daemon(request: pytest.FixtureRequest, image: Path) -> Iterator[Daemon]:
    with Daemon(image, "--sandbox", *getattr(request, "param", ())) as daemon:
        yield daemon


def use(daemon: Daemon, fill: bytes) -> None:
    with FrontEnd(daemon.socket_path) as front_end:
        front_end.write(4096, fill * 512)
        front_end.flush()
        assert front_end.read(4096, 1024) == fill * 512 + b"b" * 512


@pytest.mark.parametrize("daemon", [(), ("--cache=none",), ("--aio=threads",)], indirect=True)
def test_image_is_served_let_go_taken_again_and_closed(daemon: Daemon, image: Path) -> None:
    use(daemon, b"1")
    use(daemon, b"2")  # between the two nobody held the image: it was opened anew, backing file and link log too
    daemon.process.send_signal(signal.SIGTERM)
    _, said = daemon.process.communicate(timeout=TIMEOUT)
    assert (daemon.process.returncode, complaints(said)) == (0, "")
    assert_clean(image)


def test_every_thread_has_lost_privileges_and_capabilities(daemon: Daemon) -> None:
    use(daemon, b"1")
    for task in Path(f"/proc/{daemon.process.pid}/task").iterdir():
        lines = (line.split(":", 1) for line in (task / "status").read_text().splitlines())
        status = {key: value.strip() for key, value in lines}
        assert status["NoNewPrivs"] == "1"
        for kind in ("CapEff", "CapPrm", "CapInh"):
            assert int(status[kind], 16) & ~(1 << 1) == 0  # CAP_DAC_OVERRIDE, root's
        assert int(status["CapBnd"], 16) == 0 or os.geteuid() != 0


@pytest.mark.parametrize("which", ["image", "base"])
def test_another_file_cannot_be_opened(daemon: Daemon, image: Path, base: Path, which: str) -> None:
    path = {"image": image, "base": base}[which]
    use(daemon, b"1")
    shutil.copy(path, f"{path}.other")
    os.replace(f"{path}.other", path)  # the same name and content, but a file that the sandbox knows nothing of
    with pytest.raises(BackendGone):
        use(daemon, b"2")
    daemon.process.send_signal(signal.SIGTERM)
    _, said = daemon.process.communicate(timeout=TIMEOUT)
    assert daemon.process.returncode == 0
    assert "Permission denied" in said


def test_without_the_sandbox_it_can(image: Path) -> None:
    with Daemon(image) as daemon:
        use(daemon, b"1")
        shutil.copy(image, f"{image}.other")
        os.replace(f"{image}.other", image)
        use(daemon, b"2")
        daemon.stop()


def test_disk_grows_in_the_sandbox(tmp_path: Path, image: Path) -> None:
    control = tmp_path / "control"
    with Daemon(image, "--sandbox", f"--control={control}") as daemon:
        with FrontEnd(daemon.socket_path) as front_end:
            assert ask(control, "resize", "8M") == {"size": 8 * MIB}
            front_end.write(8 * MIB - 512, b"z" * 512)
        daemon.stop()
        assert not control.exists()  # it may remove what is its own
    assert_clean(image)
