"""A peer: the other end of the channel under test, in a process of its own, doing what the test asks.

Owns: `PeerHost.main` (run as `python -m ….peer`), a process that forks one peer for each request, so that a peer costs
milliseconds; and `run_peer`, the peer's loop: it takes (function, arguments) from its control socket, calls
`function(peer, *arguments)` and sends the result back. The functions are in roles.py. A peer uses the blocking front,
in its only thread. For the wire without processes (inproc), `run_peer` runs in a thread of the test instead.
What can go wrong: the test kills the peer at any moment; nothing here may depend on an orderly end.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import struct
import sys
import traceback
from typing import Any

LENGTH = struct.Struct("<I")


def send_object(sock: socket.socket, value: Any) -> None:
    data = pickle.dumps(value)
    sock.sendall(LENGTH.pack(len(data)) + data)


def receive_object(sock: socket.socket) -> Any:
    (length,) = LENGTH.unpack(_exactly(sock, LENGTH.size))
    return pickle.loads(_exactly(sock, length))


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = sock.recv(size - len(data))
        if not chunk:
            raise EOFError
        data += chunk
    return data


class PeerSide:
    """What the functions in roles.py get: the peer's own state and a way to tell the test something meanwhile."""

    def __init__(self, control: socket.socket, fds: list[int]) -> None:
        self.control = control
        self.fds = fds
        self.channel: Any = None
        self.listener: Any = None
        self.kept: dict[str, Any] = {}

    def report(self, value: Any) -> None:
        send_object(self.control, ("report", value))


def run_peer(control: socket.socket, fds: list[int]) -> None:
    peer = PeerSide(control, fds)
    try:
        while True:
            try:
                number, function, args, options = receive_object(control)
            except (EOFError, OSError):
                return
            try:
                answer = ("result", number, function(peer, *args, **options))
            except Exception as error:
                answer = ("failed", number, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
            try:
                send_object(control, answer)
            except OSError:
                return
    finally:
        for thing in (peer.channel, peer.listener):
            stop = getattr(thing, "abort", None) or getattr(thing, "close", None)
            if stop is not None:
                stop()
        control.close()


def host(requests: socket.socket) -> None:
    """Fork a peer for each request: its control socket and descriptors come with it, its pid goes back."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the test's to handle
    while True:
        message, received, _flags, _address = socket.recv_fds(requests, 16, 64)
        if not message:
            return
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            requests.close()
            code = 1
            try:
                run_peer(socket.socket(fileno=received[0]), received[1:])
                code = 0
            except KeyboardInterrupt:
                pass
            finally:
                os._exit(code)
        for fd in received:
            os.close(fd)
        requests.sendall(LENGTH.pack(pid))


if __name__ == "__main__":
    from . import roles  # noqa: F401  (imported once, before the forks)

    if os.environ.get("ANYWIRE_FAULT"):
        from . import faults

        faults.install(os.environ["ANYWIRE_FAULT"])
    host(socket.socket(fileno=int(sys.argv[1])))
