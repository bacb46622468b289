"""The same echo on each event loop: the servers, the load generator, and a run of both.

Used by `anywire bench connections` and benchmarks of this repository, on the main thread. The servers are C programs
on bare epoll, on libuv and libevent, and the protocol of `echoing` on each Python event loop; the client is a C
program, so that it is never the slower side. The C programs are in `native/` and compiled when they are needed. Who
can't take part gets a line saying why. Children end with this process, however it dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from anywire.cli.loops import LOOPS, is_here
from anywire.cli.measure import Results, cores, turns

NATIVE = Path(__file__).parent / "native"
COUNTS = (1, 10, 100, 1000, 10_000)
SIZE = 1 << 10                      # bytes of a message
BASE = "C epoll"
LIBRARIES = {"libuv": ("-luv", "libuv1-dev"), "libevent": ("-levent", "libevent-dev")}
"""Their linker flag, and the package of Debian that has their headers."""
SERVERS = (BASE, *LIBRARIES, *LOOPS)
SPARE = 500                         # descriptors beside those of connections
PATIENCE = 30.0                     # seconds for a server to come up
LATE = 30.0                         # seconds that a measurement may take longer than asked for
Say = Callable[[str], None]


class NoCompiler(Exception):
    """The programs in C can't be compiled here."""


def raise_limit(needed: int) -> int:
    """Raise RLIMIT_NOFILE as far as allowed, for children too; how many connections that makes possible."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed and (hard == resource.RLIM_INFINITY or hard > soft):
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return min(needed, soft) - 200


def compiled(directory: Path, name: str, *flags: str) -> Path:
    """A program of `native/`, compiled into this directory. Raises NoCompiler with the compiler's last word."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise NoCompiler("this needs a C compiler (cc) for its load generator: apt install gcc libc6-dev")
    program = directory / name
    command = [*compiler.split(), "-O2", str(NATIVE / f"{name}.c"), "-o", str(program), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoCompiler(f"{name}.c was not compiled: {(done.stderr.strip().splitlines() or ['no word why'])[0]}")
    return program


@contextlib.contextmanager
def server(core: int, *command: str | Path) -> Iterator[tuple[int, int]]:
    """A server on one CPU, which says READY and its port: its process id and that port."""
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        try:
            os.sched_setaffinity(process.pid, {core})
            assert process.stdout is not None
            ready = select.select([process.stdout], [], [], PATIENCE)[0]
            words = process.stdout.readline().split() if ready else []
            if len(words) != 2:
                errors.seek(0)
                lines = errors.read().decode(errors="replace").strip().splitlines()
                raise RuntimeError(lines[-1] if lines else "it did not come up")
            yield process.pid, int(words[1])
        finally:
            process.kill()


def load(program: Path, port: int, count: int, seconds: float, pid: int, core: int) -> dict[str, float]:
    """One run of the load generator: its figures. RuntimeError with its complaint."""
    command = [program, "127.0.0.1", port, count, SIZE, 1, seconds, "raw", pid]
    with subprocess.Popen(
        list(map(str, command)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:
        try:
            os.sched_setaffinity(process.pid, {core})
            said, complaint = process.communicate(timeout=seconds + LATE)
        except subprocess.TimeoutExpired:
            late = f"it accepts or answers no more: nothing to measure after {seconds + LATE:g} s"
            raise RuntimeError(late) from None
        finally:
            process.kill()
    if process.returncode:
        raise RuntimeError(complaint.strip() or f"the load generator ended with status {process.returncode}")
    figures: dict[str, float] = json.loads(said)
    # Under many connections one of the two always has work to do.
    figures["busy"] = max(figures["client_load"], figures["rate"] * figures["server_cpu_us"] / 1e6)
    return figures


def cell_name(count: int) -> str:
    return f"{count} × 1 KiB"


def run(
    counts: Sequence[int] = COUNTS,
    servers: Iterable[str] = SERVERS,
    rounds: int = 3,
    seconds: float = 0.5,
    say: Say = lambda text: None,
    note: Say = lambda text: None,
) -> Results:
    """Measure each server with each number of connections, one message under way on each, in alternating rounds.

    seconds: of one measurement. say: called with what is done now. note: called with a line for what can't be done.
    Cells of the results are named by `cell_name`.
    """
    results = Results()
    server_core, client_core = cores()
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="anywire-bench-")))
        say("compiling the load generator")
        client = compiled(directory, "echo_client")
        running: dict[str, tuple[int, int]] = {}
        for name in servers:
            say(f"starting {name}")
            if (command := _command(name, directory, note)) is not None:
                try:
                    running[name] = stack.enter_context(server(server_core, *command))
                except RuntimeError as error:
                    results.add(cell_name(counts[0]), name, str(error))
        for number in range(rounds):
            for count in counts:
                for name in turns(list(running), number):
                    say(f"round {number + 1} of {rounds}: {name}, {count} connections")
                    pid, port = running[name]
                    try:
                        results.add(cell_name(count), name, load(client, port, count, seconds, pid, client_core))
                    except RuntimeError as error:
                        results.add(cell_name(count), name, str(error))
    return results


def _command(name: str, directory: Path, note: Say) -> list[str | Path] | None:
    """How a server is started; None, and a note, if it can't be."""
    if name == BASE:
        return [compiled(directory, "echo_server"), "127.0.0.1", "0"]
    if name in LIBRARIES:
        flag, package = LIBRARIES[name]
        try:
            return [compiled(directory, f"echo_{name}", flag)]
        except NoCompiler:
            note(f"{name}: its headers are not here, so not compared (apt install {package})")
            return None
    if not is_here(name):
        note(f"{name}: not installed, so not compared (pip install {name})")
        return None
    return [sys.executable, "-m", "anywire.cli.echoing", name]
