"""How many requests a second do unmodified HTTP servers answer on each event loop? uvicorn and aiohttp under wrk.

"hello world" over 50 kept connections. uvicorn (httptools, no access log) runs a bare ASGI application. To be shown for
anywire's loop: 1.1 × uvloop with both. Compare `server_cpu_us`, CPU time of the server for one request, when something
else runs on the machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from anywire.cli.measure import turns
from benchmarks import loops
from benchmarks.harness import CLIENT_CORE, SERVER_CORE, Child, Report, options

SERVERS = ("uvicorn", "aiohttp")
CONNECTIONS, CELL, TARGET = 50, "50 connections", 1.1
SECONDS = {"": 1.0, "ms": 1e-3, "us": 1e-6, "s": 1.0}


async def hello(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """The ASGI application."""
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"11")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"hello world"})


def serve_uvicorn(loop: str) -> None:
    uvicorn = importlib.import_module("uvicorn")
    config = uvicorn.Config(hello, port=0, http="httptools", lifespan="off", access_log=False, log_level="error")
    server = uvicorn.Server(config)

    async def main() -> None:
        serving = asyncio.ensure_future(server.serve())
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        print("READY", server.servers[0].sockets[0].getsockname()[1], flush=True)
        await serving

    loops.run(loop, main())


def serve_aiohttp(loop: str) -> None:
    web = importlib.import_module("aiohttp.web")

    async def answer(request: Any) -> Any:
        return web.Response(body=b"hello world", content_type="text/plain")

    async def main() -> None:
        app = web.Application()
        app.router.add_get("/", answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=loops.BACKLOG).start()
        print("READY", runner.addresses[0][1], flush=True)
        await asyncio.get_running_loop().create_future()

    loops.run(loop, main())


def cpu_seconds(pid: int) -> float:
    """What the process has used so far (proc(5), utime and stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def under_wrk(port: int, seconds: float, pid: int) -> dict[str, float] | str:
    """One run of wrk against the server with this process id: requests a second and latency, or what went wrong."""
    before = cpu_seconds(pid)
    command = ["taskset", "-c", str(CLIENT_CORE), "wrk", "-t1", f"-c{CONNECTIONS}", f"-d{max(1, round(seconds))}s"]
    done = subprocess.run(
        [*command, "--latency", f"http://127.0.0.1:{port}/"], capture_output=True, text=True, check=False,
        timeout=seconds + 30,
    )
    used = cpu_seconds(pid) - before
    answered = re.search(r"(\d+) requests in", done.stdout)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)
    half, most = (re.search(rf"{share}%\s+([\d.]+)(\w*)", done.stdout) for share in (50, 99))
    bad = re.search(r"(Socket errors|Non-2xx).*", done.stdout)
    if done.returncode or None in (answered, rate, half, most) or bad is not None:
        return bad[0] if bad else (done.stderr.strip().splitlines() or ["wrk said nothing"])[-1]
    assert answered and rate and half and most
    return {
        "rate": float(rate[1]), "server_cpu_us": used / int(answered[1]) * 1e6,
        "p50_us": float(half[1]) * SECONDS[half[2]] * 1e6,
        "p99_us": float(most[1]) * SECONDS[most[2]] * 1e6,
    }


def main() -> None:
    arguments = options(__doc__, rounds=11, seconds=1).parse_args()
    if arguments.serve:
        kind, _, loop = arguments.serve.partition(", ")
        {"uvicorn": serve_uvicorn, "aiohttp": serve_aiohttp}[kind](loop)
        return
    report = Report("http_hello: uvicorn and aiohttp on each event loop", (*loops.PACKAGES, *SERVERS))
    report.begin()
    if shutil.which("wrk") is None:
        report.note("wrk is not installed, so nothing is measured (apt install wrk)")
        report.finish(arguments.json)
        return
    here = loops.installed(report)
    kinds = []
    for kind in SERVERS:
        missing = [one for one in (kind, "httptools")[:1 + (kind == "uvicorn")] if not importlib.util.find_spec(one)]
        if missing:
            report.note(f"{kind}: needs {' and '.join(missing)}, so not measured (pip install {' '.join(missing)})")
        else:
            kinds.append(kind)
    with contextlib.ExitStack() as stack:
        servers: dict[str, Child] = {}
        ports: dict[str, int] = {}
        for name in (f"{kind}, {loop}" for kind in kinds for loop in here):
            child = Child(SERVER_CORE, sys.executable, "-m", "benchmarks.http_hello", "--serve", name)
            stack.enter_context(child)
            try:
                ports[name] = loops.port_of(child)
                servers[name] = child
            except RuntimeError as error:
                report.note(f"{name}: did not start: {error}")
        for number in range(arguments.rounds):
            for kind in kinds:
                for name in turns([name for name in servers if name.startswith(kind)], number):
                    figures = under_wrk(ports[name], arguments.seconds, servers[name].pid)
                    report.results.add(f"{kind}, {CELL}", name, figures)
    for kind in kinds:
        cell, ours, base = f"{kind}, {CELL}", f"{kind}, anywire", f"{kind}, uvloop"
        report.rates(cell, base, "rate", ("server_cpu_us", "p50_us", "p99_us"))
        if "anywire" in here:
            report.claim(f"{ours}, of {base}", report.results.ratio(cell, ours, base, "rate"), TARGET)
            cpu = report.results.ratio(cell, base, ours, "server_cpu_us")
            if cpu is not None:
                report.note(f"      {ours}: {cpu:.2f} × by CPU time of the server")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
