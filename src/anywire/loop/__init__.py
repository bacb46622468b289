"""The event loop: asyncio's, with a native core on this library's own engine.

`anywire.run(main())` runs a coroutine on it, `new_event_loop()` makes one for whoever wants a factory, such as
asyncio.Runner. Tasks and futures stay asyncio's own.
"""

from anywire.loop.event_loop import Loop, LoopStats, new_event_loop, run

__all__ = ["Loop", "LoopStats", "new_event_loop", "run"]
