"""When a receiver confirms: in the header of its next message, or, when it comes back for more without having sent one,
in a frame of its own after 256 messages or 1 MiB. The peer is a bare socket that speaks the frames by hand."""

import select
import socket
import struct

import pytest

from anywire.contract.blocking import Channel
from anywire.contract.errors import TimedOut
from anywire.framing.codec import encode
from anywire.wires._descriptor import SocketBytes
from anywire.wires._framed import FramedEndpoint

CONFIRM = 0xFFFFFFFC


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
    theirs.settimeout(10)
    channel = Channel(FramedEndpoint(SocketBytes(ours.detach(), address="test:")))
    with theirs:
        yield channel, theirs
        channel.abort()


def header(theirs):
    return struct.unpack("<II", theirs.recv(8, socket.MSG_WAITALL))


def nothing_came(theirs):
    return not select.select([theirs], [], [], 0)[0]


def test_an_answer_to_a_large_message_confirms_it_without_a_frame_of_its_own(ends):
    channel, theirs = ends
    buffer = bytearray(1 << 20)
    for receive in (channel.recv, lambda: channel.recv_into(buffer)):
        theirs.sendall(encode(bytes(1 << 20)))
        receive()
        assert nothing_came(theirs)
        channel.send(b"ok")
        assert header(theirs) == (2, 1)
        assert theirs.recv(2) == b"ok"


@pytest.mark.parametrize(("message", "count"), [(b"", 256), (bytes(1 << 20), 1)])
def test_a_receiver_that_comes_back_for_more_confirms(ends, message, count):
    channel, theirs = ends
    for times in (1, 2):
        theirs.sendall(encode(message) * count)
        for _ in range(count):
            channel.recv()
        assert nothing_came(theirs), times
        with pytest.raises(TimedOut):
            channel.recv(timeout=0)
        assert header(theirs) == (CONFIRM, count)
        assert nothing_came(theirs)


def test_what_can_not_be_confirmed_now_is_confirmed_by_a_later_header(ends):
    channel, theirs = ends
    while channel.try_send(bytes(50_000)):  # until the peer's buffer is full
        pass
    sent = channel.unconfirmed
    theirs.sendall(encode(b"") * 600)
    for _ in range(600):
        channel.recv()
    confirmed = 0
    for number in range(sent + 1):
        if number == sent - 1:  # the one that went only in part: now there is room for its rest
            channel.send(b"now")
        size, confirms = header(theirs)
        assert size in (50_000, 3)
        theirs.recv(size, socket.MSG_WAITALL)
        confirmed += confirms
    assert confirmed == confirms == 600
