"""The session and in-flight regions: who makes one, who forgets it, and the write cache noted in it."""

import pytest

from tests.pure.test_session import BIT30, FEATURES, NEED_REPLY, SPLIT, FrontEnd, make
from vhost import effect
from vhost.message import U64, ConfigWindow, Inflight, ProtocolViolation, Request
from vhost.session import PROTOCOL_FEATURES

REGION = Inflight(8192, 4096, 4, 128)
WRITETHROUGH = ConfigWindow(32, 1, 0, b"\0")
WRITEBACK = ConfigWindow(32, 1, 0, b"\1")


@pytest.fixture
def front_end() -> FrontEnd:
    """A front-end that negotiated all but packed rings and gave a region without a note, of another back-end."""
    it = make()
    it.send(Request.SET_PROTOCOL_FEATURES, U64(PROTOCOL_FEATURES))
    it.send(Request.SET_FEATURES, U64(SPLIT | BIT30))
    assert it.send(Request.SET_INFLIGHT_FD, REGION, nfds=1) == [effect.TrackInflight(REGION)]
    return it


def test_region_is_made_as_the_front_end_wants_it(front_end: FrontEnd) -> None:
    wanted = Inflight(0, 0, 4, 1024)
    assert front_end.send(Request.GET_INFLIGHT_FD, wanted) == [effect.ShareInflight(4, 1024, packed=False, wce=True)]


def test_new_region_carries_the_wce_of_now(front_end: FrontEnd) -> None:
    front_end.send(Request.SET_CONFIG, WRITETHROUGH)
    assert front_end.send(Request.GET_INFLIGHT_FD, REGION) == [effect.ShareInflight(4, 128, packed=False, wce=False)]


@pytest.mark.parametrize(("queues", "size"), [(0, 128), (257, 128), (65535, 1)])
@pytest.mark.parametrize("request_number", [Request.GET_INFLIGHT_FD, Request.SET_INFLIGHT_FD])
def test_impossible_region_ends_the_connection(
    front_end: FrontEnd, request_number: Request, queues: int, size: int
) -> None:
    with pytest.raises(ProtocolViolation, match="in-flight region"):
        front_end.send(request_number, Inflight(8192, 0, queues, size), nfds=request_number == Request.SET_INFLIGHT_FD)


def test_running_rings_stop_before_the_region_changes(front_end: FrontEnd) -> None:
    front_end.configure(1)
    front_end.kick(1)
    done = front_end.send(Request.SET_INFLIGHT_FD, REGION, nfds=1)
    assert done == [effect.StopQueue(1), effect.LetGoOfBackend(), effect.TrackInflight(REGION)]


@pytest.mark.parametrize("noted", [False, True])
def test_noted_wce_is_taken_over_and_shown(front_end: FrontEnd, noted: bool) -> None:
    front_end.noted = noted
    done = front_end.send(Request.SET_INFLIGHT_FD, REGION, nfds=1)
    assert done == [effect.TrackInflight(REGION), effect.SetWriteCache(writeback=noted)]
    assert front_end.session.wce == noted


def test_note_stands_before_writethrough_is_acknowledged(front_end: FrontEnd) -> None:
    assert front_end.send(Request.SET_CONFIG, WRITETHROUGH, flags=NEED_REPLY) == [
        effect.SetWriteCache(writeback=False),
        effect.Flush(),
        effect.NoteWriteCache(False),
        effect.Reply(Request.SET_CONFIG, U64(0).pack()),
    ]


def test_note_waits_until_writeback_is_acknowledged(front_end: FrontEnd) -> None:
    front_end.send(Request.SET_CONFIG, WRITETHROUGH)
    assert front_end.send(Request.SET_CONFIG, WRITEBACK, flags=NEED_REPLY) == [
        effect.SetWriteCache(writeback=True),
        effect.Reply(Request.SET_CONFIG, U64(0).pack()),
        effect.NoteWriteCache(True),
    ]


def test_switch_that_failed_is_not_noted(front_end: FrontEnd) -> None:
    front_end.fail = effect.Flush
    done = front_end.send(Request.SET_CONFIG, WRITETHROUGH, flags=NEED_REPLY)
    assert effect.NoteWriteCache(False) not in done
    assert front_end.session.wce


@pytest.mark.parametrize("request_number", [Request.RESET_DEVICE, Request.SET_OWNER])
def test_reset_forgets_the_region(front_end: FrontEnd, request_number: Request) -> None:
    assert effect.ForgetInflight() in front_end.send(request_number)
    assert effect.ForgetInflight() not in front_end.send(request_number)


def test_status_of_zero_keeps_the_region(front_end: FrontEnd) -> None:
    assert effect.ForgetInflight() not in front_end.send(Request.SET_STATUS, U64(0))


@pytest.mark.parametrize(("queues", "size"), [(5, 128), (4, 0), (4, 65535), (256, 1)])
def test_what_a_front_end_wants_to_track_is_no_promise_about_its_rings(
    front_end: FrontEnd, queues: int, size: int
) -> None:
    wanted = Inflight(8192, 0, queues, size)
    assert front_end.send(Request.GET_INFLIGHT_FD, wanted) == [
        effect.ShareInflight(queues, size, packed=False, wce=True)
    ]
    assert front_end.send(Request.SET_INFLIGHT_FD, wanted, nfds=1) == [effect.TrackInflight(wanted)]


def test_region_is_for_rings_of_the_negotiated_format(front_end: FrontEnd) -> None:
    front_end.send(Request.SET_FEATURES, U64(FEATURES | BIT30))
    assert front_end.send(Request.SET_INFLIGHT_FD, REGION, nfds=1) == [effect.TrackInflight(REGION)]
    assert front_end.send(Request.GET_INFLIGHT_FD, REGION) == [effect.ShareInflight(4, 128, packed=True, wce=True)]
