"""What the kernel says happened: demultiplexers, timers, wakeups, and a reactor over them. Usable on its own."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# By name: the module that has it. Loaded when asked for, since an event loop needs only some.
_WHERE = {
    "Condition": "conditions",
    "Trigger": "conditions",
    "Demultiplexer": "demultiplexers",
    "Reactor": "_reactor",
    "Event": "_reactor",
    "TimerEvent": "_reactor",
    "SignalEvent": "_reactor",
    "TimerQueue": "_timers",
    "Wakeup": "_wakeup",
    "SharedQueue": "shared_queue",
    "BlockPool": "_buffers",
    "Buffer": "_buffers",
    "BufferedConnection": "connection",
    "RateLimit": "connection",
}

if TYPE_CHECKING:
    from ._buffers import BlockPool, Buffer
    from ._reactor import Event, Reactor, SignalEvent, TimerEvent
    from ._timers import TimerQueue
    from ._wakeup import Wakeup
    from .conditions import Condition, Trigger
    from .connection import BufferedConnection, RateLimit
    from .demultiplexers import Demultiplexer
    from .shared_queue import SharedQueue


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


__all__ = [
    "BlockPool",
    "Buffer",
    "BufferedConnection",
    "Condition",
    "Demultiplexer",
    "Event",
    "RateLimit",
    "Reactor",
    "SharedQueue",
    "SignalEvent",
    "TimerEvent",
    "TimerQueue",
    "Trigger",
    "Wakeup",
]
