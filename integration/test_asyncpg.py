"""asyncpg against a real PostgreSQL server: over its Unix socket, over TCP, and over TLS."""

from __future__ import annotations

import asyncio
import datetime
import io
import ssl
from typing import Any

import pytest
from programs import Run

asyncpg = pytest.importorskip("asyncpg")


@pytest.fixture(params=["unix", "tcp", "tls"])
def database(request: pytest.FixtureRequest, postgres: dict[str, Any], authority: Any) -> dict[str, Any]:
    if request.param == "unix":
        return {**postgres, "ssl": False}
    if request.param == "tcp":
        return {**postgres, "host": "127.0.0.1", "ssl": False}
    context = ssl.create_default_context()      # the connection is made in the clear, then upgraded
    authority.configure_trust(context)
    return {**postgres, "host": "127.0.0.1", "ssl": context}


def test_queries(run: Run, database: dict[str, Any]) -> None:
    async def main() -> None:
        connection = await asyncpg.connect(**database)
        encrypted = await connection.fetchval("select ssl from pg_stat_ssl where pid = pg_backend_pid()")
        assert encrypted is bool(database["ssl"])
        day = datetime.date(2026, 1, 2)
        row = await connection.fetchrow("select $1::int8 as a, $2::text as b, $3::date as c, $4::bytea as d",
                                        1 << 40, "ä" * 10, day, b"\0\xff")
        assert tuple(row) == (1 << 40, "ä" * 10, day, b"\0\xff")
        rows = await connection.fetch("select i, repeat('x', 1000) from generate_series(1, 5000) i")
        assert [row[0] for row in rows] == list(range(1, 5001))
        large = bytes(range(256)) * 20_000
        assert await connection.fetchval("select $1::bytea", large) == large
        with pytest.raises(asyncpg.DivisionByZeroError):
            await connection.fetchval("select 1 / 0")
        await connection.close()

    run(main())


def test_transactions_and_copy(run: Run, database: dict[str, Any]) -> None:
    async def main() -> None:
        connection = await asyncpg.connect(**database)
        await connection.execute("create temporary table numbers (n int primary key, name text)")
        rows = [(n, f"number {n}") for n in range(20_000)]
        await connection.copy_records_to_table("numbers", records=rows)
        with pytest.raises(asyncpg.UniqueViolationError):
            async with connection.transaction():
                await connection.execute("delete from numbers where n >= 10000")
                await connection.execute("insert into numbers values (1, 'again')")
        out = io.BytesIO()
        await connection.copy_from_table("numbers", output=out)
        assert out.getvalue().count(b"\n") == 20_000
        async with connection.transaction():
            seen = [row["n"] async for row in connection.cursor("select n from numbers order by n", prefetch=500)]
        assert seen == list(range(20_000))
        await connection.close()

    run(main())


def test_a_pool_cancellation_and_notifications(run: Run, database: dict[str, Any]) -> None:
    async def main() -> None:
        async with asyncpg.create_pool(**database, min_size=2, max_size=8) as pool:
            sums = await asyncio.gather(*(pool.fetchval("select $1::int + 1", n) for n in range(400)))
            assert sums == list(range(1, 401))
            async with pool.acquire() as connection:
                with pytest.raises(asyncio.TimeoutError):
                    await connection.execute("select pg_sleep(3600)", timeout=0.1)
                assert await connection.fetchval("select 7") == 7       # the query was cancelled, not the connection
                heard: asyncio.Queue[str] = asyncio.Queue()

                def note(connection: Any, pid: int, channel: str, payload: str) -> None:
                    heard.put_nowait(payload)

                await connection.add_listener("news", note)
                for number in range(50):
                    await pool.execute("select pg_notify('news', $1)", str(number))
                assert [await heard.get() for _ in range(50)] == [str(number) for number in range(50)]
                await connection.remove_listener("news", note)

    run(main())


def test_a_server_process_that_is_ended(run: Run, database: dict[str, Any]) -> None:
    async def main() -> None:
        victim, other = await asyncpg.connect(**database), await asyncpg.connect(**database)
        pid = victim.get_server_pid()
        waiting = asyncio.ensure_future(victim.execute("select pg_sleep(3600)"))
        while not await other.fetchval("select state = 'active' from pg_stat_activity where pid = $1", pid):
            pass
        assert await other.fetchval("select pg_terminate_backend($1)", pid)
        with pytest.raises((asyncpg.AdminShutdownError, asyncpg.ConnectionDoesNotExistError)):
            await waiting
        await other.close()
        await victim.close()

    run(main())
