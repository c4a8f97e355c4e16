"""The guest machinery itself tells what went wrong."""

import pytest
from guest import GuestFailure

from tests.vm.conftest import Boot


def test_failing_job_is_named_with_the_console(boot: Boot) -> None:
    with boot("echo about to fail; false; echo not reached", []) as guest:
        with pytest.raises(GuestFailure, match=r"failed with status 1\n(.*\n)*  \| about to fail"):
            guest.finish(60)


def test_kernel_panic_ends_the_wait(boot: Boot) -> None:
    with boot("echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger", []) as guest:
        with pytest.raises(GuestFailure, match=r"gave up: .*Kernel panic"):
            guest.finish(60)


def test_guest_that_hangs_is_stopped(boot: Boot) -> None:
    with boot("echo waiting; sleep 1000", []) as guest:
        guest.wait_for("waiting", 60)
        with pytest.raises(GuestFailure, match="not done after 1 s"):
            guest.finish(1)


def test_unknown_device_is_reported_by_qemu(boot: Boot) -> None:
    with pytest.raises(GuestFailure, match="no-such-device"):
        boot("true", ["-device", "no-such-device"]).__enter__()
