"""A pair of connected sockets over 127.0.0.1, for where the system has no socketpair: any local process may try to get
in between, so both ends' addresses are compared before anything is read or written.
"""

import errno
import socket
import time

# Strangers are sent away and the next connection is looked at, for so long.
_PATIENCE = 5.0


def listening() -> socket.socket:
    """A listener on a free port of 127.0.0.1. OSError: says when the loopback interface is down."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise _explained(error) from error
    return listener


def joined(listener: socket.socket, patience: float = _PATIENCE) -> tuple[socket.socket, socket.socket, int]:
    """Connect to `listener` and accept just that connection.

    Args:
        listener: of `listening`.
        patience: in seconds; how long strangers may keep us from it.

    Returns:
        Both ends, and how many strangers were sent away.

    Raises:
        OSError: the loopback interface is down (ENETUNREACH, EADDRNOTAVAIL), or strangers kept us out (ETIMEDOUT).
    """
    deadline = time.monotonic() + patience
    strangers = 0
    ours = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        ours.settimeout(patience)
        try:
            ours.connect(listener.getsockname())
        except OSError as error:
            raise _explained(error) from error
        while True:
            listener.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                theirs, peer = listener.accept()
            except TimeoutError as error:
                raise OSError(
                    errno.ETIMEDOUT,
                    f"a loopback pair: {strangers} strangers connected to {listener.getsockname()} and this process "
                    f"did not get through in {patience} s",
                ) from error
            if peer == ours.getsockname() and theirs.getsockname() == ours.getpeername():
                break
            theirs.close()
            strangers += 1
        for end in (ours, theirs):
            end.settimeout(None)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        ours.close()
        raise
    return ours, theirs, strangers


def loopback_pair() -> tuple[socket.socket, socket.socket]:
    """Two TCP sockets connected to each other over 127.0.0.1, and to nobody else. OSError as `joined`."""
    with listening() as listener:
        ours, theirs, _ = joined(listener)
    return ours, theirs


def _explained(error: OSError) -> OSError:
    if error.errno in (errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.EHOSTUNREACH, errno.ENETDOWN):
        return OSError(
            error.errno,
            f"a loopback pair: 127.0.0.1 can't be reached ({error.strerror}). The loopback interface is down: "
            "`ip link set lo up`, or take another kind of wakeup (eventfd, socketpair, pipe)",
        )
    return error
