"""How the loop hears that a subprocess ended: by a pidfd(2), a descriptor as any other.

From Python 3.12 on that is what asyncio does by itself. In 3.11 its default is a thread for each subprocess; here the
standard library's own pidfd watcher is used instead, one a loop. The watcher of the policy stays what it is, and one
that was set there (`asyncio.set_child_watcher`) is used. A mix-in of `anywire.loop.Loop`, in front of the standard
loop; on its thread.

What can go wrong: a system without pidfds, or a sandbox that refuses them: then it is as asyncio does it.
"""

from __future__ import annotations

import asyncio
import functools
import os
import sys
from asyncio import unix_events
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    _Base = Any                 # what it is put in front of has its hooks in no stub
else:
    _Base = object


@functools.cache
def works() -> bool:
    """Whether this system gives pidfds."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return True


class ChildHooks(_Base):  # type: ignore[misc]
    """The standard loop's hook for subprocesses; `self` is the loop."""

    if sys.version_info < (3, 12):
        _children: unix_events.PidfdChildWatcher | None = None

        async def _make_subprocess_transport(
            self, protocol: asyncio.SubprocessProtocol, args: Any, shell: bool, stdin: Any, stdout: Any, stderr: Any,
            bufsize: int, extra: dict[str, Any] | None = None, **options: Any,
        ) -> Any:
            # Made by the first who asks for it; a policy of somebody else's may have none.
            if getattr(asyncio.get_event_loop_policy(), "_watcher", self) is not None or not works():
                return await super()._make_subprocess_transport(
                    protocol, args, shell, stdin, stdout, stderr, bufsize, extra, **options)
            if self._children is None:
                self._children = unix_events.PidfdChildWatcher()
                self._children.attach_loop(self)
            # From here on as the standard loop.
            waiter = self.create_future()
            transport = unix_events._UnixSubprocessTransport(  # type: ignore[attr-defined]
                self, protocol, args, shell, stdin, stdout, stderr, bufsize, waiter=waiter, extra=extra, **options)
            self._children.add_child_handler(transport.get_pid(), self._child_watcher_callback, transport)
            try:
                await waiter
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException:
                transport.close()
                await transport._wait()
                raise
            return transport

        def close(self) -> None:
            if self._children is not None and not self.is_running():
                self._children.close()
                self._children = None
            super().close()
