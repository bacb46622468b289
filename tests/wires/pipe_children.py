"""What the children of test_pipe.py run; a module of its own, so that a spawned child imports no more than it needs."""

import os
import signal

from anywire import sync


def echo(handle):
    with sync.attach(handle) as channel:
        for message in channel:
            channel.send(message)


def collect(handle, path):
    """Write what comes into a file, and how it ended."""
    with sync.attach(handle) as channel, open(path, "wb") as file:
        file.writelines(message + b"\n" for message in channel)
        file.write(b"end\n")


def hang(handle):
    """Say hello, then do nothing until killed."""
    channel = sync.attach(handle)
    channel.send(str(os.getpid()).encode())
    signal.pause()


def leave_with_parent(handle, path):
    """Wait for the parent's death and write down what told it."""
    with sync.attach(handle) as end, open(path, "w") as file:
        if handle.face == "stream":
            end.write(b"ready")
            file.write(f"read {end.read()!r}")
        else:
            end.send(b"ready")
            try:
                end.recv()
            except Exception as error:
                file.write(type(error).__name__)
