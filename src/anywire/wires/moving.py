"""Moving connections between processes and fronts: what `attach` makes of a handle, and anonymous pipes.

Plain functions, any thread. A handle's descriptors belong to what is made here from the first line on; whatever fails
closes them.
"""

from __future__ import annotations

import os
import socket
from typing import Any

from anywire.contract.address import Address
from anywire.contract.endpoint import ByteEndpoint, MessageEndpoint, RawEndpoint
from anywire.contract.errors import Unsupported
from anywire.contract.handle import Handle
from anywire.contract.waits import Steps
from anywire.contract.wire import wire_for
from anywire.wires import establish
from anywire.wires._descriptor import PipeBytes, SocketBytes, UnixBytes
from anywire.wires._framed import FramedEndpoint
from anywire.wires._packet import PacketEndpoint
from anywire.wires.plan import HANDSHAKE_TIMEOUT, Plan, plan_for


def pipe(duplex: bool = True) -> tuple[Handle, Handle]:
    """Two connected ends of anonymous pipes (pipe(7)): (ours, theirs).

    With `duplex=False` the first only sends and the second only receives. Give one to a child: as an argument of a
    multiprocessing.Process, or `Popen(..., pass_fds=theirs.fds)` with `theirs.address` on its command line, which it
    passes to `connect`. Attach the other here, and close the child's handle once it has started."""
    to_them, from_us = os.pipe2(os.O_CLOEXEC)
    if duplex:
        to_us, from_them = os.pipe2(os.O_CLOEXEC)
        return _pipe_handle(to_us, from_us), _pipe_handle(to_them, from_them)
    return _pipe_handle(-1, from_us), _pipe_handle(to_them, -1)


def _pipe_handle(read: int, write: int) -> Handle:
    ends = [f"{name}={fd}" for name, fd in (("read", read), ("write", write)) if fd >= 0]
    return Handle("pipe", "channel", "pipe", f"pipe:?{'&'.join(ends)}", [read, write])


def attach_endpoint(handle: Handle) -> tuple[str, Any]:
    """(kind, what is made of it): for a listener (plans, acceptors), else a generator that returns the endpoint."""
    if handle.kind == "listener":
        return "listener", _attach_listener(handle)
    return handle.face, _attach_steps(handle)


def _attach_listener(handle: Handle) -> tuple[dict[Any, Plan], list[Any]]:
    address = Address.parse(handle.address)
    options = dict(handle.state["options"])
    plan = plan_for(address, handle.face, "listen", options.pop("max_message"), options.pop("handshake_timeout"), {})
    acceptor = plan.wire.adopt_listener(address, handle.take(), handle.state, plan.options)
    return {acceptor: plan}, [acceptor]


def detach_listener(listener: Any) -> Handle:
    """Take the only acceptor out of a listener of either front."""
    if len(listener._acceptors) != 1:
        raise Unsupported(
            f"only a listener of one address can move; this one has {len(listener._acceptors)}", operation="detach"
        )
    (acceptor,) = listener._acceptors
    options = listener._plans[acceptor].options
    fds, state = acceptor.detach()
    listener._acceptors = []
    listener._slot.release()
    state["options"] = {key: options[key] for key in ("max_message", "handshake_timeout")}
    return Handle("listener", listener._face, "listener", str(acceptor.address), fds, state)


def peer_at(fd: int) -> Any:
    """Who is at the other end of a Unix socket: the kernel still knows (SO_PEERCRED)."""
    from anywire.wires.unix import peer_of

    with socket.socket(fileno=os.dup(fd)) as sock:
        return peer_of(sock)


def _bytes_of(handle: Handle) -> ByteEndpoint:
    address = Address.parse(handle.address)
    wire = wire_for(address)
    fds = handle.take()
    if handle.how == "pipe":
        return PipeBytes(fds[0], fds[1], address=address, wire=wire)
    kind = {"socket": SocketBytes, "unix": UnixBytes}.get(handle.how)
    if kind is None:
        raise Unsupported(f"a handle of kind {handle.how!r} can't be attached", address=address, operation="attach")
    return kind(fds[0], address=address, peer=peer_at(fds[0]) if handle.how == "unix" else None, wire=wire)


def _attach_steps(handle: Handle) -> Steps[MessageEndpoint]:
    if handle.how == "packet":
        address = Address.parse(handle.address)
        (fd,) = handle.take()
        packets = PacketEndpoint(
            fd, handle.state["max_message"], address=address, peer=peer_at(fd), wire=wire_for(address)
        )
        packets.restore_state(handle.state)
        return packets
    below = _bytes_of(handle)
    if handle.kind == "pipe":
        if handle.face == "stream":
            return RawEndpoint(below)
        plan = plan_for(below.address, "channel", "connect", None, HANDSHAKE_TIMEOUT, {})
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
