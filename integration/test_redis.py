"""redis-py's asyncio client against a real Redis server, over TCP and over its Unix socket."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest
from programs import Run

redis = pytest.importorskip("redis.asyncio")
Where = dict[str, Any]


@pytest.fixture(params=["tcp", "unix"])
def where(request: pytest.FixtureRequest, redis_server: tuple[str, int]) -> Where:
    path, port = redis_server
    return {"unix_socket_path": path} if request.param == "unix" else {"host": "127.0.0.1", "port": port}


def test_values_and_pipelines(run: Run, where: Where) -> None:
    async def main() -> None:
        async with redis.Redis(**where) as client:
            await client.flushall()
            large = os.urandom(5 << 20)
            await client.set("large", large)
            assert await client.get("large") == large
            async with client.pipeline(transaction=True) as pipeline:
                for number in range(1000):
                    pipeline.rpush("list", number)
                assert await pipeline.execute() == list(range(1, 1001))
            assert await client.lrange("list", 0, -1) == [b"%d" % number for number in range(1000)]
            for first in (1, 81):               # connections are made beside each other, and used again
                counts = await asyncio.gather(*(client.incr("count") for _ in range(80)))
                assert sorted(counts) == list(range(first, first + 80))

    run(main())


def test_subscriptions(run: Run, where: Where) -> None:
    async def main() -> None:
        async with redis.Redis(**where) as client, client.pubsub() as subscription:
            await subscription.subscribe("news")
            assert (await subscription.get_message(timeout=5))["type"] == "subscribe"
            for number in range(500):
                await client.publish("news", number)
            heard = []
            async for message in subscription.listen():
                heard.append(int(message["data"]))
                if len(heard) == 500:
                    break
            assert heard == list(range(500))
            assert await subscription.get_message(timeout=0.05) is None

    run(main())


def test_waiting_cancellation_and_a_lost_connection(run: Run, where: Where) -> None:
    async def main() -> None:
        async with redis.Redis(**where) as client:
            await client.flushall()
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.blpop(["nothing"]), 0.1)
            waiting = asyncio.ensure_future(client.blpop(["something"], timeout=30))
            while not any(one["cmd"] == "blpop" and "b" in one["flags"] for one in await client.client_list()):
                pass
            await client.rpush("something", "here")
            assert await waiting == (b"something", b"here")
            me = await client.client_id()
            async with redis.Redis(**where) as other:
                await other.client_kill_filter(_id=me)
            assert await client.ping()          # reconnected

    run(main())
