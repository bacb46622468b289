"""Whoever holds the lock of a send may be interrupted or missing: handlers and forked children must not wait for it."""

from __future__ import annotations

import subprocess
import sys

PEER_THAT_DOES_NOT_READ = """
import os, signal, sys, threading
import anywire
from anywire import sync

listener = sync.listen(f"unix:@anywire-senders-{os.getpid()}")
accepted = []
accepting = threading.Thread(target=lambda: accepted.append(listener.accept(timeout=20)))
accepting.start()
channel = sync.connect(listener.addresses[0])
accepting.join()
peer = accepted[0]
signal.alarm(30)                # whatever waits for ever
large = bytes(4 << 20)
"""

HANDLER = """
told = []

def handler(number, frame):
    told.append(channel.try_send(b"no room"))
    for options in ({}, {"timeout": 20}):
        try:
            channel.send(b"from the handler", **options)
        except anywire.Busy as error:
            told.append(str(error))
    reading.start()

reading = threading.Thread(target=lambda: told.append(len(peer.recv())))
signal.signal(signal.SIGUSR1, handler)
threading.Timer(0.2, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)).start()
channel.send(large)
reading.join()
assert told[0] is False and told[3] == len(large), told
assert "signal handler" in told[1] and "try_send" in told[2], told
channel.send(b"after")
assert peer.recv() == b"after"
"""

CHILD = """
sending = threading.Thread(target=channel.send, args=(large,))
sending.start()
while channel.stats().send_waits == 0:
    os.sched_yield()
receiving = threading.Thread(target=channel.recv)
receiving.start()
pid = os.fork()
if pid == 0:
    signal.alarm(20)
    for operation in (lambda: channel.send(b"x"), lambda: channel.try_send(b"x"), lambda: channel.recv()):
        try:
            operation()
        except anywire.Forked:
            continue
        os._exit(3)
    os._exit(0)
_, status = os.waitpid(pid, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
assert len(peer.recv()) == len(large)
peer.send(b"end")
sending.join()
receiving.join()
"""

END = """
channel.abort()
peer.abort()
listener.close()
"""


def run(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PEER_THAT_DOES_NOT_READ + program + END],
        capture_output=True, text=True, timeout=60, check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_signal_handler_does_not_wait_for_the_send_it_interrupted() -> None:
    run(HANDLER)


def test_a_forked_child_does_not_wait_for_its_parents_threads() -> None:
    run(CHILD)
