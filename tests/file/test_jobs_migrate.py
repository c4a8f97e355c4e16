"""A job whose guest migrates: it waits in the daemon that the guest has left, and goes on when it is back.

Another daemon has served the disk meanwhile, and its chain may be another one.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.file.test_jobs import BLOCK, MIB, SHOWN, chain, content, control, start, top
from tests.file.test_mirror import until
from tests.frontend import FrontEnd
from tests.oracle import assert_clean
from tests.program import Daemon
from vhost import Control
from vhost.client import Job

__all__ = ["chain", "top"]  # fixtures

WORK: dict[str, Callable[[Control], Job]] = {
    "stream": lambda client: client.stream(rate=1),
    "commit": lambda client: client.commit(rate=1),
    "commit all": lambda client: client.commit(active=True, rate=1),
    "mirror": lambda client: client.mirror("copy", rate=1),
}
MEANWHILE: dict[str, Callable[[Control], object]] = {
    "nothing": lambda client: None,
    "a snapshot": lambda client: client.snapshot("frozen"),
    "a stream": lambda client: client.wait(client.stream().job),
}


@pytest.mark.parametrize("meanwhile", MEANWHILE)
@pytest.mark.parametrize("work", WORK)
def test_job_goes_on_where_its_guest_comes_back(top: Path, work: str, meanwhile: str) -> None:
    there = f"{top}.there"
    with start(top) as first, Daemon(top, f"--control={there}", "--incoming") as second:
        with FrontEnd(first.socket_path) as guest, control(top) as client:
            job = WORK[work](client).job
            guest.write(0, b"1" * BLOCK)
            guest.stop_queue()
            until(client, job, "waiting")
            client.set_rate(job, 0)
        with FrontEnd(second.socket_path) as guest, Control(there) as other:
            guest.write(MIB, b"2" * BLOCK)
            MEANWHILE[meanwhile](other)
            guest.write(2 * MIB, b"3" * BLOCK)
            guest.stop_queue()
        with FrontEnd(first.socket_path) as guest, control(top) as client:
            guest.write(3 * MIB, b"4" * BLOCK)
            ended = client.wait(job)
            if ended.state == "ready":
                client.complete(job)
                ended = client.wait(job)
        first.stop()
        second.stop()
    is_needless = meanwhile == "a stream" and work != "mirror"
    assert (ended.state, "no backing file" in ended.error) == ("failed" if is_needless else "completed", is_needless)
    wanted = bytearray(SHOWN)
    for number in range(4):
        wanted[number * MIB : number * MIB + BLOCK] = b"%d" % (number + 1) * BLOCK
    assert content(top) == wanted
    assert_clean(top)
