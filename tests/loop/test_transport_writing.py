"""Writing to stream transports, and flow control: each test runs on the standard loop and on ours."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import pytest

import anywire.loop
from anywire.loop._transport import StreamTransport
from tests.loop.transport_recorder import LOOPS, Recorder, complaints, connected, fill, pattern, receive, running


@pytest.fixture(params=list(LOOPS))
def run(request: pytest.FixtureRequest) -> Iterator[Any]:
    yield from running(request.param)


# ---- writing -------------------------------------------------------------------------------------------------------


def test_writes_of_all_shapes_arrive_in_order(run: Any) -> None:
    async def main() -> None:
        protocol = Recorder()
        transport, theirs = await connected(protocol)
        with theirs:
            whole = pattern(1000)
            transport.write(b"")
            transport.write(whole[:10])
            transport.write(bytearray(whole[10:20]))
            transport.write(memoryview(whole)[20:30])
            transport.write(memoryview(bytearray(whole))[30:40])
            transport.writelines([whole[40:50], b"", bytearray(whole[50:60]), memoryview(whole)[60:70]])
            transport.writelines([])
            transport.writelines(iter([whole[70:80]]))
            assert await receive(theirs, 80) == whole[:80]
            transport.close()
            await protocol.lost
    run(main())


def test_mutable_buffers_may_change_after_write(run: Any) -> None:
    async def main() -> None:
        protocol = Recorder()
        transport, theirs = await connected(protocol)
        with theirs:
            before = len(await fill(transport))
            changing = bytearray(b"first")
            transport.write(bytes(changing))
            if isinstance(transport, StreamTransport):   # the standard loop keeps the caller's buffer
                transport.write(changing)
                transport.write(memoryview(changing)[1:3])
                transport.writelines([changing])
                changing[:] = b"XXXXX"
                changing.extend(b"resized")
            else:
                transport.writelines([b"first", b"ir", b"first"])
            assert (await receive(theirs, before + 17))[before:] == b"firstfirstirfirst"
            transport.abort()
            await protocol.lost
    run(main())


def test_a_released_view_was_copied(run: Any) -> None:
    async def main() -> None:
        def answer(self: Recorder, data: bytes) -> None:
            room = bytearray(data)
            view = memoryview(room)
            self.transport.write(view)
            view.release()
            room.clear()
        protocol = Recorder(data_received=answer)
        transport, theirs = await connected(protocol)
        with theirs:
            theirs.send(b"echo")
            assert await receive(theirs, 4) == b"echo"
            transport.close()
            await protocol.lost
    run(main())


def test_more_pieces_than_one_system_call_takes(run: Any) -> None:
    async def main() -> None:
        protocol = Recorder()
        transport, theirs = await connected(protocol, small=True)
        with theirs:
            pieces = [bytes([i % 251]) * (i % 5) for i in range(5000)]
            transport.writelines(pieces)
            for piece in pieces:
                transport.write(piece)
            whole = b"".join(pieces) * 2
            assert await receive(theirs, len(whole)) == whole
            transport.close()
            await protocol.lost
    run(main())


def test_every_split_of_a_queue(run: Any) -> None:
    """The peer takes what it wants while pieces of odd sizes wait: partial writes end at many different bytes."""
    async def main() -> None:
        protocol = Recorder()
        transport, theirs = await connected(protocol, small=True)
        loop = asyncio.get_running_loop()
        with theirs:
            sent = bytearray()
            got = bytearray()
            for step in range(1, 400):
                piece = pattern(step * 37 % 1009)
                sent += piece
                transport.write(piece)
                if step % 3 == 0:
                    transport.writelines([piece[:1], piece[1:]])
                    sent += piece
                got += await loop.sock_recv(theirs, step) if len(got) < len(sent) else b""
            got += await receive(theirs, len(sent) - len(got))
            assert got == sent
            transport.close()
            await protocol.lost
    run(main())


@pytest.mark.parametrize("bad", ["text", 7, None, [b"x"]])
def test_what_is_no_buffer_is_refused(run: Any, bad: Any) -> None:
    async def main() -> None:
        protocol = Recorder()
        transport, theirs = await connected(protocol)
        with theirs:
            with pytest.raises(TypeError):
                transport.write(bad)
            transport.close()
            await protocol.lost
    run(main())


def test_writing_after_the_end(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        protocol = Recorder()
        transport, theirs = await connected(protocol)
        with theirs:
            transport.write_eof()
            transport.write_eof()
            with pytest.raises(RuntimeError, match=r"write\(\) after write_eof"):
                transport.write(b"late")
            with pytest.raises(RuntimeError, match=r"after write_eof"):
                transport.writelines([b"late"])
            assert await receive(theirs, 1) == b""
            theirs.send(b"still here")
            await protocol.until(lambda: protocol.data == b"still here")
            transport.close()
            await protocol.lost
            assert transport.can_write_eof()
            transport.write_eof()
    run(main())


def test_writing_after_the_loss_only_warns(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        protocol = Recorder()
        transport, theirs = await connected(protocol)
        with theirs:
            transport.close()
            await protocol.lost
            for _ in range(6):
                transport.write(b"late")
            assert [record.message for record in caplog.records].count("socket.send() raised exception.") in (1, 2)
    run(main())


def test_write_eof_waits_for_what_was_written(run: Any) -> None:
    async def main() -> None:
        protocol = Recorder()
        transport, theirs = await connected(protocol, small=True)
        with theirs:
            data = pattern(200_000)
            transport.write(data)
            transport.write_eof()
            assert await receive(theirs, len(data) + 1) == data
            transport.close()
            await protocol.lost
    run(main())


def test_writes_of_one_callback_leave_together_before_the_loop_sleeps(run: Any) -> None:
    async def main() -> None:
        def answer(self: Recorder, data: bytes) -> None:
            for piece in (b"head", b" ", b"body"):
                self.transport.write(piece)
        protocol = Recorder(data_received=answer)
        transport, theirs = await connected(protocol)
        with theirs:
            theirs.send(b"?")
            assert await receive(theirs, 9) == b"head body"
            transport.close()
            await protocol.lost
    run(main())


def test_what_is_written_last_is_sent_though_the_loop_stops(run: Any) -> None:
    kept: list[Any] = []

    async def main() -> None:
        protocol = Recorder()
        kept.extend(await connected(protocol))
        asyncio.get_running_loop().call_soon(lambda: None)
        kept[0].write(b"last words")
    run(main())
    assert kept[1].recv(100) == b"last words"
    kept[0].write(b"and more")                     # the loop doesn't run
    assert kept[1].recv(100) == b"and more"

    async def end() -> None:
        kept[0].abort()
        await kept[0].get_protocol().lost
    run(end())
    kept[1].close()


def test_an_interrupt_in_one_flush_keeps_no_other_from_its_own() -> None:
    class Interrupting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise KeyboardInterrupt

    loop = anywire.loop.new_event_loop()
    loop.set_debug(True)                           # then a failed write is logged, within the flush
    told = Interrupting()
    log = logging.getLogger("asyncio")
    level = log.level
    kept: list[Any] = []

    async def main() -> None:
        for _ in range(3):
            kept.append(await connected(Recorder()))
        log.setLevel(logging.DEBUG)
        log.addHandler(told)
        kept[1][1].close()
        loop.call_soon(lambda: None)               # so that writes wait for the end of the turn
        for transport, _ in kept:
            transport.write(b"on its way")

    try:
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(main())
    finally:
        log.removeHandler(told)
        log.setLevel(level)
    loop.run_forever()                             # what was ready stayed so: the end of main() stops this run
    for _, theirs in (kept[0], kept[2]):
        assert theirs.recv(100) == b"on its way"
        theirs.close()

    async def end() -> None:
        for transport, _ in kept:
            transport.abort()
    loop.run_until_complete(end())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


def test_sendfile(run: Any, tmp_path: Any) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        content = pattern(700_000)
        (tmp_path / "f").write_bytes(content)
        protocol = Recorder()
        transport, theirs = await connected(protocol)
        with theirs, (tmp_path / "f").open("rb") as file:
            transport.write(b"before")
            receiving = asyncio.ensure_future(receive(theirs, 6 + len(content) + 5))
            sending = asyncio.ensure_future(loop.sendfile(transport, file))
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="sendfile is in progress"):
                transport.write(b"not now")
            assert await sending == len(content)
            transport.write(b"after")
            assert await receiving == b"before" + content + b"after"
            theirs.send(b"x")
            await protocol.until(lambda: protocol.data == b"x")
            transport.close()
            await protocol.lost
    run(main())


# ---- flow control --------------------------------------------------------------------------------------------------


def test_pause_and_resume_writing(run: Any) -> None:
    async def main() -> None:
        protocol = Recorder()
        transport, theirs = await connected(protocol)
        with theirs:
            transport.set_write_buffer_limits(high=100_000, low=1000)
            assert transport.get_write_buffer_limits() == (1000, 100_000)
            total = 0
            while "pause_writing" not in protocol.calls:
                transport.write(b"x" * 50_000)
                total += 50_000
            assert transport.get_write_buffer_size() > 100_000
            assert protocol.calls.count("pause_writing") == 1
            transport.write(b"y")
            assert protocol.calls.count("pause_writing") == 1
            await receive(theirs, total + 1)
            await protocol.until(lambda: "resume_writing" in protocol.calls)
            assert transport.get_write_buffer_size() <= 1000
            transport.close()
            await protocol.lost
    run(main())


def test_a_small_write_does_not_pause_at_limit_zero(run: Any) -> None:
    async def main() -> None:
        protocol = Recorder(data_received=lambda self, data: self.transport.write(data))
        transport, theirs = await connected(protocol)
        with theirs:
            transport.set_write_buffer_limits(high=0)
            theirs.send(b"echo")
            assert await receive(theirs, 4) == b"echo"
            assert "pause_writing" not in protocol.calls
            written = await fill(transport)
            assert protocol.calls.count("pause_writing") == 1
            assert len(await receive(theirs, len(written))) == len(written)
            await protocol.until(lambda: "resume_writing" in protocol.calls)
            transport.close()
            await protocol.lost
    run(main())


def test_limits_changed_while_over(run: Any) -> None:
    async def main() -> None:
        protocol = Recorder()
        transport, theirs = await connected(protocol)
        with theirs:
            transport.set_write_buffer_limits(high=10_000_000)
            await fill(transport)
            assert protocol.calls == ["connection_made"]
            transport.set_write_buffer_limits(high=1)
            assert protocol.calls == ["connection_made", "pause_writing"]
            for high, low in ((1, 2), (-1, None), (0, -1)):
                with pytest.raises(ValueError, match="must be >="):
                    transport.set_write_buffer_limits(high=high, low=low)
            transport.set_write_buffer_limits(low=3)
            assert transport.get_write_buffer_limits() == (3, 12)
            transport.set_write_buffer_limits()
            assert transport.get_write_buffer_limits() == (16384, 65536)
            transport.abort()
            await protocol.lost
    run(main())


def test_writing_from_resume_and_pause(run: Any) -> None:
    async def main() -> None:
        rounds = []

        def resumed(self: Recorder) -> None:
            if len(rounds) < 3:
                rounds.append(1)
                self.transport.write(b"r" * 400_000)

        def paused(self: Recorder) -> None:
            self.transport.write(b"p")
        protocol = Recorder(resume_writing=resumed, pause_writing=paused)
        transport, theirs = await connected(protocol)
        with theirs:
            transport.write(b"a" * 400_000)
            expected = 4 * 400_000 + 4
            got = await receive(theirs, expected)
            assert got == b"a" * 400_000 + b"p" + (b"r" * 400_000 + b"p") * 3
            await protocol.until(lambda: protocol.calls.count("resume_writing") == 4)
            transport.close()
            await protocol.lost
    run(main())


def test_what_pause_writing_raises_is_told(run: Any) -> None:
    async def main() -> None:
        def fail(self: Recorder) -> None:
            raise ZeroDivisionError("in the protocol")
        protocol = Recorder(pause_writing=fail, resume_writing=fail)
        transport, theirs = await connected(protocol)
        with theirs:
            written = await fill(transport)
            transport.write(b"x" * 100_000)
            assert [(c["message"], type(c["exception"])) for c in complaints()] == [
                ("protocol.pause_writing() failed", ZeroDivisionError)]
            await receive(theirs, len(written) + 100_000)
            await protocol.until(lambda: "resume_writing" in protocol.calls)
            assert [c["message"] for c in complaints()] == ["protocol.resume_writing() failed"]
            transport.close()
            await protocol.lost
    run(main())
