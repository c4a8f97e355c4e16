"""A copy that is whole stays, whether it can get its name or not."""

from collections.abc import Callable
from pathlib import Path

import pytest

import qcow2
from tests.file.test_jobs import control, start
from tests.frontend import FrontEnd
from tests.oracle import assert_clean
from tests.realfault.death import linkless
from vhost.client import Control, Job

MIB = 1 << 20
BLOCK = 4096


def back_up(client: Control, meanwhile: Callable[[], None]) -> Job:
    job = client.backup("copy", rate=1).job
    meanwhile()
    client.set_rate(job, 0)
    return client.wait(job)


def leave_mirror(client: Control, meanwhile: Callable[[], None]) -> Job:
    job = client.mirror("copy").job
    assert client.wait(job).state == "ready"
    meanwhile()
    client.cancel(job)
    return client.wait(job)


COPIES = [(back_up, "backup"), (leave_mirror, "mirror")]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    qcow2.create(path, size=MIB)
    with qcow2.open(path, "r+") as disk:
        disk.write(0, b"d" * BLOCK)
    return path


def assert_copied(path: Path) -> None:
    assert_clean(path)
    with qcow2.open(path) as disk:
        assert disk.read(0, BLOCK) == b"d" * BLOCK


@pytest.mark.parametrize(("copy", "what"), COPIES, ids=["backup", "mirror"])
def test_name_that_was_taken_meanwhile(image: Path, copy: Callable[..., Job], what: str) -> None:
    taken, made = image.with_name("copy"), image.with_name(f".copy.{what}")
    with start(image) as daemon, FrontEnd(daemon.socket_path), control(image) as client:
        ended = copy(client, lambda: taken.write_bytes(b"of somebody"))
        assert ended.state == "failed"
        assert str(made) in ended.error
        assert "whole, and stays" in ended.error
        assert "File exists" in ended.error
        daemon.stop()
    assert taken.read_bytes() == b"of somebody"
    assert_copied(made)


@pytest.mark.parametrize("mode", ["--aio=threads", "--sandbox"])
@pytest.mark.parametrize(("copy", "what"), COPIES, ids=["backup", "mirror"])
def test_file_that_can_have_one_name_only(image: Path, copy: Callable[..., Job], what: str, mode: str) -> None:
    with start(image, mode, under=linkless()) as daemon, FrontEnd(daemon.socket_path), control(image) as client:
        ended = copy(client, lambda: None)
        assert ended.state in ("completed", "cancelled"), ended
        daemon.stop()
    assert_copied(image.with_name("copy"))
    assert not image.with_name(f".copy.{what}").exists()
