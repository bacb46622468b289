"""System V message queues as a wire: what stays in them, whose they are, and other programs at the other end."""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import anywire
from anywire import sync
from anywire.ipc.sysv import MessageQueue, ftok

PATIENCE = 20.0
NEXT_PROJECT = 1 << 24
FULL = 8000
"""Bytes of which two fit a queue, and three don't."""


@pytest.fixture
def key() -> Iterator[int]:
    found = 0x40000000 | secrets.randbelow(1 << 24)
    yield found
    for one in (found, found + NEXT_PROJECT):
        try:
            MessageQueue.unlink(one)
        except FileNotFoundError:
            pass


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The C program of the queues' own tests, by whose other commands nothing is needed here."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    assert compiler, "a C compiler, as for building the package"
    program = tmp_path_factory.mktemp("sysv") / "peer"
    source = Path(__file__).parents[1] / "ipc" / "sysv_peer.c"
    subprocess.run([compiler, "-Wall", "-Werror", "-o", str(program), str(source)], check=True, timeout=60)

    def run(*arguments: object) -> str:
        command = [str(program), *map(str, arguments)]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE).stdout.rstrip("\n")

    return run


def until(condition: Callable[[], object]) -> None:
    """Wait for what the kernel does not tell: that somebody waits, or has gone."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.001)


async def until_async(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        await asyncio.sleep(0.001)


def tasks() -> set[str]:
    """The threads of this process, those of C too."""
    return set(os.listdir("/proc/self/task"))


def sleeping(task: str) -> bool:
    try:
        stat = Path(f"/proc/self/task/{task}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] == "S"


def fill(queue: MessageQueue) -> None:
    try:
        while True:
            queue.send(bytes(FULL), block=False)
    except BlockingIOError:
        pass


def gone(key: int) -> bool:
    try:
        MessageQueue.open(key)
    except FileNotFoundError:
        return True
    return False


# -- other programs ---


def test_a_c_program_sees_the_bytes_of_the_messages(key: int, peer: Callable[..., str]) -> None:
    with sync.listen(f"sysv://{key:#x}?max_bytes=9000") as listener:
        assert MessageQueue.open(key).stat().max_bytes == 9000
        peer("send", key, 9, "from elsewhere")
        with listener.accept(timeout=PATIENCE) as channel:
            assert channel.recv(timeout=PATIENCE) == b"from elsewhere"
            with sync.connect(f"sysv://{key}?type=7") as sender:
                sender.send(b"to C")
            assert peer("recv", key, 0) == "7 to C"


def test_a_c_program_answers(key: int, peer: Callable[..., str]) -> None:
    async def main() -> None:
        async with await anywire.connect(f"sysv://{key:#x}?reply=true", timeout=PATIENCE) as channel:
            waiting = asyncio.ensure_future(channel.recv())
            await asyncio.sleep(0)
            await asyncio.to_thread(peer, "send", key + NEXT_PROJECT, 3, "the answer")
            assert await asyncio.wait_for(waiting, PATIENCE) == b"the answer"

    with MessageQueue.create(key, owner=True), MessageQueue.create(key + NEXT_PROJECT, owner=True):
        asyncio.run(main())


def test_a_path_stands_for_its_ftok_key(tmp_path: Path) -> None:
    with sync.listen(f"sysv://{tmp_path}?proj=7&reply=true"):
        for project in (7, 8):
            MessageQueue.open(ftok(tmp_path, project))
    assert gone(ftok(tmp_path, 7)) and gone(ftok(tmp_path, 8))
    with pytest.raises(anywire.Refused, match="nobody listens"):
        sync.connect(f"sysv://{tmp_path}/missing")
    with pytest.raises(FileNotFoundError):
        sync.listen(f"sysv://{tmp_path}/missing")


def test_types_choose_what_is_received(key: int) -> None:
    queue = MessageQueue.create(key)
    for number in (4, 9, 2, 3):
        queue.send(b"%d" % number, number)
    with sync.listen(f"sysv://{key}?type=9") as nines, nines.accept(timeout=PATIENCE) as channel:
        assert channel.recv(timeout=PATIENCE) == b"9"
        with sync.connect(f"sysv://{key}", type=9) as sender:
            sender.send(b"another")
        assert channel.recv(timeout=PATIENCE) == b"another"
    with sync.listen(f"sysv://{key}?type=-3") as low, low.accept(timeout=PATIENCE) as channel:
        assert channel.recv_many() == [b"2", b"3"]
        with pytest.raises(anywire.TimedOut):
            channel.recv(timeout=0)
    assert queue.recv(block=False) == (b"4", 4)
    with pytest.raises(anywire.AddressError, match="1 or more"):
        sync.connect(f"sysv://{key}?type=-3")


# -- what stays, and whose it is ---


def test_sending_needs_no_reader_and_survives_writer_and_listener(key: int) -> None:
    sync.listen(f"sysv://{key}?keep=true&max_bytes=1000").close()
    program = "import sys; from anywire import sync; sync.connect(sys.argv[1]).send(b'kept')"
    subprocess.run([sys.executable, "-W", "ignore", "-c", program, f"sysv://{key}"], check=True, timeout=30)
    with sync.listen(f"sysv://{key}") as listener, listener.accept(timeout=PATIENCE) as channel:
        assert channel.recv(timeout=PATIENCE) == b"kept"
    assert not gone(key)                            # it was there before this listener, so it stays


def test_a_listener_takes_away_what_it_made(key: int) -> None:
    with sync.listen(f"sysv://{key}?reply=true"):
        assert not gone(key) and not gone(key + NEXT_PROJECT)
    assert gone(key) and gone(key + NEXT_PROJECT)
    with pytest.raises(anywire.Refused, match="no System V message queue"):
        sync.connect(f"sysv://{key}")


def test_one_listener_and_one_client_that_gets_answers(key: int) -> None:
    with sync.listen(f"sysv://{key}?reply=true") as listener:
        with pytest.raises(OSError, match="somebody receives") as busy:
            sync.listen(f"sysv://{key}?reply=true")
        assert busy.value.errno == errno.EADDRINUSE
        with sync.connect(listener.addresses[0]) as first:
            with pytest.raises(anywire.Refused, match="another client"):
                sync.connect(listener.addresses[0])
            first.send(b"x")
            channel = listener.accept(timeout=PATIENCE)
            channel.send(b"for the first")
        with sync.connect(listener.addresses[0]) as second:
            channel.send(b"for the second")
            assert second.recv(timeout=PATIENCE) == b"for the second"
        channel.close()


@pytest.mark.parametrize("front", ["async", "blocking"])
def test_a_killed_listener_that_waited_leaves_its_messages_to_the_next(key: int, front: str) -> None:
    program = """if True:
        import asyncio, sys, anywire
        from anywire import sync

        def blocking():
            channel = sync.listen(sys.argv[1]).accept()
            print(channel.recv().decode(), flush=True)
            channel.recv()

        async def main():
            async with anywire.listen(sys.argv[1]) as listener:
                channel = await listener.accept()
                print((await channel.recv()).decode(), flush=True)
                await channel.recv()

        blocking() if sys.argv[2] == "blocking" else asyncio.run(main())
    """
    queue = MessageQueue.create(key)
    queue.send(b"on")
    with subprocess.Popen([sys.executable, "-c", program, f"sysv://{key}", front], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"on\n"
        process.send_signal(signal.SIGKILL)
    queue.send(b"late")
    with sync.listen(f"sysv://{key}") as listener, listener.accept(timeout=PATIENCE) as channel:
        assert channel.recv(timeout=PATIENCE) == b"late"


@pytest.mark.parametrize("front", ["async", "blocking"])
def test_a_sender_killed_while_it_waits_for_room_leaves_nothing_torn(key: int, front: str) -> None:
    program = """if True:
        import asyncio, sys, anywire
        from anywire import sync

        def blocking():
            channel = sync.connect(sys.argv[1])
            for number in range(100):
                print(number, flush=True)
                channel.send(bytes([number]) * 8000)

        async def main():
            channel = await anywire.connect(sys.argv[1])
            for number in range(100):
                print(number, flush=True)
                await channel.send(bytes([number]) * 8000)

        blocking() if sys.argv[2] == "blocking" else asyncio.run(main())
    """
    queue = MessageQueue.create(key)
    with subprocess.Popen([sys.executable, "-c", program, f"sysv://{key}", front], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(3)] == [b"0\n", b"1\n", b"2\n"]
        process.send_signal(signal.SIGKILL)
    assert [queue.recv(block=False)[0] for _ in range(queue.depth)] == [bytes(8000), b"\1" * 8000]
    with sync.connect(f"sysv://{key}") as sender:
        sender.send(b"on it goes", timeout=PATIENCE)
    assert queue.recv(block=False) == (b"on it goes", 1)


def test_kills_at_random_moments() -> None:
    """Of senders and listeners; `make evidence` makes thousands."""
    program = Path(__file__).resolve().parents[2] / "evidence" / "kills.py"
    command = [sys.executable, "-W", "ignore", str(program), "--wires", "sysv", "--kills", "30"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "30 kills" in done.stdout and "descriptors left: 0" in done.stdout


def test_the_mode_is_that_of_the_queues(key: int) -> None:
    with sync.listen(f"sysv://{key}?mode=0622"):
        assert MessageQueue.open(key).stat().mode & 0o777 == 0o622


def test_a_queue_of_another_size_is_not_taken_for_it(key: int) -> None:
    MessageQueue.create(key, max_bytes=1000)
    with pytest.raises(OSError, match="for 1000 bytes"):
        sync.listen(f"sysv://{key}?max_bytes=2000")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_what_other_users_may_do(key: int) -> None:
    program = """if True:
        import os, sys, anywire, anywire.wires.sysv              # what it needs, for it may not be readable later
        from anywire import sync
        os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
        box, private = sys.argv[1:]
        with sync.connect(box) as channel:                     # a letter box: it may be written to, and not looked into
            assert channel.peer.uid == 0
            channel.send(b"a letter")
            try:
                channel.send(bytes(900))
            except anywire.TooLarge as error:
                assert error.limit == 800, error
        for refused in (lambda: sync.listen(private), lambda: sync.connect(private),
                        lambda: sync.listen(f"sysv://{int(private[7:], 0) + 1}?max_bytes=100MiB")):
            try:
                refused()
            except PermissionError as error:
                print(error)
    """
    MessageQueue.create(key, 0o600)
    other = key ^ 0x00800000
    with sync.listen(f"sysv://{other}?mode=0622&max_bytes=800") as listener:
        command = [sys.executable, "-c", program, f"sysv://{other}", f"sysv://{key}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        assert done.returncode == 0, done.stderr
        with listener.accept(timeout=PATIENCE) as channel:
            assert channel.recv(timeout=PATIENCE) == b"a letter"
    listening, connecting, large = done.stdout.splitlines()
    assert "listen sysv" in listening and "connect sysv" in connecting and "kernel.msgmnb" in large


# -- ends ---


def test_what_is_in_the_queue_comes_before_the_end(key: int) -> None:
    async def main() -> list[bytes]:
        async with anywire.listen(f"sysv://{key}") as listener, anywire.connect(f"sysv://{key}") as sender:
            for number in range(4):
                await sender.send(b"%d" % number)
            channel = await listener.accept()
            listener.close()
            assert not gone(key)
            with pytest.raises(OSError, match="somebody receives"):
                anywire.listen(f"sysv://{key}")
            found = [message async for message in channel]
            assert gone(key)
            await channel.close()
            return found

    assert asyncio.run(main()) == [b"0", b"1", b"2", b"3"]


def test_a_waiting_channel_ends_with_its_listener(key: int) -> None:
    async def main() -> None:
        async with anywire.listen(f"sysv://{key}") as listener, anywire.connect(f"sysv://{key}") as sender:
            await sender.send(b"x")
            channel = await listener.accept()
            assert await channel.recv() == b"x"
            waiting = asyncio.ensure_future(channel.recv())
            await asyncio.sleep(0)
            listener.close()
            with pytest.raises(anywire.EndOfChannel):
                await asyncio.wait_for(waiting, PATIENCE)
            await channel.close()

    asyncio.run(main())


class Calling(threading.Thread):
    """A call on a thread, and what came of it."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.call = call
        self.outcome: Any = None
        self.start()
        until(lambda: self.native_id is not None and sleeping(str(self.native_id)))

    def run(self) -> None:
        try:
            self.outcome = self.call()
        except BaseException as error:
            self.outcome = error

    def result(self) -> Any:
        self.join(PATIENCE)
        assert not self.is_alive()
        return self.outcome


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_a_thread_that_waits_is_ended_by_listener_abort_and_removal(key: int, timeout: float | None) -> None:
    with sync.listen(f"sysv://{key}") as listener, sync.connect(f"sysv://{key}") as sender:
        sender.send(b"x")
        channel = listener.accept(timeout=PATIENCE)
        assert channel.recv() == b"x"
        receiving = Calling(lambda: channel.recv(timeout=timeout))
        listener.close()
        assert isinstance(receiving.result(), anywire.EndOfChannel)
        channel.close()
    for end, expected in (("abort", anywire.ChannelClosed), ("remove", anywire.PeerLost)):
        queue = MessageQueue.create(key)
        queue.send(b"x")
        with sync.listen(f"sysv://{key}") as listener:
            channel = listener.accept(timeout=PATIENCE)
            assert channel.recv() == b"x"
            receiving = Calling(lambda channel=channel: channel.recv(timeout=timeout))  # type: ignore[misc]
            sender = sync.connect(f"sysv://{key}")
            channel.abort() if end == "abort" else queue.remove()
            assert isinstance(receiving.result(), expected)
            channel.abort()
            if end == "abort":
                fill(queue)
                sending = Calling(lambda sender=sender: sender.send(bytes(FULL), timeout=timeout))  # type: ignore[misc]
                sender.abort()
                assert isinstance(sending.result(), anywire.ChannelClosed)
                queue.remove()
            else:
                with pytest.raises(anywire.PeerLost, match="the queue was removed"):
                    sender.send(b"y")
                with pytest.raises(OSError, match="the queue was removed") as removed:
                    listener.accept(timeout=PATIENCE)
                assert removed.value.errno == errno.EIDRM
                sender.abort()


def test_a_removed_queue_ends_the_waits_of_tasks(key: int) -> None:
    async def main() -> None:
        queue = MessageQueue.create(key)
        queue.send(b"x")
        async with anywire.listen(f"sysv://{key}") as listener, anywire.connect(f"sysv://{key}") as sender:
            channel = await listener.accept()
            assert await channel.recv() == b"x"
            receiving = asyncio.ensure_future(channel.recv())
            await asyncio.sleep(0)
            queue.remove()
            with pytest.raises(anywire.PeerLost, match="the queue was removed"):
                await asyncio.wait_for(receiving, PATIENCE)
            with pytest.raises(anywire.PeerLost):
                await channel.recv()
            channel.abort()
            sender.abort()
        queue = MessageQueue.create(key)
        fill(queue)
        sender = await anywire.connect(f"sysv://{key}")
        sending = asyncio.ensure_future(sender.send(bytes(FULL)))
        await asyncio.sleep(0.01)
        queue.remove()
        with pytest.raises(anywire.PeerLost, match="the queue was removed"):
            await asyncio.wait_for(sending, PATIENCE)
        sender.abort()

    asyncio.run(main())


@pytest.mark.parametrize("front", ["async", "blocking"])
def test_answers_outlive_the_listener_that_left_them(key: int, front: str) -> None:
    listener = sync.listen(f"sysv://{key}?reply=true")
    if front == "async":
        asyncio.run(left(listener, key))
    else:
        with sync.connect(listener.addresses[0]) as client:
            client.send(b"x")
            with listener.accept(timeout=PATIENCE) as channel:
                channel.send(b"answer")
            listener.close()
            assert gone(key) and not gone(key + NEXT_PROJECT)
            assert client.recv() == b"answer"
            with pytest.raises(anywire.PeerLost, match="removed"):
                client.recv()
    assert gone(key + NEXT_PROJECT)


async def left(listener: Any, key: int) -> None:
    """A listener that closes while its client has not taken an answer."""
    client = await anywire.connect(f"sysv://{key}?reply=true")
    MessageQueue.open(key + NEXT_PROJECT).send(b"answer")
    listener.close()
    assert gone(key) and not gone(key + NEXT_PROJECT)
    assert await client.recv() == b"answer"
    with pytest.raises(anywire.PeerLost, match="removed"):
        await asyncio.wait_for(client.recv(), PATIENCE)
    await client.close()


def test_ends_do_what_they_can(key: int) -> None:
    with sync.listen(f"sysv://{key}?max_bytes=100") as listener, sync.connect(f"sysv://{key}") as sender:
        with pytest.raises(anywire.Unsupported, match="reply=true"):
            sender.recv(timeout=1)
        with pytest.raises(anywire.TooLarge, match="larger max_bytes=.*kernel.msgmnb") as large:
            sender.send(bytes(101))
        assert (large.value.size, large.value.limit, large.value.option) == (101, 100, "max_bytes")
        MessageQueue.open(key).set(max_bytes=200)
        sender.send(bytes(101))                         # the limit is looked at again
        with listener.accept(timeout=PATIENCE) as channel:
            with pytest.raises(anywire.Unsupported, match="reply=true"):
                channel.send(b"y")
            assert channel.recv(timeout=PATIENCE) == bytes(101)
    with sync.listen(f"sysv://{key}") as listener, sync.connect(f"sysv://{key}") as sender:
        largest = int(Path("/proc/sys/kernel/msgmax").read_text())
        with pytest.raises(anywire.TooLarge, match="sysctl -w kernel.msgmax="):
            sender.send(bytes(largest + 1))
        small = sync.connect(f"sysv://{key}", max_message=10)
        with pytest.raises(anywire.TooLarge, match="max_message"):
            small.send(bytes(11))
        small.close()
        sender.send(bytes(11))
        sender.send(b"fits")
        with sync.listen(f"sysv://{key}?type=-5", max_message=10) as narrow, narrow.accept(timeout=PATIENCE) as channel:
            with pytest.raises(anywire.TooLarge, match="it was dropped"):
                channel.recv(timeout=PATIENCE)
            assert channel.recv(timeout=PATIENCE) == b"fits"
            assert channel.stats().drops == 1


@pytest.mark.parametrize("front", ["async", "blocking"])
def test_who_is_refused_brings_no_connection_again(key: int, front: str) -> None:
    """The sender is not known, so its message is what is refused: the one that would bring the connection."""
    came: list[anywire.Peer] = []

    def authorize(peer: anywire.Peer) -> bool:
        came.append(peer)
        return len(came) > 2

    def send() -> None:
        with sync.connect(f"sysv://{key}") as sender:
            for message in (b"", b"refused", b"admitted"):
                sender.send(message)

    async def main() -> bytes:
        async with anywire.listen(f"sysv://{key}", authorize=authorize) as listener:
            send()
            async with await listener.accept(timeout=PATIENCE) as channel:
                return await channel.recv()

    if front == "async":
        assert asyncio.run(main()) == b"admitted"
    else:
        with sync.listen(f"sysv://{key}", authorize=authorize) as listener:
            send()
            with listener.accept(timeout=PATIENCE) as channel:
                assert channel.recv(timeout=PATIENCE) == b"admitted"
    assert [peer.uid for peer in came] == [None] * 3


def test_what_is_there_is_found_without_waiting(key: int) -> None:
    """Although the helper's thread, which has been told of it, may not have run yet."""
    queue = MessageQueue.create(key)
    for number in range(200):
        with sync.listen(f"sysv://{key}") as listener:
            with pytest.raises(anywire.TimedOut):
                listener.accept(timeout=0)
            queue.send(b"%d" % number)
            with listener.accept(timeout=0) as channel:
                assert channel.recv(timeout=0) == b"%d" % number

    async def main() -> None:
        async with anywire.listen(f"sysv://{key}") as listener:
            queue.send(b"x")
            channel = await listener.accept()
            assert await channel.recv() == b"x"
            for number in range(200):
                with pytest.raises(anywire.TimedOut):
                    await channel.recv(timeout=0)
                queue.send(b"%d" % number)
                receiving = channel.recv()
                with pytest.raises(StopIteration) as returned:      # it does not suspend
                    receiving.send(None)
                assert returned.value.value == b"%d" % number
            await channel.close()

    asyncio.run(main())


def test_a_bell_that_rings_for_nothing_keeps_nobody_busy(key: int) -> None:
    async def main() -> None:
        async with anywire.listen(f"sysv://{key}") as listener, anywire.connect(f"sysv://{key}") as sender:
            accepting = asyncio.ensure_future(listener.accept())
            await asyncio.sleep(0.01)                   # its helper's thread waits
            (acceptor,) = listener._acceptors
            acceptor.watch.ring()
            await asyncio.sleep(0.01)
            used = time.process_time()
            await asyncio.sleep(0.2)
            assert time.process_time() - used < 0.1
            await sender.send(b"x")
            channel = await asyncio.wait_for(accepting, PATIENCE)
            acceptor.watch.ring()
            await asyncio.sleep(0.01)
            used = time.process_time()
            await asyncio.sleep(0.2)
            assert time.process_time() - used < 0.1
            await channel.close()

    asyncio.run(main())


# -- waiting ---


def test_empty_messages_are_messages(key: int) -> None:
    async def main() -> None:
        queue = MessageQueue.create(key)
        async with anywire.listen(f"sysv://{key}") as listener:
            accepting = asyncio.ensure_future(listener.accept())
            await asyncio.sleep(0.01)                   # the listener waits, and has to take it to know of it
            queue.send(b"")
            channel = await asyncio.wait_for(accepting, PATIENCE)
            assert await channel.recv() == b""
            receiving = asyncio.ensure_future(channel.recv())
            await asyncio.sleep(0.01)
            queue.send(b"")
            queue.send(b"x")
            assert await asyncio.wait_for(receiving, PATIENCE) == b""
            assert await channel.recv() == b"x"
            # Nobody receives it, and somebody else will.
            with pytest.raises(anywire.TimedOut):
                await channel.recv(timeout=0.001)
            queue.send(b"", 5)
            await until_async(lambda: queue.depth == 0)
            await channel.close()
            assert queue.recv(block=False) == (b"", 5)

    asyncio.run(main())
    queue = MessageQueue.open(key)
    queue.send(b"x")
    with sync.listen(f"sysv://{key}") as listener, listener.accept(timeout=PATIENCE) as channel:
        assert channel.recv() == b"x"
        for timeout in (None, PATIENCE):
            receiving = Calling(lambda timeout=timeout: channel.recv(timeout=timeout))  # type: ignore[misc]
            queue.send(b"")
            assert receiving.result() == b""


@pytest.mark.parametrize("full", ["of bytes", "of messages"])
def test_an_empty_message_goes_back_into_a_full_queue_if_it_fits(key: int, full: str) -> None:
    """As the documentation says: it needs no bytes, but a queue has at most as many messages as bytes."""
    most = 4

    async def main() -> list[bytes]:
        with sync.listen(f"sysv://{key}?reply=true&max_bytes={most}") as listener:
            answers = MessageQueue.open(key + NEXT_PROJECT)
            async with anywire.connect(listener.addresses[0]) as client:
                with pytest.raises(anywire.TimedOut):
                    await client.recv(timeout=0.001)
                answers.send(b"")                       # the thread that waits takes it
                await until_async(lambda: not answers.depth)
                for message in [bytes(most)] if full == "of bytes" else [b""] * most:
                    answers.send(message, block=False)
                with pytest.raises(BlockingIOError):
                    answers.send(b"x", block=False)
            return [answers.recv(block=False)[0] for _ in range(answers.depth)]

    assert asyncio.run(main()) == ([bytes(most), b""] if full == "of bytes" else [b""] * most)


def test_a_listener_of_any_type_and_one_of_a_type_share_the_messages(key: int) -> None:
    """They are not kept apart: who takes a message first has it. Those of one type are."""
    with sync.listen(f"sysv://{key}") as everything, sync.listen(f"sysv://{key}?type=3") as three:
        with pytest.raises(OSError, match="somebody receives"):
            sync.listen(f"sysv://{key}?type=3")
        with sync.connect(f"sysv://{key}?type=3") as sender:
            for listener in (everything, three):
                sender.send(b"once")
                with listener.accept(timeout=PATIENCE) as channel:
                    assert channel.recv(timeout=PATIENCE) == b"once"
                assert not MessageQueue.open(key).depth


def test_a_cancelled_send_has_gone_or_not_and_nothing_overtakes(key: int) -> None:
    """The queue has room for one message at a time; sends are cancelled at all moments."""

    async def main() -> None:
        queue = MessageQueue.create(key, max_bytes=FULL)
        sender = await anywire.connect(f"sysv://{key}")
        got: list[int] = []
        went: list[int] = []
        for number in range(200):
            sending = asyncio.ensure_future(sender.send(bytes([number]) * FULL))
            for _ in range(number % 4):
                await asyncio.sleep(0)
            if number % 3 == 0:
                got += [queue.recv(block=False)[0][0] for _ in range(queue.depth)]
            if number % 2:
                sending.cancel()
            elif number % 3:
                got += [queue.recv(block=False)[0][0] for _ in range(queue.depth)]
            before = sender.stats().messages_sent
            try:
                await asyncio.wait_for(sending, 0.01 if number % 5 == 0 else PATIENCE)
            except (asyncio.CancelledError, TimeoutError):
                pass
            if sender.stats().messages_sent > len(went):
                went.append(number)
            assert before <= sender.stats().messages_sent == len(went)
        got += [queue.recv(block=False)[0][0] for _ in range(queue.depth)]
        assert got == went
        assert len(went) < 200                          # some were cancelled while they waited
        await sender.close()

    asyncio.run(main())


def test_senders_that_wait_keep_their_order(key: int) -> None:
    async def main() -> None:
        queue = MessageQueue.create(key, max_bytes=FULL)
        async with anywire.connect(f"sysv://{key}") as sender:
            sending = [asyncio.ensure_future(sender.send(bytes([number]) * FULL)) for number in range(20)]
            await asyncio.sleep(0)
            assert not sender.try_send(b"x")
            sending[7].cancel()
            got = [(await asyncio.to_thread(queue.recv, timeout=PATIENCE))[0][0] for _ in range(19)]
            await asyncio.wait(sending)
            assert got == [*range(7), *range(8, 20)]
            queue.send(bytes(FULL))
            assert not sender.try_send(b"x")
            with pytest.raises(anywire.TimedOut):
                await sender.send(b"x", timeout=0.01)
            assert queue.depth == 1

    asyncio.run(main())


def test_a_sender_in_a_thread_waits_for_room(key: int) -> None:
    queue = MessageQueue.create(key, max_bytes=FULL)
    queue.send(bytes(FULL))
    with sync.connect(f"sysv://{key}") as sender:
        for timeout in (None, PATIENCE):
            sending = Calling(lambda timeout=timeout: sender.send(b"1" * FULL, timeout=timeout))  # type: ignore[misc]
            assert not sender.try_send(b"x")
            queue.recv()
            assert sending.result() is None
        with pytest.raises(anywire.TimedOut):
            sender.send(b"x", timeout=0.01)
        assert queue.recv(block=False)[0] == b"1" * FULL and queue.depth == 0
        assert sender.stats().messages_sent == 2


def test_a_signal_handler_that_raises_loses_nothing(key: int) -> None:
    def handler(number: int, frame: object) -> None:
        raise InterruptedError

    queue = MessageQueue.create(key, max_bytes=FULL)
    before = signal.signal(signal.SIGALRM, handler)
    try:
        with sync.listen(f"sysv://{key}") as listener, sync.connect(f"sysv://{key}") as sender:
            sender.send(b"x")
            with listener.accept(timeout=PATIENCE) as channel:
                assert channel.recv() == b"x"
                for timeout in (None, PATIENCE):
                    with pytest.raises(InterruptedError):
                        signal.setitimer(signal.ITIMER_REAL, 0.01)
                        channel.recv(timeout=timeout)
                    queue.send(bytes(FULL))
                    with pytest.raises(InterruptedError):
                        signal.setitimer(signal.ITIMER_REAL, 0.01)
                        sender.send(b"not sent", timeout=timeout)
                    assert channel.recv(timeout=timeout) == bytes(FULL)
                    assert queue.depth == 0
    finally:
        signal.signal(signal.SIGALRM, before)


def test_threads_are_there_only_while_needed_and_idle(key: int) -> None:
    async def main() -> None:
        before = tasks()
        async with anywire.listen(f"sysv://{key}") as listener, anywire.connect(f"sysv://{key}") as sender:
            await sender.send(b"x")
            channel = await listener.accept()
            assert tasks() == before                    # nobody had to wait
            assert await channel.recv() == b"x"
            receiving = asyncio.ensure_future(channel.recv())
            await asyncio.sleep(0)
            (helper,) = tasks() - before
            await until_async(lambda: sleeping(helper))
            ran = Path(f"/proc/self/task/{helper}/schedstat").read_text()
            await asyncio.sleep(0.05)
            assert Path(f"/proc/self/task/{helper}/schedstat").read_text() == ran
            await sender.send(b"y")
            assert await asyncio.wait_for(receiving, PATIENCE) == b"y"
            await channel.close()
            assert helper not in tasks()
            # A channel that is forgotten ends its thread too.
            forgotten = await anywire.connect(f"sysv://{key}")
            fill(MessageQueue.open(key))
            with pytest.raises(anywire.TimedOut):
                await forgotten.send(bytes(FULL), timeout=0.01)
            # The listener, which has a thread again, and the forgotten one.
            await until_async(lambda: len(tasks() - before) <= 2)
            forgotten.abort()
        assert tasks() == before

    asyncio.run(main())


def test_a_forked_child_leaves_the_waiting_parent_alone(key: int) -> None:
    async def main() -> None:
        async with anywire.listen(f"sysv://{key}") as listener, anywire.connect(f"sysv://{key}") as sender:
            await sender.send(b"x")
            channel = await listener.accept()
            assert await channel.recv() == b"x"
            receiving = asyncio.ensure_future(channel.recv())
            await asyncio.sleep(0.01)
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    try:
                        channel.try_send(b"")
                    except anywire.Forked:
                        status = 0
                    channel.abort()
                    listener.close()
                finally:
                    os._exit(status)
            assert await asyncio.to_thread(os.waitpid, pid, 0) == (pid, 0)
            await sender.send(b"y")
            assert await asyncio.wait_for(receiving, PATIENCE) == b"y"
            await channel.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("sysv://", "key is missing"),
        ("sysv://name", "a number of 32 bits"),
        ("sysv://0x100000000", "a number of 32 bits"),
        ("sysv://4294967296", "a number of 32 bits"),
        ("sysv://0", "IPC_PRIVATE"),
        ("sysv://5?proj=2", "with a path"),
        ("sysv://5:6", "no port"),
        ("sysv://host/path", "no host"),
        ("sysv:@name", "no abstract name"),
        ("sysv://5?max_bytes=0", "takes no messages"),
    ],
)
def test_bad_addresses(address: str, says: str) -> None:
    with pytest.raises(anywire.AddressError, match=says):
        sync.listen(address)


@pytest.mark.parametrize("options", ["", "?reply=true"], ids=["one-way", "reply"])
def test_a_channel_goes_on_in_another_front(key: int, options: str) -> None:
    """And in another process, which `test_a_listener_goes_on_in_another_process` shows of both ends."""

    async def main() -> None:
        with sync.listen(f"sysv://{key}{options}") as listener:
            client = sync.connect(listener.addresses[0], type=3)
            client.send(b"before")
            handle = client.detach()
            with pytest.raises(anywire.ChannelClosed):
                client.send(b"detached")
            moved = await anywire.attach(handle)
            await moved.send(b"after")
            assert moved.unconfirmed == 2
            queue = MessageQueue.open(key)
            assert [queue.recv(timeout=PATIENCE) for _ in range(2)] == [(b"before", 3), (b"after", 3)]
            if options:
                with pytest.raises(anywire.Refused, match="another client"):        # its place went with it
                    sync.connect(listener.addresses[0])
                answers = MessageQueue.open(key + NEXT_PROJECT)
                waiting = asyncio.ensure_future(moved.recv())                       # a thread waits by now
                await asyncio.sleep(0)
                answers.send(b"")
                assert await asyncio.wait_for(waiting, PATIENCE) == b""
                with pytest.raises(anywire.TimedOut):
                    await moved.recv(timeout=0.01)
                answers.send(b"")               # the thread takes it, and it comes before what is sent later
                await until_async(lambda: not answers.depth)
                handle = moved.detach()
                answers.send(b"later")
                with sync.attach(handle) as again:
                    assert [again.recv(timeout=PATIENCE) for _ in range(2)] == [b"", b"later"]
                sync.connect(listener.addresses[0]).close()                         # the place is free
            else:
                await moved.close()

    asyncio.run(main())


def test_a_listener_goes_on_in_another_process(key: int) -> None:
    """With its messages, its place and the duty to remove; the client's channel is handed over, too."""
    program = """
        import errno, sys
        from anywire import sync
        from anywire.contract.handle import Handle
        with sync.connect(sys.argv[1]) as channel:
            handles = []
            for _ in range(2):
                packed, fds = channel.recv_fds()
                handles.append(Handle.unpack(packed, fds))
            listener, client = sync.attach(handles[0], authorize=None), sync.attach(handles[1])
            client.send(b"from there")
            busy = 0
            try:
                sync.listen(listener.addresses[0])
            except OSError as error:
                busy = error.errno
            assert busy == errno.EADDRINUSE
            with listener.accept(timeout=20) as there:
                got = [there.recv(timeout=20) for _ in range(3)]
                there.send(b"answer")
            got.append(client.recv(timeout=20))
            client.close()
            listener.close()
            channel.send(repr(got).encode())
    """
    address = f"unix:@anywire-test-{secrets.token_hex(6)}"
    listener = sync.listen(f"sysv://{key}?reply=true")
    client = sync.connect(listener.addresses[0])
    with pytest.raises(anywire.TimedOut):
        listener.accept(timeout=0.01)
    client.send(b"")                            # the thread that waits for the listener takes it
    until(lambda: not MessageQueue.open(key).depth)
    client.send(b"before")
    with sync.listen(address) as local:
        command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program), address]
        with subprocess.Popen(command) as process:
            try:
                with local.accept(timeout=PATIENCE) as channel:
                    for handle in (listener.detach(), client.detach()):
                        with handle:
                            channel.send_fds(handle.fds, handle.pack())
                    assert channel.recv(timeout=PATIENCE) == repr([b"", b"before", b"from there", b"answer"]).encode()
                assert process.wait(PATIENCE) == 0
            finally:
                process.kill()
    assert gone(key) and gone(key + NEXT_PROJECT)


def test_what_a_listener_accepted_stays_with_it(key: int) -> None:
    with sync.listen(f"sysv://{key}") as listener, sync.connect(f"sysv://{key}") as sender:
        sender.send(b"one")
        channel = listener.accept(timeout=PATIENCE)
        with pytest.raises(anywire.Unsupported, match="stays with its listener.*detach the listener"):
            channel.detach()
        with pytest.raises(anywire.Busy, match="close the channel first"):
            listener.detach()
        assert channel.recv(timeout=PATIENCE) == b"one"             # both go on
        sender.send(b"two")
        channel.close()
        with sync.attach(listener.detach(), authorize=None) as again, again.accept(timeout=PATIENCE) as other:
            assert other.recv(timeout=PATIENCE) == b"two"


def test_a_queue_of_another_ipc_namespace_is_not_attached(key: int) -> None:
    """Its id would be another queue there. To make a namespace takes privileges, so the handles lie about theirs."""
    with sync.listen(f"sysv://{key}") as listener:
        for handle in (sync.connect(f"sysv://{key}").detach(), listener.detach()):
            handle.state["space"] += 1
            with pytest.raises(anywire.Unsupported, match="another IPC namespace"):
                sync.attach(handle)
