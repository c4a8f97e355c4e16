"""The channel over a real socket pair: pieces, file descriptors, and peers that misbehave."""

import array
import os
import socket
from collections.abc import Iterator

import pytest

from vhost.channel import Channel, Fds, Hangup
from vhost.message import MAX_FDS, U64, Header, Message, ProtocolViolation, Request

SET_OWNER = Header(Request.SET_OWNER, 1, 0).pack()
SET_FEATURES = Header(Request.SET_FEATURES, 1, 8).pack() + U64(0x140000000).pack()


@pytest.fixture
def pair() -> Iterator[tuple[Channel, socket.socket]]:
    """A channel and its peer; every fd that came through is closed again at the end."""
    before = open_fds()
    ours, peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    channel = Channel(ours)
    yield channel, peer
    channel.close()
    peer.close()
    assert open_fds() == before


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def send(peer: socket.socket, data: bytes, nfds: int = 0) -> None:
    """Send *data* with *nfds* descriptors."""
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(nfds)]
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    peer.sendmsg([data], rights)
    for fd in fds:
        os.close(fd)


def receive(channel: Channel) -> tuple[Message, Fds]:
    received = channel.receive()
    assert received is not None
    return received


def test_message_arrives_whole(pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    send(peer, SET_FEATURES)
    message, _ = receive(channel)
    assert message == Message(Request.SET_FEATURES, 1, U64(0x140000000).pack(), 0)


def test_message_arrives_byte_by_byte(pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    for position in range(len(SET_FEATURES) - 1):
        send(peer, SET_FEATURES[position : position + 1])
        assert channel.receive() is None
    send(peer, SET_FEATURES[-1:])
    assert receive(channel)[0].payload == U64(0x140000000).pack()


def test_two_messages_in_one_packet_stay_two(pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    send(peer, SET_OWNER + SET_FEATURES)
    assert [receive(channel)[0].request for _ in range(2)] == [Request.SET_OWNER, Request.SET_FEATURES]
    assert channel.receive() is None


def test_fds_stay_with_their_message(pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    send(peer, SET_OWNER)
    send(peer, SET_FEATURES, nfds=2)
    send(peer, SET_OWNER, nfds=1)
    counts = []
    for _ in range(3):
        message, fds = receive(channel)
        counts.append((message.nfds, len(fds)))
        fds.close()
    assert counts == [(0, 0), (2, 2), (1, 1)]


def test_taken_fd_survives_and_the_others_are_closed(pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    send(peer, SET_OWNER, nfds=3)
    _, fds = receive(channel)
    taken, rest = fds.take(), list(fds.numbers)
    fds.close()
    os.close(taken)
    for fd in rest:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_received_fds_do_not_leak_into_children(pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    send(peer, SET_OWNER, nfds=1)
    _, fds = receive(channel)
    inheritable = os.get_inheritable(fds.numbers[0])
    fds.close()
    assert not inheritable


def test_fds_for_every_region_of_a_table_are_the_limit(pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    send(peer, SET_OWNER, nfds=MAX_FDS)
    _, fds = receive(channel)
    assert len(fds) == MAX_FDS
    fds.close()


def test_more_fds_than_a_table_has_regions_end_the_connection(pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    send(peer, SET_OWNER, nfds=MAX_FDS + 1)
    with pytest.raises(ProtocolViolation, match="more than 32"):
        channel.receive()


def test_more_fds_in_two_pieces_end_the_connection(pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    send(peer, SET_OWNER[:6], nfds=MAX_FDS)
    send(peer, SET_OWNER[6:], nfds=1)
    with pytest.raises(ProtocolViolation, match="more than 32"):
        channel.receive()


def test_payload_over_the_limit_ends_the_connection_before_it_is_read(pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    send(peer, Header(Request.SET_CONFIG, 1, 1 << 31).pack())
    with pytest.raises(ProtocolViolation, match="2147483648 bytes"):
        channel.receive()


@pytest.mark.parametrize("length", range(len(SET_FEATURES)))
def test_stream_that_ends_within_a_message_is_a_hangup(pair: tuple[Channel, socket.socket], length: int) -> None:
    channel, peer = pair
    send(peer, SET_FEATURES[:length] or SET_OWNER, nfds=1)
    if not length:
        receive(channel)[1].close()
    peer.shutdown(socket.SHUT_WR)
    with pytest.raises(Hangup):
        channel.receive()


def test_reply_carries_exactly_the_flags_qemu_accepts(pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    channel.reply(Request.GET_FEATURES, U64(7).pack())
    assert peer.recv(64) == Header(Request.GET_FEATURES, 0x5, 8).pack() + U64(7).pack()


def test_peer_that_never_reads_its_replies_loses_the_connection(pair: tuple[Channel, socket.socket]) -> None:
    channel, _ = pair
    with pytest.raises(ProtocolViolation, match="does not read"):
        list(map(channel.reply, [Request.GET_FEATURES] * (1 << 20), [U64(7).pack()] * (1 << 20)))
