"""`Process`: children and strangers by pidfd."""

from __future__ import annotations

import asyncio
import errno
import os
import pickle
import signal
import subprocess
import threading

import pytest
from ipc_children import line, run, started

from anywire.ipc import Process, pipe

SLEEP = ["sleep", "600"]


@pytest.mark.processes
def test_a_child_s_end_is_told() -> None:
    for command, status in ((["sh", "-c", "exit 4"], 4), (["sh", "-c", "kill -USR1 $$"], -signal.SIGUSR1)):
        child = subprocess.Popen(command)
        with Process(child.pid) as process:
            assert process.wait(timeout=30) == status
            assert process.wait() == process.status == status     # again
            assert not process.alive
            with pytest.raises(ProcessLookupError) as caught:
                process.send_signal(0)
            assert caught.value.filename == f"process {child.pid}"
        child.returncode = status                   # its end was taken; subprocess would ask again


@pytest.mark.processes
def test_time_outs_and_signals() -> None:
    with subprocess.Popen(SLEEP) as child, Process(child.pid) as process:
        for timeout in (0, 0.01):
            with pytest.raises(TimeoutError, match="did not end"):
                process.wait(timeout=timeout)
        assert process.alive
        process.send_signal(signal.SIGSTOP)
        process.send_signal(signal.SIGCONT)
        process.terminate()
        assert process.wait(timeout=30) == -signal.SIGTERM
        child.returncode = -signal.SIGTERM


@pytest.mark.processes
def test_of_others_the_end_but_not_the_status_is_told() -> None:
    with started("""
        import subprocess
        child = subprocess.Popen(["sleep", "600"])
        print(child.pid, flush=True)
        print(child.wait(), flush=True)
    """) as parent, Process(int(line(parent))) as process:
        process.kill()
        assert process.wait(timeout=30) is None
        assert line(parent) == "-9"
    with subprocess.Popen(["true"]) as child:
        process = Process(child.pid)
        child.wait()
        with process:
            assert process.wait(timeout=30) is None             # subprocess was faster


@pytest.mark.processes
def test_who_is_not_there() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    with pytest.raises(ProcessLookupError, match="no such process"):
        Process(child.pid)
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    with pytest.raises(OSError):
        Process(thread.native_id or 0)
    stop.set()
    thread.join()
    with Process(0) as process:
        assert process.pid == os.getpid() and process.alive


@pytest.mark.processes
def test_after_its_end_its_number_means_nobody() -> None:
    assert run("""
        import subprocess
        from anywire.ipc import Process
        child = subprocess.Popen(["true"])
        with Process(child.pid) as process:
            child.wait()
            try:
                process.kill()
            except ProcessLookupError:
                print("gone")
    """) == "gone\n"


@pytest.mark.processes
def test_tasks_wait() -> None:
    async def main() -> None:
        child = subprocess.Popen(SLEEP)
        with Process(child.pid) as process:
            waits = [asyncio.create_task(process.wait_async()) for _ in range(3)]
            await asyncio.sleep(0)
            waits[0].cancel()
            with pytest.raises(TimeoutError):
                await process.wait_async(timeout=0.01)
            process.kill()
            assert await asyncio.gather(*waits[1:]) == [-9, -9]
        child.returncode = -9

    asyncio.run(main())


@pytest.mark.processes
def test_a_copy_of_its_descriptor() -> None:
    with pipe() as (reader, writer):
        child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=writer.reopen())
        with child, Process(child.pid) as process:
            copy = process.getfd(0)
            try:
                assert not os.get_inheritable(copy)
                with pytest.raises(OSError, match="it has no descriptor 99") as caught:
                    process.getfd(99)
                assert caught.value.errno == errno.EBADF
                assert child.stdin is not None
                child.stdin.close()
                assert os.read(copy, 10) == b""                 # it is the read end of cat's standard input
            finally:
                os.close(copy)
        assert reader.pending == 0


@pytest.mark.processes
def test_copying_needs_the_right_to_trace() -> None:
    assert run("""
        from anywire.ipc import Process
        with Process(1) as process:
            for call in (lambda: process.getfd(0), process.kill):
                try:
                    call()
                except PermissionError as error:
                    print(error.filename, "trace" in error.strerror)
    """, user=65534) == "process 1 True\nprocess 1 False\n"


def test_pickle_is_refused() -> None:
    with Process(0) as process, pytest.raises(TypeError, match="send its descriptor"):
        pickle.dumps(process)
