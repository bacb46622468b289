"""Message queues of the system as a wire: what stays in them, whose they are, and other programs at the other end."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import anywire
from anywire import sync
from anywire.ipc import MessageQueue


@pytest.fixture
def name() -> Iterator[str]:
    found = f"/anywire-test-{secrets.token_hex(6)}"
    yield found
    for suffix in ("", ".reply"):
        try:
            MessageQueue.unlink(found + suffix)
        except FileNotFoundError:
            pass


def test_other_programs_see_the_bytes_of_the_messages(name: str) -> None:
    with sync.listen(f"mq://{name}?depth=4&message_size=100") as listener, MessageQueue.open(name) as queue:
        assert (queue.max_messages, queue.message_size) == (4, 100)
        queue.send(b"from elsewhere")
        with listener.accept(timeout=20) as channel:
            assert channel.recv(timeout=20) == b"from elsewhere"
        with sync.connect(f"mq://{name}?priority=7") as sender:
            sender.send(b"")
            sender.send(bytes(100))
        assert queue.recv_with_priority(20) == (b"", 7)
        assert queue.recv(20) == bytes(100)


def test_sending_needs_no_reader_and_survives_writer_and_listener(name: str) -> None:
    sync.listen(f"mq://{name}?keep=true&depth=4&message_size=100").close()
    program = "import sys; from anywire import sync; sync.connect(sys.argv[1]).send(b'kept')"
    subprocess.run([sys.executable, "-W", "ignore", "-c", program, f"mq://{name}"], check=True, timeout=30)
    with sync.listen(f"mq://{name}") as listener, listener.accept(timeout=20) as channel:
        assert channel.recv(timeout=20) == b"kept"
    MessageQueue.open(name).close()                 # it was there before this listener, so it stays
    MessageQueue.unlink(name)


def test_a_listener_takes_away_what_it_made(name: str) -> None:
    with sync.listen(f"mq://{name}?reply=true&depth=2"):
        for suffix in ("", ".reply"):
            MessageQueue.open(name + suffix).close()
    for suffix in ("", ".reply"):
        with pytest.raises(FileNotFoundError):
            MessageQueue.open(name + suffix)
    with pytest.raises(anywire.Refused, match="no message queue"):
        sync.connect(f"mq://{name}")


@pytest.mark.parametrize("front", ["async", "blocking"])
def test_who_is_refused_brings_no_connection_again(name: str, front: str) -> None:
    """The sender is not known, so its message is what is refused: the one that would bring the connection."""
    came: list[anywire.Peer] = []

    def authorize(peer: anywire.Peer) -> bool:
        came.append(peer)
        return len(came) > 2

    def send() -> None:
        with sync.connect(f"mq://{name}") as sender:
            for message in (b"", b"refused", b"admitted"):
                sender.send(message)

    async def main() -> bytes:
        async with anywire.listen(f"mq://{name}?depth=4", authorize=authorize) as listener:
            send()
            async with await listener.accept(timeout=20) as channel:
                return await channel.recv()

    if front == "async":
        assert asyncio.run(main()) == b"admitted"
    else:
        with sync.listen(f"mq://{name}?depth=4", authorize=authorize) as listener:
            send()
            with listener.accept(timeout=20) as channel:
                assert channel.recv(timeout=20) == b"admitted"
    assert [peer.uid for peer in came] == [None] * 3


def test_a_queue_that_somebody_else_made_keeps_its_name(name: str) -> None:
    listener = sync.listen(f"mq://{name}?depth=2")
    MessageQueue.unlink(name)
    with MessageQueue.create(name, 2, 10) as other:
        listener.close()
        with MessageQueue.open(name) as there:
            assert os.path.samestat(os.fstat(there.fileno()), os.fstat(other.fileno()))


def test_higher_priorities_are_first(name: str) -> None:
    with sync.listen(f"mq://{name}?depth=4") as listener:
        with sync.connect(f"mq://{name}") as low, sync.connect(f"mq://{name}", priority=9) as high:
            low.send(b"low 1")
            low.send(b"low 2")
            high.send(b"high")
        with listener.accept(timeout=20) as channel:
            assert channel.recv_many() == [b"high", b"low 1", b"low 2"]


def test_one_listener_and_one_client_that_gets_answers(name: str) -> None:
    with sync.listen(f"mq://{name}?reply=true&depth=4") as listener:
        with pytest.raises(OSError, match="somebody receives") as busy:
            sync.listen(f"mq://{name}?reply=true&depth=4")
        assert busy.value.errno == 98
        with sync.connect(listener.addresses[0]) as first:
            with pytest.raises(anywire.Refused, match="another client"):
                sync.connect(listener.addresses[0])
            first.send(b"x")
            channel = listener.accept(timeout=20)
            channel.send(b"for the first")
        with sync.connect(listener.addresses[0]) as second:
            channel.send(b"for the second")
            assert second.recv(timeout=20) == b"for the second"
        channel.close()


def test_a_killed_listener_leaves_its_messages_to_the_next(name: str) -> None:
    program = "import sys; from anywire import sync; l = sync.listen(sys.argv[1]); print('on', flush=True); l.accept()"
    command = [sys.executable, "-c", program, f"mq://{name}?depth=4"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"on\n"
        process.send_signal(signal.SIGKILL)
    with sync.connect(f"mq://{name}") as sender:
        sender.send(b"late")
    with sync.listen(f"mq://{name}") as listener, listener.accept(timeout=20) as channel:
        assert channel.recv(timeout=20) == b"late"


def test_kills_at_random_moments() -> None:
    """Of senders and listeners; `make evidence` makes thousands."""
    program = Path(__file__).resolve().parents[2] / "evidence" / "kills.py"
    command = [sys.executable, "-W", "ignore", str(program), "--wires", "mq", "--kills", "30"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "30 kills" in done.stdout and "descriptors left: 0" in done.stdout


def test_what_is_in_the_queue_comes_before_the_end(name: str) -> None:
    async def main() -> list[bytes]:
        listening, connecting = anywire.listen(f"mq://{name}?depth=4"), anywire.connect(f"mq://{name}")
        async with listening as listener, connecting as sender:
            for number in range(4):
                await sender.send(b"%d" % number)
            channel = await listener.accept()
            listener.close()
            found = [message async for message in channel]
            await channel.close()
            return found

    assert asyncio.run(main()) == [b"0", b"1", b"2", b"3"]


def test_a_waiting_channel_ends_with_its_listener(name: str) -> None:
    async def main() -> None:
        listening, connecting = anywire.listen(f"mq://{name}?depth=4"), anywire.connect(f"mq://{name}")
        async with listening as listener, connecting as sender:
            await sender.send(b"x")
            channel = await listener.accept()
            assert await channel.recv() == b"x"
            waiting = asyncio.ensure_future(channel.recv())
            await asyncio.sleep(0)
            listener.close()
            with pytest.raises(anywire.EndOfChannel):
                await asyncio.wait_for(waiting, 20)
            await channel.close()

    asyncio.run(main())


IN_THE_QUEUE = {"x86_64": ("242 ", "243 "), "aarch64": ("182 ", "183 ")}
"""How /proc/PID/syscall begins in mq_timedsend(2) and mq_timedreceive(2)."""


def waits_in(call: str, thread: threading.Thread) -> None:
    """Until the thread is in this system call."""
    while not Path(f"/proc/self/task/{thread.native_id}/syscall").read_text().startswith(call):
        assert thread.is_alive()
        time.sleep(0.001)


@pytest.mark.skipif(os.uname().machine not in IN_THE_QUEUE, reason="the numbers of its system calls are not known here")
@pytest.mark.parametrize("how", ["message", "room", "listener", "abort", "sender"])
def test_a_thread_waits_inside_the_call_and_leaves_it(name: str, how: str) -> None:
    """On the blocking front without a time-out: for a message, for room, or until somebody ends it."""
    listener = sync.listen(f"mq://{name}?depth=1")
    sender = sync.connect(f"mq://{name}")
    sender.send(b"first")
    receiver = listener.accept(timeout=20)
    seen: list[object] = []

    def work() -> None:
        try:
            if how in ("room", "sender"):
                sender.send(b"second")
                seen.append("sent")
            else:
                seen.append(receiver.recv())
        except anywire.AnywireError as error:
            seen.append(type(error))

    if how not in ("room", "sender"):
        assert receiver.recv(timeout=20) == b"first"
    thread = threading.Thread(target=work)
    thread.start()
    waits_in(IN_THE_QUEUE[os.uname().machine][how not in ("room", "sender")], thread)
    if how == "message":
        sender.send(b"late")
    elif how == "room":
        assert receiver.recv(timeout=20) == b"first"
    elif how == "listener":
        listener.close()
    elif how == "abort":
        receiver.abort()
    else:
        sender.abort()
    thread.join()
    ended = {"listener": anywire.EndOfChannel, "abort": anywire.ChannelClosed, "sender": anywire.ChannelClosed}
    assert seen == [{"message": b"late", "room": "sent"}.get(how, ended.get(how))]
    for each in (sender, receiver, listener):
        each.close()


def test_a_thread_without_signals_waits_in_another_way(name: str) -> None:
    """Nothing could interrupt it in the call."""
    with sync.listen(f"mq://{name}?depth=1") as listener, sync.connect(f"mq://{name}") as sender:
        sender.send(b"first")
        receiver = listener.accept(timeout=20)
        seen: list[object] = []

        def work() -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            seen.append(receiver.recv())
            try:
                receiver.recv()
            except anywire.AnywireError as error:
                seen.append(type(error))

        thread = threading.Thread(target=work)
        thread.start()
        while not seen:
            assert thread.is_alive()
            time.sleep(0.001)
        time.sleep(0.01)
        receiver.abort()
        thread.join()
        assert seen == [b"first", anywire.ChannelClosed]


def test_ends_do_what_they_can(name: str) -> None:
    with sync.listen(f"mq://{name}?depth=4&message_size=100") as listener, sync.connect(f"mq://{name}") as sender:
        with pytest.raises(anywire.Unsupported, match="reply=true"):
            sender.recv(timeout=1)
        with pytest.raises(anywire.TooLarge, match="message_size=101") as large:
            sender.send(bytes(101))
        assert (large.value.size, large.value.limit, large.value.option) == (101, 100, "message_size")
        sender.send(b"x")
        with listener.accept(timeout=20) as channel:
            with pytest.raises(anywire.Unsupported, match="reply=true"):
                channel.send(b"y")
            assert channel.recv(timeout=20) == b"x"


def test_the_mode_is_that_of_the_queues(name: str) -> None:
    with sync.listen(f"mq://{name}?depth=2&mode=0622"), MessageQueue.open(name) as queue:
        assert os.fstat(queue.fileno()).st_mode & 0o777 == 0o622


def test_a_queue_of_another_size_is_not_taken_for_it(name: str) -> None:
    with MessageQueue.create(name, 2, 10), pytest.raises(OSError, match="for 2 messages of 10 bytes"):
        sync.listen(f"mq://{name}?depth=4")


@pytest.mark.parametrize(
    ("address", "says"), [("mq:///a/b", "one slash"), ("mq:///", "missing"), ("mq:///" + "x" * 250, "at most 249")]
)
def test_bad_addresses(address: str, says: str) -> None:
    with pytest.raises(anywire.AddressError, match=says):
        sync.connect(address)


@pytest.mark.parametrize("options", ["", "&reply=true"], ids=["one-way", "reply"])
def test_a_channel_goes_on_in_another_front(name: str, options: str) -> None:
    """And in another process, which `test_a_listener_goes_on_in_another_process` shows of both ends."""

    async def main() -> None:
        with sync.listen(f"mq://{name}?depth=4&message_size=100{options}") as listener:
            client = sync.connect(listener.addresses[0], priority=3)
            client.send(b"before")
            handle = client.detach()
            with pytest.raises(anywire.ChannelClosed):
                client.send(b"detached")
            moved = await anywire.attach(handle)
            await moved.send(b"after")
            assert moved.unconfirmed == 2
            with MessageQueue.open(name) as queue:
                assert [queue.recv_with_priority(20) for _ in range(2)] == [(b"before", 3), (b"after", 3)]
            with pytest.raises(anywire.TooLarge):
                await moved.send(bytes(101))
            if options:
                with pytest.raises(anywire.Refused, match="another client"):        # its place went with it
                    sync.connect(listener.addresses[0])
                await moved.send(b"question")
                with listener.accept(timeout=20) as there:
                    assert there.recv(timeout=20) == b"question"
                    there.send(b"answer")
                assert await moved.recv(timeout=20) == b"answer"
            await moved.close()

    asyncio.run(main())


def test_a_listener_goes_on_in_another_process(name: str) -> None:
    """With its messages, its place and the duty to unlink; the client's channel is handed over, too."""
    program = """
        import sys
        from anywire import sync
        from anywire.contract.handle import Handle
        with sync.connect(sys.argv[1]) as channel:
            handles = []
            for _ in range(2):
                packed, fds = channel.recv_fds()
                handles.append(Handle.unpack(packed, fds))
            listener, client = sync.attach(handles[0], authorize=None), sync.attach(handles[1])
            client.send(b"from there")
            with listener.accept(timeout=20) as there:
                got = [there.recv(timeout=20), there.recv(timeout=20)]
                there.send(b"answer")
            got.append(client.recv(timeout=20))
            listener.close()
            channel.send(repr(got).encode())
    """
    address = f"unix:@anywire-test-{secrets.token_hex(6)}"
    listener = sync.listen(f"mq://{name}?depth=4&reply=true&message_size=100")
    client = sync.connect(listener.addresses[0])
    client.send(b"before")
    with sync.listen(address) as local:
        command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program), address]
        with subprocess.Popen(command) as process:
            try:
                with local.accept(timeout=20) as channel:
                    for handle in (listener.detach(), client.detach()):
                        with handle:
                            channel.send_fds(handle.fds, handle.pack())
                    assert channel.recv(timeout=20) == repr([b"before", b"from there", b"answer"]).encode()
                assert process.wait(20) == 0
            finally:
                process.kill()
    with pytest.raises(FileNotFoundError):
        MessageQueue.open(name)


def test_what_a_listener_accepted_stays_with_it(name: str) -> None:
    with sync.listen(f"mq://{name}?depth=4") as listener, sync.connect(f"mq://{name}") as sender:
        sender.send(b"one")
        channel = listener.accept(timeout=20)
        with pytest.raises(anywire.Unsupported, match="stays with its listener.*detach the listener"):
            channel.detach()
        with pytest.raises(anywire.Busy, match="close the channel first"):
            listener.detach()
        assert channel.recv(timeout=20) == b"one"                   # both go on
        sender.send(b"two")
        channel.close()
        with sync.attach(listener.detach(), authorize=None) as again, again.accept(timeout=20) as other:
            assert other.recv(timeout=20) == b"two"
