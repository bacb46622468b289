"""Limits of POSIX message queues (mq_overview(7), getrlimit(2)): reading them, and saying which one was in the way.

Plain functions, any thread. Nothing here is called unless something failed, or a queue is made with sizes of its own.
What can go wrong: /proc is not mounted; then the kernel's built-in values are taken.
"""

from __future__ import annotations

import errno
import os
import resource
from typing import NamedTuple

DIRECTORY = "/proc/sys/fs/mqueue"
BUILT_IN = {"msg_max": 10, "msgsize_max": 8192, "queues_max": 256, "msg_default": 10, "msgsize_default": 8192}
OVERHEAD = 96
"""Bytes of RLIMIT_MSGQUEUE that each message a queue may hold costs beside its size, on 64-bit Linux (getrlimit(2))."""
RLIMIT_MSGQUEUE = 12
"""Its number on Linux (asm-generic/resource.h); the resource module has no name for it."""
LARGEST = 16 << 20
"""Bytes of a message that the kernel takes at most, whatever the limits (HARD_MSGSIZEMAX in its ipc_namespace.h)."""
NAME_MAX = 255


class Limits(NamedTuple):
    """What the system allows; counts and bytes. `rlimit` is for all queues of the user, -1 for no limit."""

    msg_max: int
    msgsize_max: int
    queues_max: int
    msg_default: int
    msgsize_default: int
    rlimit: int


def limits() -> Limits:
    """The limits of this moment. A process with CAP_SYS_RESOURCE may pass `msg_max`, `msgsize_max` and `queues_max`."""
    return Limits(**{name: _read(name) for name in BUILT_IN}, rlimit=resource.getrlimit(RLIMIT_MSGQUEUE)[0])


def _read(name: str) -> int:
    try:
        with open(f"{DIRECTORY}/{name}") as file:
            return int(file.read())
    except (OSError, ValueError):
        return BUILT_IN[name]


def complete(max_messages: int | None, message_size: int | None) -> tuple[int, int]:
    """Both sizes of a queue to be made. Raises ValueError, TypeError."""
    found = limits()
    for word, value in (("max_messages", max_messages), ("message_size", message_size)):
        if value is not None and not 0 < value.__index__() < 1 << 31:
            raise ValueError(f"{word} is a number above 0, not {value!r}")
    return (
        min(found.msg_default, found.msg_max) if max_messages is None else max_messages.__index__(),
        min(found.msgsize_default, found.msgsize_max) if message_size is None else message_size.__index__(),
    )


def explain(e: int, name: str, flags: int, max_messages: int, message_size: int) -> str | None:
    """Why mq_open(3) failed, and what to do; None where the number alone says it. 0: the system's default size."""
    found = limits()
    max_messages, message_size = max_messages or found.msg_default, message_size or found.msgsize_default
    if e == errno.EINVAL and not name.startswith("/"):
        return "a queue's name begins with a slash, such as '/orders'"
    if e == errno.EINVAL and flags & os.O_CREAT:
        return _too_large(max_messages, message_size, found)
    if e == errno.EMFILE:
        return _no_room(max_messages, message_size, found)
    if e == errno.ENOSPC:
        return (
            f"the system has its {found.queues_max} queues already: unlink some, or raise the limit as root: "
            f"sysctl fs.mqueue.queues_max={found.queues_max * 2}"
        )
    if e == errno.ENOENT and name != "/":
        return "there is no queue of this name: make it with create() or create_or_open()"
    if e == errno.EEXIST:
        return "a queue of this name is there already: open() it, or unlink() it first"
    return explain_name(e, name)


def _too_large(max_messages: int, message_size: int, found: Limits) -> str:
    if max_messages > found.msg_max:
        return (
            f"max_messages={max_messages} is above the system's limit of {found.msg_max}: pass less, or raise it "
            f"as root: sysctl fs.mqueue.msg_max={max_messages}"
        )
    if message_size > found.msgsize_max:
        return (
            f"message_size={message_size} is above the system's limit of {found.msgsize_max} bytes: pass less, "
            f"or raise it as root: sysctl fs.mqueue.msgsize_max={message_size}"
        )
    return f"the kernel refuses max_messages={max_messages} with message_size={message_size}"


def _no_room(max_messages: int, message_size: int, found: Limits) -> str:
    try:
        os.close(os.eventfd(0))
    except OSError:
        return "this process has as many descriptors as it may (ulimit -n)"
    need = max_messages * (message_size + OVERHEAD)
    return (
        f"a queue of {max_messages} x {message_size} bytes takes about {need} bytes of RLIMIT_MSGQUEUE, and all queues "
        f"of this user may take {found.rlimit} together: make it smaller, unlink others, or raise the limit: "
        f"ulimit -q (systemd: LimitMSGQUEUE=)"
    )


def explain_name(e: int, name: str) -> str | None:
    """What is wrong with the name, if that is it."""
    if e == errno.EINVAL and not name.startswith("/"):
        return "a queue's name begins with a slash, such as '/orders'"
    if name == "/" or (e == errno.EACCES and "/" in name[1:]):
        return "a queue's name is one slash and then at least one character, none of them a slash"
    if e == errno.ENAMETOOLONG:
        return f"a queue's name has at most {NAME_MAX} bytes after the slash"
    return None


def explain_size(size: int, limit: int) -> str:
    """Why a message does not fit."""
    return f"the message has {size} bytes, and this queue takes up to {limit}: {advice_for(size)}"


def advice_for(size: int) -> str:
    """What it takes to send a message of this size, in bytes."""
    if size > LARGEST:
        return f"no queue takes more than {LARGEST} bytes: send it in parts, or pass it in shared memory"
    largest = limits().msgsize_max
    if size <= largest:
        return f"make the queue with message_size={size}"
    return f"make the queue with message_size={size}, after sysctl fs.mqueue.msgsize_max={size} (now {largest})"


def explain_notify(e: int, fd: int) -> str | None:
    """Why mq_notify(3) failed."""
    if e != errno.EBUSY:
        return None
    who = notified(fd)
    return f"{f'process {who}' if who else 'another process'} is to be notified already, and one is the limit"


def notified(fd: int) -> int:
    """The process that is to be notified when a message comes, 0 for none. Reads the text that /dev/mqueue shows."""
    try:
        # Not through a second descriptor: closing that would end what this process itself asked for.
        words = os.pread(fd, 200, 0).split()
    except OSError:  # opened for sending only
        return 0
    return next((int(word[11:]) for word in words if word.startswith(b"NOTIFY_PID:")), 0)
