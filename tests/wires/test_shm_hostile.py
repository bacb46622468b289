"""A peer that writes nonsense to all that it may write: never a crash, a hang, a read outside, a thing left behind."""

import asyncio
import contextlib
import itertools
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import shm_peer as raw

import anywire
from anywire import sync

ROUNDS = Path(__file__).parent / "shm_rounds.py"
MIB = 1 << 20
_names = itertools.count()


@pytest.mark.parametrize("seed", [1, 1_000_000])
def test_rounds_beside_a_hostile_process(seed):
    done = subprocess.run(
        [sys.executable, str(ROUNDS), "--seconds", "5", "--seed", str(seed)],
        capture_output=True, text=True, check=False, timeout=55,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "BadFrame" in done.stdout and "messages" in done.stdout, done.stdout


class Met:
    """A channel of the blocking front beside a peer in plain Python."""

    last: "Met"

    def __init__(self, ring=1 << 16, pool=MIB, victim=None):
        Met.last = self
        address = f"shm://anywire-evil-{os.getpid()}-{next(_names)}"
        accepted = []
        with sync.listen(address, **{"pool": "1MiB", "ring": "64KiB", **(victim or {})}) as listener:
            thread = threading.Thread(target=lambda: accepted.append(listener.accept()))
            thread.start()
            self.ours = raw.Memories(ring, pool)
            self.sock, self.theirs = raw.meet(address, self.ours)
            thread.join()
        self.channel = accepted[0]

    def __enter__(self):
        return self.channel, self.ours, self.theirs

    def __exit__(self, *_):
        self.channel.abort()
        self.sock.close()
        self.ours.close()
        self.theirs.close()


FAR = 1 << 40
RECORDS = {
    "an unknown kind": (77, b"", "record of kind 77"),
    "a reference without numbers": (raw.EXTENT, b"", "record of kind 1 has 0 bytes"),
    "a reference with too many": (raw.EXTENT, bytes(32), "record of kind 1 has 32 bytes"),
    "outside the pool": (raw.EXTENT, struct.pack("<QQ", MIB, 1), "refers to 1 bytes at"),
    "over the end of the pool": (raw.EXTENT, struct.pack("<QQ", MIB - 4096, 5000), "refers to 5000 bytes at"),
    "a length that wraps": (raw.EXTENT, struct.pack("<QQ", 4096, (1 << 64) - 4096), "limit|over"),
    "between the pages": (raw.EXTENT, struct.pack("<QQ", 100, 1), "refers to 1 bytes at 100"),
    "going on with nothing": (raw.NEXT, struct.pack("<QQ", 0, 10), "never began"),
    "all of it at first": (raw.FIRST, struct.pack("<QQQQ", 0, 10, 10, 0), "begins with all of itself"),
    "nothing at first": (raw.FIRST, struct.pack("<QQQQ", 0, 0, 10, 0), "begins with all of itself"),
    "too large for the rest of the pool": (raw.FIRST, struct.pack("<QQQQ", MIB - 4096, 10, 9000, 1), "refers to 9000"),
}


@pytest.mark.parametrize("how", ["copy", "in place", "into"])
@pytest.mark.parametrize("what", RECORDS)
def test_a_record_that_makes_no_sense_ends_the_connection(what, how):
    kind, data, reason = RECORDS[what]
    with Met() as (channel, ours, _):
        ours.record(raw.INLINE, b"good")
        ours.record(kind, data)
        ours.show()
        assert channel.recv() == b"good"
        for _ in range(2):
            with pytest.raises((anywire.BadFrame, anywire.TooLarge), match=reason):
                if how == "into":
                    channel.recv_into(bytearray(MIB))
                else:
                    channel.recv(copy=how == "copy")
        with pytest.raises((anywire.BadFrame, anywire.TooLarge)):
            channel.send(b"over")


@pytest.mark.parametrize("head", [8 + (1 << 16), 12, 1 << 63, (1 << 64) - 8])
def test_a_producers_cursor_that_makes_no_sense(head):
    with Met() as (channel, ours, _):
        ours.set("Q", raw.HEAD, head)
        with pytest.raises(anywire.BadFrame, match="ring makes no sense"):
            channel.recv()


@pytest.mark.parametrize("tail", [12, 1 << 63, (1 << 64) - 8])
def test_a_consumers_cursor_that_makes_no_sense(tail):
    with Met() as (channel, _, theirs):
        theirs.set("Q", raw.TAIL, tail)
        with pytest.raises(anywire.BadFrame, match="cursor makes no sense"):
            while True:
                channel.send(bytes(5000))
        with pytest.raises(anywire.BadFrame):
            channel.recv()


@pytest.mark.parametrize("returned", [1, 513, 1 << 63])
def test_memory_returned_that_it_does_not_have(returned):
    with Met() as (channel, _, theirs):
        theirs.set("Q", raw.RETURNED, returned)
        with pytest.raises(anywire.BadFrame, match="returned memory"):
            channel.loan(10)


def test_memory_of_a_message_that_is_not_whole_is_returned():
    """The sender must not go on writing where another message may lie by now."""
    with Met(victim={"pool": "4MiB", "ring": "4KiB"}) as (channel, _, theirs):
        for size in [400] * 9 + [368]:               # 48 bytes of the ring are left: for a first piece, and no second
            assert channel.try_send(bytes(size))
        results = []

        def send():
            try:
                channel.send(bytes(MIB), timeout=30)
            except anywire.AnywireError as error:
                results.append(error)

        thread = threading.Thread(target=send)
        thread.start()
        while theirs.get("Q", raw.HEAD) != 4088:
            time.sleep(0.001)
        kind, offset = struct.unpack_from("<4xIQ", theirs.data, 4048)
        assert kind == raw.FIRST
        theirs.set("I", raw.RETURNS, offset // raw.UNIT)
        theirs.set("Q", raw.RETURNED, 1)
        theirs.set("Q", raw.TAIL, 4088)
        while thread.is_alive():
            with contextlib.suppress(OSError):
                Met.last.sock.send(b"!")
            thread.join(0.01)
        assert "not whole yet" in str(results[0])


@pytest.mark.parametrize("front", ["blocking", "async"])
def test_nonsense_in_the_cursor_while_a_sender_waits_for_the_pool(front):
    """It is found although the ring has room: or the sender would look for ever, and never sleep."""
    if front == "blocking":
        with Met() as (channel, _, theirs):
            kept = channel.loan(MIB - 8192)
            theirs.set("Q", raw.TAIL, 1 << 63)
            with pytest.raises(anywire.BadFrame, match="cursor makes no sense"):
                channel.send(bytes(500_000), timeout=20)
            del kept
        return

    async def main():
        address = f"shm://anywire-evil-{os.getpid()}-{next(_names)}"
        async with anywire.listen(address, pool="1MiB", ring="64KiB") as listener:
            accepting = asyncio.create_task(listener.accept())
            ours = raw.Memories()
            sock, theirs = await asyncio.to_thread(raw.meet, address, ours)
            channel = await accepting
        kept = channel.loan(MIB - 8192)
        theirs.set("Q", raw.TAIL, 1 << 63)
        with pytest.raises(anywire.BadFrame, match="cursor makes no sense"):
            await channel.send(bytes(500_000), timeout=20)
        del kept
        channel.abort()
        sock.close()
        ours.close()
        theirs.close()

    asyncio.run(main())


def test_a_huge_pool_named_at_its_end_costs_what_is_named():
    """A pool of a tebibyte that is mostly holes: only the message's own pages are touched."""
    with Met(pool=FAR) as (channel, ours, _):
        ours.record(raw.EXTENT, struct.pack("<QQ", FAR - 4096, 4096))
        ours.show()
        assert channel.recv(timeout=20) == bytes(4096)
        ours.record(raw.EXTENT, struct.pack("<QQ", FAR // 2, 4096))
        ours.show()
        assert channel.recv(timeout=20) == bytes(4096)


def test_a_flood_of_tokens_does_not_hold_up_a_timeout():
    met = Met()
    over = threading.Event()

    def flood():
        met.sock.setblocking(False)
        while not over.is_set():
            try:
                met.sock.send(b"!" * 1000)
            except OSError:
                pass

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        with met as (channel, _, _), pytest.raises(anywire.TimedOut):
            channel.recv(timeout=0.2)
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def attacker(address, kind, flags=0):
    """A second process that publishes the same empty record for ever, as fast as it is consumed."""
    pid = os.fork()
    if pid == 0:
        try:
            ours = raw.Memories()
            met = raw.meet(address, ours, flags)
            for at in range(0, ours.ring, 8):
                ours.put(at, struct.pack("<II", 0, kind))
            while met:
                ours.set("Q", raw.HEAD, ours.get("Q", raw.TAIL) + ours.ring)
        finally:
            os._exit(1)
    try:
        yield
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("how", ["copy", "in place", "into"])
@pytest.mark.parametrize("kind", [raw.ABANDONED, raw.END])
def test_empty_records_for_ever_do_not_hold_up_a_timeout(kind, how):
    address = f"shm://anywire-evil-{os.getpid()}-{next(_names)}"
    with sync.listen(address, pool="1MiB") as listener, attacker(address, kind):
        channel = listener.accept()
        with pytest.raises((anywire.TimedOut, anywire.BadFrame)):
            if how == "into":
                channel.recv_into(bytearray(10), timeout=0.2)
            else:
                channel.recv(copy=how == "copy", timeout=0.2)
        channel.abort()

    async def main():
        address = f"shm://anywire-evil-{os.getpid()}-{next(_names)}"
        async with anywire.listen(address, pool="1MiB") as listener:
            with attacker(address, kind):
                channel = await listener.accept()
                if how == "into":
                    receiving = asyncio.create_task(channel.recv_into(bytearray(10), timeout=0.2))
                else:
                    receiving = asyncio.create_task(channel.recv(copy=how == "copy", timeout=0.2))
                await asyncio.sleep(0.1)             # others have their turns meanwhile
                with pytest.raises((anywire.TimedOut, anywire.BadFrame)):
                    await receiving
                channel.abort()

    asyncio.run(main())


@pytest.mark.parametrize("kind", [raw.INLINE, raw.END])
def test_empty_records_for_ever_do_not_hold_up_a_stream(kind):
    address = f"shm://anywire-evil-{os.getpid()}-{next(_names)}"
    with sync.listen_stream(address, pool="1MiB") as listener, attacker(address, kind, raw.STREAM):
        stream = listener.accept()
        with pytest.raises((anywire.TimedOut, anywire.BadFrame)):
            while stream.read(timeout=0.2) == b"":    # an end, which is said once
                pass
        stream.abort()


def test_what_the_peer_says_it_took_is_at_most_what_was_sent():
    with Met() as (channel, _, theirs):
        channel.send(b"one")
        theirs.set("Q", raw.TAKEN, 1 << 60)
        assert channel.unconfirmed == 0
        theirs.set("Q", raw.TAKEN, 0)
        assert channel.unconfirmed == 1
