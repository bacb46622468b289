"""The end of a stream is told only when it is the peer's."""

import asyncio
import threading
import time

import pytest

import anywire
from anywire import sync
from anywire.contract.errors import ChannelClosed


@pytest.fixture
def pair():
    with sync.listen_stream("tcp://127.0.0.1:0") as listener:
        client = sync.connect_stream(listener.addresses[0])
        served = listener.accept(timeout=20)
        yield client, served
        client.abort()
        served.abort()


def test_reading_into_an_empty_buffer_is_no_end(pair):
    client, served = pair
    assert served.read_into(bytearray()) == 0
    client.write(b"data")
    assert served.read_exactly(4, timeout=20) == b"data"


def test_reading_into_an_empty_buffer_is_no_end_async():
    async def main():
        async def handler(stream):
            assert await stream.read_into(bytearray()) == 0
            await stream.write(await stream.read_exactly(4))

        async with (
            anywire.serve_stream(handler, "tcp://127.0.0.1:0") as server,
            anywire.connect_stream(server.addresses[0]) as stream,
        ):
            await stream.write(b"data")
            assert await stream.read_exactly(4, timeout=20) == b"data"

    asyncio.run(main())


READS = {
    "read": lambda stream: stream.read(),
    "read_into": lambda stream: stream.read_into(bytearray(10)),
    "read_exactly": lambda stream: stream.read_exactly(10),
    "read_until": lambda stream: stream.read_until(),
    "iteration": lambda stream: list(stream),
}


@pytest.mark.parametrize("how", READS)
def test_a_stream_dropped_here_does_not_look_like_the_peers_end(pair, how):
    served = pair[1]
    told = []

    def reader():
        try:
            told.append(READS[how](served))
        except BaseException as error:
            told.append(error)

    thread = threading.Thread(target=reader)
    thread.start()
    wait_until_blocked(thread)
    served.abort()
    thread.join(20)
    assert isinstance(told[0], ChannelClosed), told


def wait_until_blocked(thread):
    deadline = time.monotonic() + 20
    while True:
        with open(f"/proc/self/task/{thread.native_id}/stat") as file:
            if file.read().rpartition(")")[2].split()[0] == "S":
                return
        assert time.monotonic() < deadline
        time.sleep(0.002)
