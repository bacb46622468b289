"""A closing connection drops what still comes only up to its deadline, however much that is."""

import socket
import time

import pytest

from anywire import sync
from anywire.contract.address import Address
from anywire.contract.endpoint import RawEndpoint
from anywire.wires._descriptor import SocketBytes
from anywire.wires._framed import FramedEndpoint
from anywire.wires._packet import PacketEndpoint

ADDRESS = Address.parse("unix:@deadline")


def packets(left, right):
    return PacketEndpoint(left, address=ADDRESS), lambda: right.send(b"more")


def frames(left, right):
    theirs = sync.Channel(FramedEndpoint(SocketBytes(right.detach(), address=ADDRESS)))
    return FramedEndpoint(SocketBytes(left, address=ADDRESS)), lambda: theirs.send(b"more")


def stream(left, right):
    return RawEndpoint(SocketBytes(left, address=ADDRESS)), lambda: right.send(b"more")


@pytest.mark.parametrize("make", [packets, frames, stream])
@pytest.mark.filterwarnings("ignore:a channel or stream was never closed")
def test_a_peer_that_never_stops_sending_does_not_keep_close_busy(make):
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET if make is packets else socket.SOCK_STREAM)
    end, send_more = make(left.detach(), right)
    give_up = time.monotonic() + 5
    try:
        send_more()
        steps = end.close_steps(0.1)
        request = next(steps)
        with pytest.raises(StopIteration):
            while True:
                send_more()                              # whenever it waits, there is more
                assert time.monotonic() < give_up
                request = steps.send(list(request.watch))
    finally:
        end.release()
        right.close()
