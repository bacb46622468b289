"""A confirmation is written by the receiver's thread. Over a byte endpoint that gives up the GIL (TLS, or one in
Python) a sender must not come in between: not even when the kernel took only a part of the confirmation."""

import socket
import threading

from anywire import sync
from anywire.contract.address import Address
from anywire.contract.endpoint import ByteEndpoint
from anywire.wires._descriptor import SocketBytes
from anywire.wires._framed import FramedEndpoint

CONFIRMED_AFTER = 256         # messages


class PythonBytes(ByteEndpoint):
    """A socket's bytes, by a wire written in Python; a write on the thread `slow` stops in the middle."""

    def __init__(self, sock):
        self.sock = sock
        self.read_fd = self.write_fd = sock.fileno()
        self.address = Address.parse("tcp://127.0.0.1:1")
        self.slow = None
        self.entered, self.go_on = threading.Event(), threading.Event()

    def do_read_into(self, buffer):
        try:
            return self.sock.recv_into(buffer)
        except BlockingIOError:
            return None

    def do_write(self, data):
        if threading.current_thread() is self.slow:
            self.slow = None
            self.entered.set()
            self.go_on.wait(20)
            return self.sock.send(data[:1])
        try:
            return self.sock.send(data)
        except BlockingIOError:
            return None

    def close_now(self):
        self.sock.close()


def test_a_sender_waits_for_the_confirmation_of_the_receivers_thread():
    left, right = socket.socketpair()
    left.setblocking(False)
    below = PythonBytes(left)
    ours = sync.Channel(FramedEndpoint(below))
    theirs = sync.Channel(FramedEndpoint(SocketBytes(right.detach(), address=below.address)))
    try:
        theirs.send_many([b"x"] * (CONFIRMED_AFTER + 1))
        receiver = threading.Thread(target=lambda: [ours.recv(timeout=20) for _ in range(CONFIRMED_AFTER + 2)])
        below.slow = receiver
        receiver.start()
        assert below.entered.wait(20)                     # the receiver is inside the write of its confirmation
        assert not ours.try_send(b"in between")
        sender = threading.Thread(target=lambda: ours.send_many([b"first", b"second"]))
        sender.start()
        below.go_on.set()
        sender.join(20)
        assert [theirs.recv(timeout=20) for _ in range(2)] == [b"first", b"second"]
        theirs.send(b"last")
        receiver.join(20)
        assert not receiver.is_alive() and not sender.is_alive()
    finally:
        ours.abort()
        theirs.abort()
