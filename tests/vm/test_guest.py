"""The guest machinery itself tells what went wrong."""

from pathlib import Path

import pytest
from guest import Guest, GuestFailure, Kernel

from tests.patience import TIMEOUT
from tests.vm.conftest import Boot


@pytest.mark.sample(8, of="guests")
def test_failing_job_is_named_with_the_console(boot: Boot) -> None:
    with boot("echo about to fail; false; echo not reached", []) as guest:
        with pytest.raises(GuestFailure, match=r"failed with status 1\n(.*\n)*  \| about to fail"):
            guest.finish(TIMEOUT)


def test_kernel_panic_ends_the_wait(kernel: Kernel, tmp_path: Path) -> None:
    (tmp_path / "nothing").write_bytes(bytes(512))  # to start from
    with Guest(kernel, tmp_path / "nothing", "true") as guest:
        with pytest.raises(GuestFailure, match=r"gave up: .*Kernel panic"):
            guest.finish(TIMEOUT)


def test_guest_that_hangs_is_stopped(boot: Boot) -> None:
    with boot("true", ["-S"]) as guest:  # it waits for a word of ours before its first instruction
        with pytest.raises(GuestFailure, match="not done after 1 s"):
            guest.finish(1)


def test_unknown_device_is_reported_by_qemu(boot: Boot) -> None:
    with pytest.raises(GuestFailure, match="no-such-device"):
        boot("true", ["-device", "no-such-device"]).__enter__()
