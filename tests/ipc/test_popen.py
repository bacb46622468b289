"""`popen`: both ways, no shell by default, the exit status told, awaitable."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import sys

import pytest

from anywire.ipc import popen

pytestmark = pytest.mark.processes


def test_reading_gives_the_output_and_the_status() -> None:
    with popen(["sh", "-c", "echo out; exit 3"]) as command:
        assert command.read_all(timeout=30) == b"out\n"
        assert command.status is None
    assert command.status == 3
    assert command.wait() == 3


def test_writing_gives_the_input_and_closing_ends_it() -> None:
    command = popen(["sh", "-c", 'exit $(cat | wc -c)'], "w")
    command.write(b"seven b")
    assert command.close(timeout=30) == 7
    with pytest.raises(ValueError, match="not started for reading"):
        command.read()


def test_both_ways_at_once() -> None:
    with popen(["cat"], "rw") as command:
        command.write(b"round")
        assert command.read() == b"round"
        assert command.writer is not None
        command.writer.close()
        assert command.read() == b""
    assert command.status == 0


def test_arguments_are_no_shell_s() -> None:
    with popen(["echo", "$HOME; `id` *"]) as command:
        assert command.read_all() == b"$HOME; `id` *\n"
    with pytest.raises(TypeError, match="one line of text, otherwise a list"):
        popen("echo x")
    with pytest.raises(TypeError, match="one line of text"):
        popen(["echo"], shell=True)
    with popen("echo $((1 + 1))", shell=True) as command:
        assert command.read_all() == b"2\n"
    with pytest.raises(ValueError, match="the mode"):
        popen(["true"], "x")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError) as caught:
        popen(["/nonexistent/program"], "rw")
    assert caught.value.filename == "/nonexistent/program"
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_signal_that_ends_it_is_told() -> None:
    with popen(["cat"], "w") as command:
        with pytest.raises(TimeoutError):
            command.wait(timeout=0.01)
        command.process.send_signal(signal.SIGTERM)
        assert command.wait(timeout=30) == -signal.SIGTERM
        with pytest.raises(BrokenPipeError):
            command.write(b"x")


def test_an_exception_ends_the_program() -> None:
    with pytest.raises(KeyError), popen(["sleep", "600"]) as command:
        raise KeyError
    assert command.status == -signal.SIGKILL


def test_in_an_event_loop() -> None:
    async def main() -> None:
        async with popen(["cat"], "rw") as command, popen(["sh", "-c", "read x; exit 5"], "w") as other:
            reading = asyncio.create_task(command.read_async())
            await asyncio.sleep(0)
            await command.write_async(b"ping")
            assert await reading == b"ping"
            assert command.writer is not None
            command.writer.close()
            assert await command.read_all_async() == b""
            assert await command.wait_async() == 0
            with pytest.raises(TimeoutError):
                await other.wait_async(timeout=0.01)
            assert await other.close_async() == 5
        assert other.status == 5

    asyncio.run(main())


def test_the_program_s_ends_are_blocking() -> None:
    look = "import os; print(os.get_blocking(0), os.get_blocking(1), flush=True)"
    with popen([sys.executable, "-c", look], "rw") as command:
        assert command.read_all() == b"True True\n"


def test_pickle_is_refused_and_dropping_warns() -> None:
    command = popen(["cat"], "w")
    with pytest.raises(TypeError, match="does not pickle"):
        pickle.dumps(command)
    command.process.kill()
    command.wait()
    made = [command]
    del command
    with pytest.warns(ResourceWarning):
        made.clear()
