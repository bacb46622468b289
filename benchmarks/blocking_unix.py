"""What does a blocking channel over a Unix socket cost two processes, in calls to the kernel, CPU time and time?

Each contender is two processes on CPUs of their own (`anywire.cli.contenders`): anywire's blocking front, the barest
socket pair that Python can do (`sendall`, `recv`/`recv_into`, no framing, the size known to both),
multiprocessing.Pipe, pyzmq and pynng. To be shown: one send and one receive call a message; CPU time per message
at most 1.15 × the bare socket pair; faster than the other three; 1 MiB and 16 MiB at least as fast as the bare pair.

There and back is the measure. One way is reported: there pyzmq and pynng collect messages in threads of their own,
which `send_many` and `recv_many` do without threads ("many").
"""

from __future__ import annotations

import contextlib

from anywire.cli.calls import calls_more, strace
from anywire.cli.contenders import Contender, contenders, key
from anywire.cli.measure import size_name, turns
from anywire.cli.pair import Failed, Pair
from benchmarks.harness import CLIENT_CORE, SERVER_CORE, Report, options

SIZES = (64, 1 << 10, 64 << 10, 1 << 20, 16 << 20)
SMALL = (64, 1 << 10)
LARGE = (1 << 20, 16 << 20)
OURS = "anywire unix"
INTO = "anywire unix recv_into"
BARE = "bare socket pair"
NAMES = (OURS, INTO, "anywire unix many", BARE, "multiprocessing.Pipe", "pyzmq", "pynng")
SENDS = ("sendto", "sendmsg", "write", "writev")
RECEIVES = ("recvfrom", "recvmsg", "read", "readv")


def calls_per_message(contender: Contender, size: int) -> dict[str, float]:
    """System calls of both processes for one message, by name; a round trip is two messages."""
    added = calls_more(
        lambda wrap: Pair(contender, SERVER_CORE, CLIENT_CORE, wrap),
        lambda pair, count: pair.phase("echo", size, count),
        200, 1200,
    )
    return {name: number / 2 for name, number in added.items() if number / 2 >= 0.01}


def show_calls(report: Report, here: dict[str, Contender]) -> None:
    if strace() is None:
        report.note("system calls: strace is not installed, so they were not counted")
        return
    print("\nSystem calls for one message of 64 B (strace -f -c, both processes)")
    for name in (OURS, BARE, "multiprocessing.Pipe", "pyzmq", "pynng"):
        if name not in here:
            continue
        try:
            calls = calls_per_message(here[name], 64)
        except Failed as error:
            report.note(f"  {name}: {error}")
            continue
        report.note(f"  {name}: " + ", ".join(f"{call} {number:.2f}" for call, number in calls.items()))
        if name == OURS:
            sends = sum(calls.get(call, 0) for call in SENDS)
            receives = sum(calls.get(call, 0) for call in RECEIVES)
            report.claim("send calls per message", sends, 1.01, "calls", at_most=True)
            report.claim("receive calls per message", receives, 1.01, "calls", at_most=True)
            report.claim("other calls per message", sum(calls.values()) - sends - receives, 0.01, "calls", at_most=True)


def claims(report: Report, peers: list[str]) -> None:
    results = report.results
    for size in SMALL:
        cell = f"{size_name(size)} there and back"
        spent = results.ratio(cell, OURS, BARE, "cpu_us")
        report.claim(f"{cell}, CPU time of a bare socket pair", spent, 1.15, at_most=True)
    for size in SIZES:
        for peer in peers:
            cell = f"{size_name(size)} there and back"
            report.claim(f"{cell}, faster than {peer}", results.ratio(cell, OURS, peer, "rate"), 1.0)
    for size in LARGE:
        for way in ("there and back", "one way"):
            for ours in (OURS, INTO):
                cell = f"{size_name(size)} {way}"
                report.claim(f"{cell}, {ours} of sendall/recv_into", results.ratio(cell, ours, BARE, "rate"), 1.0)


def main() -> None:
    parser = options(__doc__, rounds=5, seconds=0.15)
    parser.add_argument("--no-strace", action="store_true", help="don't count system calls")
    arguments = parser.parse_args()
    report = Report("blocking_unix: blocking front over a Unix socket, two processes", ("anywire", "pyzmq", "pynng"))
    report.begin()
    found = {c.name: c for c in contenders() if c.front == "blocking" and c.name in NAMES}
    for contender in found.values():
        if contender.missing:
            report.note(f"{contender.name} is not installed, so not compared")
    here = {name: found[name] for name in NAMES if not found[name].missing}
    with contextlib.ExitStack() as stack:
        pairs: dict[str, Pair] = {}
        for name, contender in here.items():
            try:
                pairs[name] = stack.enter_context(Pair(contender, SERVER_CORE, CLIENT_CORE))
            except Failed as error:
                report.note(f"{key(contender)} did not start: {error}")
        for number in range(arguments.rounds):
            for size in SIZES:
                for phase, way in (("echo", "there and back"), ("flow", "one way")):
                    for name in turns(list(pairs), number):
                        if phase not in here[name].phases:
                            continue
                        try:
                            figures = pairs[name].measure(phase, size, arguments.seconds)
                        except Failed as error:
                            report.results.add(f"{size_name(size)} {way}", name, str(error))
                            pairs.pop(name).close()
                        else:
                            report.results.add(f"{size_name(size)} {way}", name, figures)
    for cell in report.results.cells:
        report.rates(cell, BARE, "rate", ("mb_s", "cpu_us", "client_cpu_us", "server_cpu_us"))
    claims(report, [name for name in ("multiprocessing.Pipe", "pyzmq", "pynng") if name in here])
    if not arguments.no_strace:
        show_calls(report, here)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
