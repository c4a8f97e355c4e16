"""The daemon is killed with requests in flight; the next one goes on with them, and the guest notices a pause."""

from pathlib import Path

import pytest

import qcow2
from tests.builder import Recipe, build
from tests.builder.record import LAZY_REFCOUNTS
from tests.frontend import F_CONFIG_WCE, F_DISCARD, F_FLUSH, F_WRITE_ZEROES, FrontEnd, Queue
from tests.load import Load
from tests.oracle import assert_clean
from tests.packedqueue import PackedQueue
from tests.program import Daemon

SIZE = 16 << 20
BLOCK = 4096
NBLOCKS = SIZE // BLOCK
LIVES = 4


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return build(Recipe(size=SIZE, compatible=LAZY_REFCOUNTS), tmp_path / "a").path


@pytest.mark.sample(3)
@pytest.mark.parametrize("queues", [1, 4])
@pytest.mark.parametrize("cache", ["writeback", "writethrough"])
@pytest.mark.parametrize("queue_type", [Queue, PackedQueue])
def test_load_goes_on_over_the_death_of_the_daemon(
    image: Path, queue_type: type[Queue], cache: str, queues: int
) -> None:
    """A completion too many or too few, or one that lies, would show: `Load` knows each request by name."""
    with FrontEnd(image, queues=queues, inflight=True, queue_type=queue_type, connect=False) as guest:
        load = Load(guest, NBLOCKS, seed=queues, zeroes=True, depth=64 // queues)
        for _ in range(LIVES):
            with Daemon(image, f"--cache={cache}") as daemon:
                guest.connect(daemon.socket_path)
                load.run(300)
                daemon.kill()
        with Daemon(image, f"--cache={cache}") as daemon:
            guest.connect(daemon.socket_path)
            load.drain()
            assert load.completed > LIVES * 300
            assert not load.in_flight
            daemon.stop()
    with qcow2.open(str(image)) as disk:
        load.verify(disk)
    assert_clean(image)


@pytest.mark.parametrize("queue_type", [Queue, PackedQueue])
def test_clean_restart_leaves_nothing_in_flight(image: Path, queue_type: type[Queue]) -> None:
    with FrontEnd(image, inflight=True, queue_type=queue_type, connect=False) as guest:
        load = Load(guest, NBLOCKS)
        for _ in range(3):
            with Daemon(image) as daemon:
                guest.connect(daemon.socket_path)
                load.run(200)
                daemon.stop()
        with Daemon(image) as daemon:
            guest.connect(daemon.socket_path)
            load.drain()
            daemon.stop()
    with qcow2.open(str(image)) as disk:
        load.verify(disk)


@pytest.mark.parametrize("then", [False, True])
def test_write_cache_that_the_guest_chose_outlives_the_daemon(image: Path, then: bool) -> None:
    features = F_FLUSH | F_CONFIG_WCE | F_DISCARD | F_WRITE_ZEROES
    with FrontEnd(image, features=features, inflight=True, connect=False) as guest:
        with Daemon(image) as daemon:
            guest.connect(daemon.socket_path)
            guest.set_writeback(False)
            guest.set_writeback(then)
            assert guest.read_config()[32] == then  # noted by then: switching on is noted after its answer
            daemon.kill()
        with Daemon(image) as daemon:
            guest.connect(daemon.socket_path)
            assert guest.read_config()[32] == then


def test_write_cache_of_a_region_without_a_note_is_the_configured_one(image: Path) -> None:
    """What another back-end made ends where the rings' parts end."""
    features = F_FLUSH | F_CONFIG_WCE
    with FrontEnd(image, features=features, inflight=True, connect=False) as guest:
        with Daemon(image) as daemon:
            guest.connect(daemon.socket_path)
            guest.set_writeback(False)
            daemon.kill()
        nbytes = int.from_bytes(guest.inflight_payload[:8], "little") - 64
        guest.inflight_payload = nbytes.to_bytes(8, "little") + guest.inflight_payload[8:]
        with Daemon(image) as daemon:
            guest.connect(daemon.socket_path)
            assert guest.read_config()[32] == 1
            guest.set_writeback(False)
            assert guest.read_config()[32] == 0
