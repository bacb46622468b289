"""Moving connections between processes and fronts: what `attach` makes of a handle, and anonymous pipes.

Plain functions, any thread. A handle's descriptors belong to what is made here from the first line on; whatever fails
closes them.
"""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from typing import Any

from anywire.contract.address import Address
from anywire.contract.endpoint import ByteEndpoint, MessageEndpoint, RawEndpoint
from anywire.contract.errors import Unsupported
from anywire.contract.handle import Handle
from anywire.contract.peer import Peer
from anywire.contract.waits import Steps
from anywire.contract.wire import wire_for
from anywire.wires import establish
from anywire.wires._descriptor import PipeBytes, SocketBytes, UnixBytes
from anywire.wires._framed import FramedEndpoint
from anywire.wires._packet import PacketEndpoint
from anywire.wires.plan import Plan, plan_for


def pipe(duplex: bool = True, *, stream: bool = False) -> tuple[Handle, Handle]:
    """Two connected ends of anonymous pipes (pipe(7)): (ours, theirs).

    Parameters:
        duplex: False makes one pipe only: the first end sends and the second receives.
        stream: `attach` makes a Stream of bytes of an end, not a Channel of messages.

    Give one end to a child: as an argument of a multiprocessing.Process, or with `Popen(..., pass_fds=theirs.fds)` and
    `theirs.address` on its command line, which it passes to `connect`. `attach` the other here. Close the child's
    handle once it has started: while this process keeps a copy, it can't see the child's death.
    Raises OSError (EMFILE).

    >>> import subprocess, sys
    >>> from anywire import sync
    >>> ours, theirs = pipe(duplex=False, stream=True)
    >>> child = subprocess.Popen(["wc", "-c"], stdin=theirs.fds[0], stdout=subprocess.PIPE, text=True)
    >>> theirs.close()
    >>> with sync.attach(ours) as stream:
    ...     stream.write(b"hello")
    >>> child.communicate()[0].strip()
    '5'
    """
    fds: list[int] = []
    try:
        for _ in range(2 if duplex else 1):
            fds += os.pipe2(os.O_CLOEXEC)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    face = "stream" if stream else "channel"
    if duplex:
        to_them, from_us, to_us, from_them = fds
        ours, theirs = _pipe_handle(face, to_us, from_us), _pipe_handle(face, to_them, from_them)
    else:
        ours, theirs = _pipe_handle(face, -1, fds[1]), _pipe_handle(face, fds[0], -1)
    ours.pair_with(theirs)
    return ours, theirs


def _pipe_handle(face: str, read: int, write: int) -> Handle:
    how = "pipe" if read >= 0 and write >= 0 else "pipe-read" if read >= 0 else "pipe-write"
    return Handle("pipe", face, how, _pipe_address(read, write), [fd for fd in (read, write) if fd >= 0])


def _pipe_address(read: int, write: int) -> str:
    return "pipe:?" + "&".join(f"{name}={fd}" for name, fd in (("read", read), ("write", write)) if fd >= 0)


def attach_endpoint(handle: Handle, timeout: float, authorize: Any) -> tuple[str, Any]:
    """(kind, what is made of it): for a listener (plans, acceptors), else a generator that returns the endpoint.

    A ValueError about `authorize` leaves the handle as it was."""
    if handle.kind == "listener":
        if authorize is None and handle.state.get("authorize", True):
            raise ValueError(
                f"attach {handle.address}: the listener had authorize=, and a function can't travel with the handle; "
                "pass attach(handle, authorize=FUNCTION), or authorize=lambda peer: True to admit everybody"
            )
        return "listener", _attach_listener(handle)
    if authorize is not None:
        raise ValueError(
            f"attach {handle.address}: authorize= is asked by listeners, and this handle is of a {handle.kind}; judge "
            "by its .peer once it is attached"
        )
    return handle.face, _attach_steps(handle, timeout)


def _attach_listener(handle: Handle) -> tuple[dict[Any, Plan], list[Any]]:
    address = Address.parse(handle.address)
    # JSON knows no tuples: they arrive as lists. An option that only this version has is at its default.
    given: dict[str, Any] = handle.state["options"]
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    plan = plan_for(address, handle.face, "listen", given["max_message"], given["handshake_timeout"], {})
    plan = replace(plan, options={**plan.options, **options})
    acceptor = plan.wire.adopt_listener(address, handle.take(), handle.state, plan.options)
    return {acceptor: plan}, [acceptor]


def detach_listener(listener: Any) -> Handle:
    """Take the only acceptor out of a listener of either front."""
    if len(listener._acceptors) != 1:
        raise Unsupported(
            f"only a listener of one address can move; this one has {len(listener._acceptors)}", operation="detach"
        )
    (acceptor,) = listener._acceptors
    options = dict(listener._plans[acceptor].options)
    for name, value in options.items():
        if not _is_plain(value):
            raise Unsupported(
                f"the value of the option {name!r} can't travel to another process: {value!r}",
                address=acceptor.address,
                operation="detach",
                advice="listen in the other process instead",
            )
    fds, state = acceptor.detach()
    listener._acceptors = []
    listener._slot.release()
    state["options"] = options
    state["authorize"] = listener._authorize is not None
    return Handle("listener", listener._face, "listener", str(acceptor.address), fds, state)


def _is_plain(value: Any) -> bool:
    """Whether `Handle.pack` carries it to another process, and `_attach_listener` gets the same back."""
    if type(value) is tuple:
        return all(item is None or type(item) in (bool, int, float, str, bytes) for item in value)
    return value is None or type(value) in (bool, int, float, str, bytes)


def peer_at(fd: int) -> Any:
    """Who is at the other end of a Unix socket: the kernel still knows (SO_PEERCRED)."""
    from anywire.wires.unix import peer_of

    with socket.socket(fileno=os.dup(fd)) as sock:
        return peer_of(sock)


def _bytes_of(handle: Handle) -> ByteEndpoint:
    address = Address.parse(handle.address)
    wire = wire_for(address)
    fds = handle.take()
    try:
        return _endpoint_of(handle, address, wire, fds)
    except BaseException:
        _close(fds)
        raise


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _endpoint_of(handle: Handle, address: Address, wire: Any, fds: list[int]) -> ByteEndpoint:
    """Takes the descriptors over only if it returns."""
    if handle.how in ("pipe", "pipe-read", "pipe-write"):
        read, write = (fds[0] if handle.how != "pipe-write" else -1), (fds[-1] if handle.how != "pipe-read" else -1)
        for fd in fds:
            os.set_inheritable(fd, False)  # spawn and forkserver left them open to grandchildren
        if address.scheme == "pipe":
            address = Address.parse(_pipe_address(read, write))  # in another process the numbers are others
        return PipeBytes(read, write, address=address, peer=_peer_of(handle) or Peer(wire=address.scheme), wire=wire)
    kind = {"socket": SocketBytes, "unix": UnixBytes}.get(handle.how)
    if kind is None:
        raise Unsupported(f"a handle of kind {handle.how!r} can't be attached", address=address, operation="attach")
    peer = peer_at(fds[0]) if handle.how == "unix" else _peer_of(handle)
    return kind(fds[0], address=address, peer=peer, wire=wire)


def _peer_of(handle: Handle) -> Peer | None:
    """Who it was when it was detached; None for the end of a pipe, which has met nobody yet."""
    fields = handle.state.get("peer")
    return None if fields is None else Peer(**fields)


def _attach_steps(handle: Handle, timeout: float) -> Steps[MessageEndpoint]:
    if handle.how == "packet":
        address = Address.parse(handle.address)
        wire = wire_for(address)
        fds = handle.take()
        try:
            peer = peer_at(fds[0])
        except BaseException:
            _close(fds)
            raise
        packets = PacketEndpoint(fds[0], handle.state["max_message"], address=address, peer=peer, wire=wire)
        packets.restore_state(handle.state)
        return packets
    if handle.how == "queues":
        from anywire.wires.mq import taken_over

        return taken_over(Address.parse(handle.address), handle.take(), handle.state, _peer_of(handle))
    if handle.how == "sysv":
        from anywire.wires import sysv

        return sysv.taken_over(Address.parse(handle.address), handle.take(), handle.state, _peer_of(handle))
    below = _bytes_of(handle)
    if handle.kind == "pipe":
        if handle.face == "stream":
            return RawEndpoint(below)
        plan = plan_for(below.address, "channel", "connect", None, timeout, {})
        return (yield from establish.greet_steps(below, plan.options, below.address))
    endpoint: MessageEndpoint
    if handle.face == "stream":
        endpoint = RawEndpoint(below)
    else:
        state = handle.state
        endpoint = FramedEndpoint(
            below,
            state["max_message"],
            state["peer_limit"],
            confirms=state["confirms"],
            descriptors=handle.how == "unix",
        )
    endpoint.restore_state(handle.state)
    return endpoint
