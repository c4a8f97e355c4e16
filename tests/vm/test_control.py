"""The control socket while a guest works: the daemon's figures are fio's."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from guest import installed_program, vhost_user_disk

from tests.patience import TIMEOUT
from tests.vm.conftest import Boot, Serve

# The host grows the disk once it has noted the counters, to which firmware and kernel have added by then.
JOB = """
    echo waiting
    until test $(cat /sys/block/vda/size) = 4194304; do sleep 0.1; done
    fio --name=job --filename=/dev/vda --ioengine=libaio --direct=1 --rw=randrw --bs=4k --size=64M --io_size=8M \
        --iodepth=16 --output-format=json --output=/tmp/log
    grep -E '"(io_bytes|total_ios)"' /tmp/log | tr -d '",:\\n' > /tmp/totals
    echo totals $(cat /tmp/totals)
"""
COUNTERS = ("read_bytes", "reads", "written_bytes", "writes")


def ctl(control: Path, *arguments: str) -> Any:
    command = [installed_program("vhost-user-qcow2"), "ctl", f"--control={control}", *arguments]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.sample(8, of="guests")
def test_statistics_add_up_to_what_fio_says(boot: Boot, serve: Serve, lazy_image: Path, tmp_path: Path) -> None:
    control = tmp_path / "control"
    with serve(lazy_image, f"--control={control}") as daemon:
        with boot(JOB, vhost_user_disk(daemon.socket_path)) as guest:
            guest.wait_for("waiting", TIMEOUT)
            before = ctl(control, "stats")["counters"]
            ctl(control, "resize", "2G")
            guest.wait_for("+ fio ", TIMEOUT)
            during = [before["requests"]]
            while len(during) < 5 or during[-1] == before["requests"]:
                during.append(ctl(control, "stats")["counters"]["requests"])
            totals = guest.wait_for("echo totals ", TIMEOUT).split()
            stats = ctl(control, "stats")
            guest.finish(TIMEOUT)
        daemon.stop()
    counters = stats["counters"]
    assert [*during, counters["requests"]] == sorted([*during, counters["requests"]])
    assert [counters[name] - before[name] for name in COUNTERS] == _of_fio(totals)
    answered = [queue["requests"] for queue in stats["queues"].values()]
    assert sum(answered) == counters["requests"]
    assert answered == [queue["service"]["count"] for queue in stats["queues"].values()]


def _of_fio(totals: list[str]) -> list[int]:
    """Bytes and I/Os of reads, then of writes: the first four io_bytes and total_ios of fio's JSON."""
    return [int(totals[i + 1]) for i, word in enumerate(totals) if word in ("io_bytes", "total_ios")][:4]
