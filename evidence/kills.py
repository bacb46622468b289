"""kill -9, thousands of times: what the survivor was told against what really arrived.

    python evidence/kills.py [--kills 500] [--wires tcp,unix,seqpacket,fifo,pipe,shm,mq,sysv]

Each round starts a receiver in a process of its own, floods it with numbered messages of random sizes, and kills it
with SIGKILL at a random moment. The receiver counts in shared memory what its application was handed, so the truth
survives it. Checked each time: the sender gets PeerLost; messages accepted <= messages handed over + `unconfirmed`
(nothing is lost silently), and what was confirmed was handed over (`accepted - unconfirmed <= handed over`); every
answer that came is whole and in order; the sender knew within 100 ms; afterwards it holds no descriptor more than
before.

shm counts what is handed over in memory that survives, so there `unconfirmed` must be exact, to the one message that
the victim had in its hands; and nothing is left of it: no mapping here, nothing in /dev/shm, no socket's name. What the
victim had published is still received in order: its answers, after its death.

mq and sysv are checked in both directions, since their kernel keeps what was sent. A sender is killed in mid-send: all
that was sent comes whole and in order, to the one message that it had no time to count. A listener is killed: what it
had not received is still in the queue for the next one, in order, to the one message that it had in its hands.

fifo is `?reply=true`: one way, nothing tells what a reader took. On seqpacket nothing confirms either, so there
`unconfirmed` is all that was accepted; that the loss is told at once holds there too.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import signal
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable

import anywire
import anywire.sync
from anywire.contract.errors import PeerLost
from anywire.ipc import MessageQueue, sysv
from anywire.wires.mq import name_of

COUNT = struct.Struct("<Q")
LARGEST = 200_000
QUEUES = {
    "mq": f"mq:///anywire-kills-{os.getpid()}?depth=8&message_size=8192",
    "sysv": f"sysv://{0x43000000 | os.getpid():#x}",
}


def receive(shared: mmap.mmap, channel: anywire.sync.Channel, answers: bool) -> None:
    """The victim: count what was handed over, check order and size, answer some."""
    for number, message in enumerate(channel, 1):
        (got,) = COUNT.unpack_from(message)
        if got != number - 1 or len(message) < COUNT.size:
            os._exit(3)
        shared[:8] = COUNT.pack(number)
        if answers and number % 7 == 0:
            channel.send(message[:8])


def start(wire: str, shared: mmap.mmap, answers: bool) -> tuple[int, anywire.sync.Channel]:
    """A victim process and the channel to it."""
    if wire == "pipe":
        ours, theirs = anywire.sync.pipe()
        pid = os.fork()
        if pid == 0:
            ours.close()
            receive(shared, anywire.sync.attach(theirs), answers)
            os._exit(0)
        theirs.close()
        return pid, anywire.sync.attach(ours)
    if wire == "fifo":
        return start_fifo(shared, answers)
    unix = f"unix:@anywire-kills-{os.getpid()}"
    address = {
        "tcp": "tcp://127.0.0.1:0",
        "unix": unix,
        "seqpacket": f"{unix}-packets?type=seqpacket",
        "shm": f"shm://anywire-kills-{os.getpid()}?pool=1MiB&ring=64KiB",
    }[wire]
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        listener = anywire.sync.listen(address)               # a forked child may not use its parent's
        os.write(writing, str(listener.addresses[0]).encode())
        receive(shared, listener.accept(), answers)
        os._exit(0)
    os.close(writing)
    where = os.read(reading, 4096).decode()
    os.close(reading)
    return pid, anywire.sync.connect(where)


def start_fifo(shared: mmap.mmap, answers: bool) -> tuple[int, anywire.sync.Channel]:
    """As above, with a name in a directory that is gone as soon as both are connected."""
    with tempfile.TemporaryDirectory() as directory:
        address = f"fifo://{directory}/kills?reply=true"
        pid = os.fork()
        if pid == 0:
            receive(shared, anywire.sync.listen(address).accept(), answers)
            os._exit(0)
        return pid, anywire.sync.connect(address, wait=20)


def one(wire: str, seed: int, shared: mmap.mmap) -> dict[str, float]:
    """One kill; raises AssertionError when a promise did not hold."""
    rng = random.Random(seed)
    shared[:8] = COUNT.pack(0)
    if wire in QUEUES:
        return (killed_sender if rng.random() < 0.5 else killed_listener)(QUEUES[wire], rng, shared)
    answers = rng.random() < 0.5
    pid, channel = start(wire, shared, answers)
    killed = mmap.mmap(-1, 8)
    killer = kill_later(rng, pid, killed)
    accepted = 0
    answered = -1
    body = bytes(LARGEST)
    try:
        while True:
            size = 8 if rng.random() < 0.7 else rng.randrange(8, LARGEST)
            channel.send(COUNT.pack(accepted) + body[: size - 8])
            accepted += 1
            if answers and accepted % 50 == 0:
                for answer in drain(channel):
                    (number,) = COUNT.unpack(answer)
                    assert number % 7 == 6 and number > answered, (number, answered)
                    answered = number
    except PeerLost as error:
        knew = time.monotonic()
        unconfirmed = error.unconfirmed
    os.waitpid(killer, 0)
    _, status = os.waitpid(pid, 0)
    if wire == "shm":
        unconfirmed_at_last, answered = last_words(channel, answered)
        assert unconfirmed_at_last == unconfirmed, (unconfirmed_at_last, unconfirmed)
    channel.abort()
    (when,) = struct.unpack("<d", killed[:8])
    killed.close()
    (handed_over,) = COUNT.unpack(shared[:8])
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, status
    # The message whose send raised may have gone in part: it is not accepted, and `unconfirmed` may count it.
    # On shm a message counts as taken at once, and the victim may have died with it in its hands.
    in_hands = wire == "shm"
    assert accepted <= handed_over + unconfirmed + in_hands, (accepted, handed_over, unconfirmed)
    assert accepted - unconfirmed <= handed_over + in_hands, (accepted, handed_over, unconfirmed)
    if wire == "shm":
        assert handed_over <= accepted - unconfirmed <= handed_over + 1, (accepted, handed_over, unconfirmed)
        assert not answers or handed_over - 14 <= answered <= handed_over, (answered, handed_over)
        with open("/proc/self/maps") as maps:
            assert "anywire-shm" not in maps.read()
        with open("/proc/net/unix") as sockets:
            assert f"anywire/shm/anywire-kills-{os.getpid()}" not in sockets.read()
        assert not any("anywire" in name for name in os.listdir("/dev/shm"))
    return {"accepted": accepted, "unconfirmed": unconfirmed, "knew": knew - when}


def kill_later(rng: random.Random, pid: int, killed: mmap.mmap) -> int:
    """A process that kills `pid` at a random moment, and writes when into `killed`."""
    sleep = rng.uniform(0.0, 0.03)
    killer = os.fork()
    if killer == 0:
        time.sleep(sleep)
        os.kill(pid, signal.SIGKILL)
        killed[:8] = struct.pack("<d", time.monotonic())
        os._exit(0)
    return killer


def in_queue(number: int) -> bytes:
    """The message of this number, of a size of its own: it shows what is torn."""
    return COUNT.pack(number) * (1 + number * 7919 % 1024)


def victim(work: Callable[[], None]) -> int:
    """A process that does it until it is killed."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(3)
    return pid


def dead(pid: int) -> bool:
    """Whether the victim is, which was told to send or receive until then."""
    done, status = os.waitpid(pid, os.WNOHANG)
    assert not done or os.waitstatus_to_exitcode(status) == -signal.SIGKILL, status
    return bool(done)


def killed_sender(address: str, rng: random.Random, shared: mmap.mmap) -> dict[str, float]:
    """mq, sysv: its messages against what it had counted."""

    def send() -> None:
        channel = anywire.sync.connect(address, wait=20)
        for number in range(1 << 40):
            channel.send(in_queue(number))
            shared[:8] = COUNT.pack(number + 1)

    pid = victim(send)
    got, over = 0, False
    with anywire.sync.listen(address) as listener, mmap.mmap(-1, 8) as killed:
        killer = kill_later(rng, pid, killed)
        channel = None
        while not over:
            over = dead(pid)                                   # then what is there now is all there is
            try:
                if channel is None:
                    channel = listener.accept(timeout=0 if over else 0.01)
                while True:
                    assert channel.recv(timeout=0 if over else 0.01) == in_queue(got), got
                    got += 1
            except TimeoutError:
                pass
        if channel is not None:
            channel.close()
        os.waitpid(killer, 0)
    (sent,) = COUNT.unpack(shared[:8])
    assert sent <= got <= sent + 1, (sent, got)
    return {"accepted": got, "unconfirmed": 0, "knew": 0.0}


def killed_listener(address: str, rng: random.Random, shared: mmap.mmap) -> dict[str, float]:
    """mq, sysv: what it had received and what is left against what was sent."""

    def receive_all() -> None:
        for number, message in enumerate(anywire.sync.listen(address).accept()):
            assert message == in_queue(number), number
            shared[:8] = COUNT.pack(number + 1)

    pid = victim(receive_all)
    with anywire.sync.connect(address, wait=20) as channel, mmap.mmap(-1, 8) as killed:
        killer = kill_later(rng, pid, killed)
        accepted = 0
        while True:
            try:
                channel.send(in_queue(accepted), timeout=0.01)
                accepted += 1
            except TimeoutError:                               # full, so perhaps nobody receives any more
                if dead(pid):
                    break
        accepted += channel.try_send(in_queue(accepted))       # it may have emptied the queue just before it died
        os.waitpid(killer, 0)
    (received,) = COUNT.unpack(shared[:8])
    with anywire.sync.listen(address) as listener, listener.accept(timeout=20) as channel:
        left = drain(channel)
        assert left == [in_queue(number) for number in range(accepted - len(left), accepted)], (accepted, len(left))
    if address.startswith("mq:"):                              # it was there before this listener, so it stayed
        MessageQueue.unlink(name_of(channel.address))
    else:
        sysv.MessageQueue.unlink(int(channel.address.host, 16))
    assert received <= accepted - len(left) <= received + 1, (received, accepted, len(left))
    return {"accepted": accepted, "unconfirmed": 0, "knew": 0.0}


def last_words(channel: anywire.sync.Channel, answered: int) -> tuple[int, int]:
    """What a dead victim had published: (unconfirmed, as the loss says after it; the last answer)."""
    try:
        while True:
            (number,) = COUNT.unpack(channel.recv())
            assert number == (answered + 7 if answered >= 0 else 6), (number, answered)
            answered = number
    except PeerLost as error:
        return error.unconfirmed, answered


def drain(channel: anywire.sync.Channel) -> list[bytes]:
    """The answers that are here now."""
    try:
        return channel.recv_many(timeout=0)
    except TimeoutError:
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=500, help="for each wire (500)")
    parser.add_argument("--wires", default="tcp,unix,seqpacket,fifo,pipe,shm,mq,sysv")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    shared = mmap.mmap(-1, 4096)
    failed = False
    for wire in arguments.wires.split(","):
        one(wire, 0, shared)                                  # what is imported late has its descriptors now
        descriptors = len(os.listdir("/proc/self/fd"))
        rows = []
        for number in range(arguments.kills):
            try:
                rows.append(one(wire, arguments.seed + number, shared))
            except AssertionError as error:
                print(f"FAIL {wire} seed {arguments.seed + number}: {error}")
                failed = True
        left = len(os.listdir("/proc/self/fd")) - descriptors
        failed |= left != 0
        many = f"{wire:9} {len(rows)} kills: {sum(row['accepted'] for row in rows):.0f} messages"
        if wire in QUEUES:
            print(f"{many} sent, none torn, lost or doubled; descriptors left: {left}")
            continue
        knew = sorted(row["knew"] for row in rows)
        late = sum(1 for value in knew if value > 0.1)
        print(
            f"{many} accepted, unconfirmed "
            f"median {statistics.median(row['unconfirmed'] for row in rows):.0f} "
            f"max {max(row['unconfirmed'] for row in rows):.0f}; "
            f"knew after median {statistics.median(knew) * 1e3:.2f} ms "
            f"max {knew[-1] * 1e3:.2f} ms, {late} later than 100 ms; descriptors left: {left}"
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()
