"""A forked child that drops its copy of an open channel must leave the parent's connection alone."""

import asyncio
import os
import threading

import anywire
from anywire import sync


def in_child(work):
    """Fork, run `work()` in the child, and see that it went well."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_closing_in_the_child_takes_no_datagrams_from_the_parent():
    with sync.listen("udp://127.0.0.1:0") as listener, sync.connect(listener.addresses[0]) as client:
        client.send(b"first")
        served = listener.accept(timeout=20)
        for number in range(5):
            client.send(b"%d" % number)
        in_child(served.close)
        assert [served.recv(timeout=20) for _ in range(6)] == [b"first", *(b"%d" % number for number in range(5))]
        served.close()


def test_closing_an_async_channel_in_the_child_ends_nothing_in_the_parent(tmp_path):
    async def echo(channel):
        async for message in channel:
            await channel.send(message)

    async def main():
        address = f"unix://{tmp_path}/s"
        async with anywire.serve(echo, address), anywire.connect(address) as channel:
            waiting = asyncio.ensure_future(channel.recv())
            await asyncio.sleep(0)                              # it waits now: the loop watches the descriptor

            async def leave():
                await channel.close(timeout=1)

            in_child(lambda: asyncio.run(leave()))
            await channel.send(b"still here")
            assert await asyncio.wait_for(waiting, 20) == b"still here"

    asyncio.run(main())


def test_aborting_an_async_stream_in_the_child_ends_nothing_in_the_parent():
    async def echo(stream):
        while data := await stream.read():
            await stream.write(data)

    async def main():
        async with (
            anywire.serve_stream(echo, "tcp://127.0.0.1:0") as server,
            anywire.connect_stream(server.addresses[0]) as stream,
        ):
            waiting = asyncio.ensure_future(stream.read())
            await asyncio.sleep(0)
            in_child(stream.abort)
            await stream.write(b"still here")
            assert await asyncio.wait_for(waiting, 20) == b"still here"

    asyncio.run(main())


def test_a_child_does_not_keep_the_fifo_of_a_closed_listener_alive(tmp_path):
    """The listener holds a write end of its own; a child's copy of it would hide that the last writer has left."""
    address = f"fifo://{tmp_path}/x?writers=many"
    listener = sync.listen(address)
    with sync.connect(address) as writer:
        writer.send(b"one")
        reader = listener.accept(timeout=20)
        hold, release = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(release)
            os.read(hold, 1)
            os._exit(0)
        os.close(hold)
        try:
            listener.close()
            assert reader.recv(timeout=20) == b"one"
            writer.close()
            ended = []
            thread = threading.Thread(target=lambda: ended.extend(reader))
            thread.start()
            thread.join(5)
            alive = thread.is_alive()
            reader.abort()
            thread.join(20)
            assert not alive
        finally:
            os.close(release)
            os.waitpid(pid, 0)
