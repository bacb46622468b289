"""Signals with values, in order, as messages; masks and handlers; and what does not work beside threads.

Most programs run in processes of their own: a test runner has threads, which is just what SignalQueue refuses.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from ipc_children import PATIENCE, line, run, started

pytestmark = pytest.mark.processes

HEAD = """
import asyncio, os, pickle, signal, subprocess, sys, threading, time
from anywire.ipc import Process, SignalQueue, sigqueue, sigtimedwait, sigtimedwait_async
from anywire.ipc.signals import blocked, handled, unblocked
RT = signal.SIGRTMIN
me = os.getpid()
"""


def program(text: str) -> str:
    return HEAD + textwrap.dedent(text)


def test_real_time_signals_queue_in_order_with_their_values() -> None:
    assert run(program("""
        with SignalQueue(RT, RT + 1, signal.SIGUSR1) as queue:
            for value in range(50):
                sigqueue(me, RT + 1, value)
                sigqueue(me, RT, -value)
            for _ in range(3):
                os.kill(me, signal.SIGUSR1)
            first = queue.recv()
            assert first == (signal.SIGUSR1, 0, me, os.getuid(), 0, 0), first       # three were merged into one
            assert first.number is signal.SIGUSR1
            assert [queue.recv()[0::4] for _ in range(50)] == [(RT, -value) for value in range(50)]
            last = [queue.recv() for _ in range(50)]
            assert [told.value for told in last] == list(range(50))
            assert {(told.number, told.code, told.pid) for told in last} == {(RT + 1, -1, me)}
            try:
                queue.try_recv()
            except BlockingIOError:
                print("all")
    """)) == "all\n"


def test_values_come_from_and_go_to_c(tmp_path: Path) -> None:
    source = tmp_path / "queue.c"
    source.write_text(r"""
        #define _GNU_SOURCE
        #include <signal.h>
        #include <stdio.h>
        #include <stdlib.h>
        int main(int argc, char** argv) {
            sigset_t set;
            siginfo_t info;
            sigemptyset(&set);
            sigaddset(&set, SIGRTMIN + 2);
            sigprocmask(SIG_BLOCK, &set, 0);
            puts("ready"); fflush(stdout);
            if (sigwaitinfo(&set, &info) < 0) return 1;
            union sigval back = { .sival_int = info.si_value.sival_int - 1 };
            return info.si_code == SI_QUEUE ? sigqueue(info.si_pid, SIGRTMIN + 2, back) : 2;
        }
    """)
    subprocess.run(["gcc", "-Wall", "-Werror", "-o", tmp_path / "queue", source], check=True, timeout=60)
    assert run(program("""
        with SignalQueue(RT + 2) as queue:
            child = subprocess.Popen([sys.argv[1]], stdout=subprocess.PIPE)
            child.stdout.readline()
            with Process(child.pid) as process:
                sigqueue(process, RT + 2, -7)           # by its pidfd
            told = queue.recv(timeout=20)
            print(told.value, told.pid == child.pid, child.wait())
            child.stdout.close()
    """), str(tmp_path / "queue")) == "-8 True 0\n"


def test_time_outs_are_errors_and_take_nothing() -> None:
    assert run(program("""
        with SignalQueue(RT) as queue, blocked(RT + 1):
            for wait in (queue.recv, lambda timeout: sigtimedwait(RT + 1, timeout=timeout)):
                for timeout in (0, 0.02):
                    began = time.monotonic()
                    try:
                        wait(timeout=timeout)
                    except TimeoutError as error:
                        assert time.monotonic() - began >= timeout
                        print(error.errno == 110, error.filename)
            sigqueue(me, RT + 1, 5)
            print(sigtimedwait(RT, RT + 1).value)
    """)) == "True signals signal 34\n".replace("signal 34", "SIGRTMIN") * 2 + "True signal 35\n" * 2 + "5\n"


def test_waiting_for_signals_that_are_not_blocked_is_refused() -> None:
    assert run(program("""
        try:
            sigtimedwait(signal.SIGUSR1, timeout=0)
        except ValueError as error:
            print(error)
        for wrong in ((), (0,), (65,), (signal.SIGKILL,)):
            try:
                SignalQueue(*wrong)
            except ValueError as error:
                print(error)
    """)).splitlines() == [
        "this thread does not block SIGUSR1: wait inside `with signals.blocked(...)`, in all threads",
        "name at least one signal",
        "0 is no signal's number: 1 to 64",
        "65 is no signal's number: 1 to 64",
        "<Signals.SIGKILL: 9> can be neither blocked nor handled",
    ]


def test_a_handler_of_another_signal_runs_and_the_wait_goes_on() -> None:
    assert run(program("""
        def handler(number):
            print("handled", number.name, flush=True)
            sigqueue(me, RT, 1)
        with blocked(RT), handled(handler, signal.SIGALRM):
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            print(sigtimedwait(RT, timeout=20).value)
    """)) == "handled SIGALRM\n1\n"


def test_in_an_event_loop() -> None:
    assert run(program("""
        async def main():
            with SignalQueue(RT, signal.SIGCHLD) as queue:
                lost = asyncio.create_task(queue.recv_async())
                await asyncio.sleep(0)
                lost.cancel()                           # it takes none with it
                sigqueue(me, RT, 9)
                print((await queue.recv_async()).value)
                try:
                    await queue.recv_async(timeout=0.01)
                except TimeoutError:
                    print("late")
                child = subprocess.Popen(["sh", "-c", "exit 6"])
                async for told in queue:
                    print(told.number.name, told.pid == child.pid, told.status, child.wait())
                    break
                sigqueue(me, RT, 10)
                print((await sigtimedwait_async(RT)).value)
        asyncio.run(main())
    """)) == "9\nlate\nSIGCHLD True 6 6\n10\n"


def test_masks_and_handlers_come_back() -> None:
    assert run(program("""
        def mask():
            return sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        assert mask() == []
        with blocked(signal.SIGUSR1, RT):
            with unblocked(RT):
                assert mask() == [signal.SIGUSR1]
            with SignalQueue(RT, signal.SIGUSR2):
                assert mask() == [signal.SIGUSR1, signal.SIGUSR2, RT]
            assert mask() == [signal.SIGUSR1, RT]
        assert mask() == []
        before = signal.getsignal(signal.SIGUSR1)
        with handled(lambda number: print(number.name), signal.SIGUSR1, signal.SIGUSR2):
            os.kill(me, signal.SIGUSR1)
        assert signal.getsignal(signal.SIGUSR1) is before
        with handled(lambda number: print("delivered"), signal.SIGUSR2):
            with SignalQueue(signal.SIGUSR2):
                os.kill(me, signal.SIGUSR2)             # nobody takes it
                print("waits")
    """)) == "SIGUSR1\nwaits\ndelivered\n"


def test_a_thread_that_would_get_the_signals_is_named() -> None:
    assert run(program("""
        stop = threading.Event()
        thread = threading.Thread(target=stop.wait)
        thread.start()
        try:
            SignalQueue(signal.SIGUSR1)
        except RuntimeError as error:
            print(*(word in str(error) for word in (str(thread.native_id), str(me), "before threads are started")))
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())         # nothing stays blocked
        stop.set()
        thread.join()
        with SignalQueue(signal.SIGUSR1) as queue:
            stop.clear()
            thread = threading.Thread(target=stop.wait)                 # started now, it inherits the mask
            thread.start()
            SignalQueue(signal.SIGUSR1).close()
            os.kill(me, signal.SIGUSR1)
            print(queue.recv().number.name)
            stop.set()
            thread.join()
    """)) == "True False True\nSIGUSR1\n"


def test_handlers_are_the_main_thread_s() -> None:
    assert run(program("""
        def elsewhere():
            try:
                with handled(print, signal.SIGUSR1):
                    pass
            except RuntimeError as error:
                print("SignalQueue" in str(error))
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        ran = []
        with handled(lambda number: ran.append(threading.current_thread()), signal.SIGUSR1):
            thread = threading.Thread(target=lambda: signal.pthread_kill(threading.get_ident(), signal.SIGUSR1))
            thread.start()
            thread.join()
            while not ran:
                time.sleep(0.001)
        print(ran[0] is threading.main_thread())        # though another thread got the signal
    """)) == "True\nTrue\n"


def test_many_threads_take_each_signal_once() -> None:
    assert run(program("""
        with SignalQueue(RT) as queue:
            taken, lock = [], threading.Lock()
            def take():
                while True:
                    value = queue.recv().value
                    if value < 0:
                        return
                    with lock:
                        taken.append(value)
            threads = [threading.Thread(target=take) for _ in range(8)]
            for thread in threads:
                thread.start()
            for value in range(400):
                sigqueue(me, RT, value)
            for _ in threads:
                sigqueue(me, RT, -1)
            for thread in threads:
                thread.join()
            print(sorted(taken) == list(range(400)))
    """)) == "True\n"


def test_processes_hammer_one() -> None:
    receiver = program("""
        with SignalQueue(RT) as queue:
            print(me, flush=True)
            seen = {}
            while len(seen) < 8 or min(map(len, seen.values())) < 50:
                told = queue.recv(timeout=20)
                seen.setdefault(told.pid, []).append(told.value)
            print(all(values == list(range(50)) for values in seen.values()), flush=True)
    """)
    sender = program("""
        for value in range(50):
            while True:
                try:
                    sigqueue(int(sys.argv[1]), RT, value)
                    break
                except BlockingIOError:
                    time.sleep(0.001)
    """)
    with started(receiver) as process:
        number = line(process)
        senders = [subprocess.Popen([sys.executable, "-c", sender, number]) for _ in range(8)]
        assert [each.wait(PATIENCE) for each in senders] == [0] * 8
        assert line(process) == "True"


def test_a_full_queue_names_the_limit() -> None:
    assert run(program("""
        import resource
        with SignalQueue(RT) as queue:
            resource.setrlimit(resource.RLIMIT_SIGPENDING, (3, 3))
            try:
                for value in range(10**6):
                    sigqueue(me, RT, value)
            except BlockingIOError as error:
                print(error.filename == f"process {me}", error.strerror)
            assert [queue.recv().value for _ in range(value)] == list(range(value))
    """), user=64999) == (
        "True Resource temporarily unavailable: as many signals wait for their receivers as this user may queue "
        "(RLIMIT_SIGPENDING): let them be taken, or raise it by `ulimit -i` and in /etc/security/limits.conf\n"
    )


def test_wrong_receivers_and_values() -> None:
    assert run(program("""
        gone = subprocess.Popen(["true"])
        gone.wait()
        for process, value in ((gone.pid, 0), (1, 0), (0, 0), (me, 2**31)):
            try:
                sigqueue(process, RT, value)
            except (OSError, ValueError) as error:
                print(type(error).__name__)
    """), user=65534) == "ProcessLookupError\nPermissionError\nValueError\nValueError\n"


def test_fork_gives_the_child_its_own_and_programs_inherit_the_mask() -> None:
    assert run(program("""
        with SignalQueue(RT, signal.SIGTERM) as queue:
            sigqueue(me, RT, 1)                         # the parent's stays the parent's
            child = os.fork()
            if not child:
                sigqueue(os.getpid(), RT, 2)
                told = queue.recv(timeout=20)
                os._exit(told.value)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
            print(queue.recv().value)
            sleeper = subprocess.Popen(["sleep", "600"])
            sleeper.terminate()                         # blocked there, too
            try:
                sleeper.wait(0.1)
            except subprocess.TimeoutExpired:
                print("inherited")
            sleeper.kill()
            sleeper.wait()
            try:
                pickle.dumps(queue)
            except TypeError as error:
                print("make one there" in str(error))
    """)) == "1\ninherited\nTrue\n"


def test_a_dropped_queue_warns() -> None:
    assert run(program("""
        import warnings
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            SignalQueue(RT)
        print(told[0].category.__name__, signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    """)) == "ResourceWarning set()\n"


def test_importing_is_cheap() -> None:
    assert run("""
        import sys
        import anywire
        assert "anywire.ipc" not in sys.modules
        import anywire.ipc
        print([name for name in sys.modules if name.startswith("anywire.")])
    """) == "['anywire.ipc']\n"
