"""What may be true of a descriptor, and how a demultiplexer is to report it.

The same numbers are constants for Cython in `conditions.pxd`; a test holds the two files together. They are this
library's own, not the kernel's: each demultiplexer translates.
"""

from enum import IntFlag


class Condition(IntFlag):
    """What a descriptor is watched for, and what is reported of it.

    HANGUP and ERROR are reported of every watched descriptor, asked for or not, as poll(2) does; a descriptor that is
    watched for nothing (0) is reported not at all. `select` tells a hang-up or an error as READ or WRITE only.
    """

    READ = 1
    """A read gives bytes, a connection, the end, or an error at once."""
    WRITE = 2
    """A write takes at least one byte, or fails at once; a connect under way has come to its end."""
    PRIORITY = 4
    """Out-of-band data of TCP, a change of what sysfs shows (poll(2), POLLPRI)."""
    HANGUP = 8
    """Both directions are shut, or the writers of a pipe are gone. What came before can still be read."""
    READ_HANGUP = 16
    """The peer has shut its writing direction; bytes from before may still be here. Read them first."""
    ERROR = 32
    """An error is pending, or the readers of a pipe are gone."""


class Trigger(IntFlag):
    """When a watched condition is reported."""

    LEVEL = 0
    """As long as it holds. The others are added to this one, and may be combined but for EXCLUSIVE with ONESHOT."""
    EDGE = 1
    """When it comes to hold anew; read or write until EAGAIN, or the rest is never reported. Only epoll."""
    ONESHOT = 2
    """Once; then nothing until the descriptor is modified, which arms it again."""
    EXCLUSIVE = 4
    """Of all epolls that watch a descriptor so, one or some are woken, not all (EPOLLEXCLUSIVE). Only epoll, only READ
    and WRITE, and only when added: it can't be modified."""
