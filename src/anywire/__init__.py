"""anywire: one connection API over any wire; the address decides.

The public names, loaded at their first use, so that importing the package stays cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from anywire import loop as loop
    from anywire import multiprocessing as multiprocessing
    from anywire import sync as sync
    from anywire.contract.address import Address as Address
    from anywire.contract.channel import Channel as Channel
    from anywire.contract.endpoint import ByteEndpoint as ByteEndpoint
    from anywire.contract.endpoint import Loan as Loan
    from anywire.contract.endpoint import MessageEndpoint as MessageEndpoint
    from anywire.contract.errors import AddressError as AddressError
    from anywire.contract.errors import AnywireError as AnywireError
    from anywire.contract.errors import BadFrame as BadFrame
    from anywire.contract.errors import Busy as Busy
    from anywire.contract.errors import ChannelClosed as ChannelClosed
    from anywire.contract.errors import EndOfChannel as EndOfChannel
    from anywire.contract.errors import Forked as Forked
    from anywire.contract.errors import MessagesLost as MessagesLost
    from anywire.contract.errors import PeerLost as PeerLost
    from anywire.contract.errors import Refused as Refused
    from anywire.contract.errors import TimedOut as TimedOut
    from anywire.contract.errors import TooLarge as TooLarge
    from anywire.contract.errors import TooSlow as TooSlow
    from anywire.contract.errors import UnknownWire as UnknownWire
    from anywire.contract.errors import Unsupported as Unsupported
    from anywire.contract.handle import Handle as Handle
    from anywire.contract.options import Option as Option
    from anywire.contract.peer import Peer as Peer
    from anywire.contract.stream import Stream as Stream
    from anywire.contract.traits import Traits as Traits
    from anywire.contract.waits import Resolve as Resolve
    from anywire.contract.waits import Wait as Wait
    from anywire.contract.wire import Acceptor as Acceptor
    from anywire.contract.wire import Wire as Wire
    from anywire.facade import Listener as Listener
    from anywire.facade import Server as Server
    from anywire.facade import attach as attach
    from anywire.facade import connect as connect
    from anywire.facade import connect_forever as connect_forever
    from anywire.facade import connect_stream as connect_stream
    from anywire.facade import listen as listen
    from anywire.facade import listen_stream as listen_stream
    from anywire.facade import serve as serve
    from anywire.facade import serve_stream as serve_stream
    from anywire.loop import new_event_loop as new_event_loop
    from anywire.loop import run as run
    from anywire.patterns.publishing import Publisher as Publisher
    from anywire.patterns.publishing import publish as publish
    from anywire.patterns.pulling import Pull as Pull
    from anywire.patterns.pulling import pull as pull
    from anywire.patterns.pushing import Push as Push
    from anywire.patterns.pushing import push as push
    from anywire.patterns.subscribing import Subscription as Subscription
    from anywire.patterns.subscribing import subscribe as subscribe
    from anywire.wires.moving import pipe as pipe

_ERRORS = (
    "AddressError AnywireError BadFrame Busy ChannelClosed EndOfChannel Forked MessagesLost PeerLost Refused TimedOut "
    "TooLarge TooSlow UnknownWire Unsupported"
)
_FACADE = (
    "Listener Server attach connect connect_forever connect_stream listen listen_stream serve serve_stream"
)
_HOME = {
    **dict.fromkeys(_ERRORS.split(), "anywire.contract.errors"),
    **dict.fromkeys(_FACADE.split(), "anywire.facade"),
    "Acceptor": "anywire.contract.wire",
    "Address": "anywire.contract.address",
    "ByteEndpoint": "anywire.contract.endpoint",
    "Channel": "anywire.contract.channel",
    "Handle": "anywire.contract.handle",
    "Loan": "anywire.contract.endpoint",
    "MessageEndpoint": "anywire.contract.endpoint",
    "Option": "anywire.contract.options",
    "Peer": "anywire.contract.peer",
    "Publisher": "anywire.patterns.publishing",
    "Pull": "anywire.patterns.pulling",
    "Push": "anywire.patterns.pushing",
    "Resolve": "anywire.contract.waits",
    "Stream": "anywire.contract.stream",
    "Subscription": "anywire.patterns.subscribing",
    "Traits": "anywire.contract.traits",
    "Wait": "anywire.contract.waits",
    "Wire": "anywire.contract.wire",
    "new_event_loop": "anywire.loop",
    "pipe": "anywire.wires.moving",
    "publish": "anywire.patterns.publishing",
    "pull": "anywire.patterns.pulling",
    "push": "anywire.patterns.pushing",
    "run": "anywire.loop",
    "subscribe": "anywire.patterns.subscribing",
}

__all__ = sorted([*_HOME, "loop", "multiprocessing", "sync"])  # noqa: PLE0605 # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in ("loop", "multiprocessing", "sync"):
        return importlib.import_module(f"anywire.{name}")
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'anywire' has no attribute {name!r}")
    if home == "anywire.loop":
        importlib.import_module("anywire.contract.counters")        # so that loops are on the page of counters
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
