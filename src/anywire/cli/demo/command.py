"""`anywire demo`: the command, its three parts in order, and what is on the screen meanwhile.

Owns: the demo's directory and server process, how the time is divided, and the exit status. On the main thread. Ctrl-C
at any moment unwinds everything; if this process is killed outright, its server notices, removes the directory and
goes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from anywire.cli.demo import program, promises, report
from anywire.cli.demo.addresses import Place, largest_file, names, places
from anywire.cli.demo.left import Before
from anywire.cli.demo.material import Material, NoFiles, read
from anywire.cli.demo.process import ServerFailed, ServerProcess
from anywire.cli.demo.work import ROUNDS, contenders
from anywire.cli.demo.work import run as run_work
from anywire.cli.parameters import Names, plot_option
from anywire.cli.signals import Stopped, die_of, held, stoppable
from anywire.contract import counters

KILL_S, CANCEL_S, START_S = 0.6, 1.0, 1.5      # seconds that these take, about: only to divide the time
WHOLE_S = 25.0                                 # with so much time, promises are shown over every wire
PREFERRED = ("unix", "shm", "tcp", "tls", "pipe", "seqpacket", "fifo", "inproc")


class Screen:
    """A bar and the table so far, redrawn between measurements, on a terminal only."""

    def __init__(self, console: Console, steps: int) -> None:
        self.console = console
        self.steps = steps
        self.done = 0
        self.table: Table | None = None
        self.live = Live(console=console, auto_refresh=False, transient=True)

    def step(self, text: str, outcome: report.Outcome | None = None) -> None:
        """The next step begins."""
        self.done += 1
        if outcome is not None and any(contender.messages for contender in outcome.contenders):
            self.table = report.wires_table(outcome)
        self.tick(text)

    def tick(self, text: str) -> None:
        """The step goes on."""
        if not self.console.is_terminal:
            return
        bar = ProgressBar(total=self.steps, completed=min(self.done, self.steps), width=40)
        parts: list[RenderableType] = [Text(text), bar]
        if self.table is not None:
            parts.insert(0, self.table)
        self.live.update(Group(*parts), refresh=True)


def _run(
    material: Material, wanted: Sequence[str] | None, seconds: float, screen_console: Console, stack: ExitStack
) -> report.Outcome:
    began = time.monotonic()
    counters.page_fd()                          # the library's one page of counters stays as long as the process
    before = Before()
    with held():
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="anywire-demo-", ignore_cleanup_errors=True)))
    table = places(directory, wanted)
    found = contenders(table)
    own_files = [path.name for path in directory.iterdir()]
    whole = seconds >= WHOLE_S
    pause = 3.0 if seconds >= 15 else 1.0
    open_wires = sum(not place.reason for place in table) if whole else 1
    share = max(seconds * 0.3, seconds - START_S - pause - open_wires * (KILL_S + CANCEL_S))
    outcome = report.Outcome(material, found)
    steps = ROUNDS * sum(not contender.reason for contender in found) + 2 * open_wires + 1
    server = stack.enter_context(ServerProcess(str(directory)))
    pids = [server.process.pid]
    screen = Screen(screen_console, steps)
    with screen.live:
        at_first = _server_descriptors(server)
        run_work(found, material, server, share, lambda contender: screen.step(f"files over {contender.name}", outcome))
        # Files too large for a wire's messages don't keep it from these.
        failed = {contender.name for contender in found if contender.error}
        able = [place for place in table if not place.reason and place.name not in failed]
        for place in _able_to_tell_death(able, whole):
            screen.step(f"kill -9 of a server over {place.name}", outcome)
            outcome.promises.append(promises.kill(place, server, directory, pids))
        reliable = _reliable(able)
        for place in [place for place in reliable if not place.threaded][:1]:
            screen.step(f"a reader over {place.name} pauses")
            outcome.promises.append(promises.pause(place, server, pause, screen.tick))
        for place in reliable if whole else reliable[:1]:
            screen.step(f"cancelled receives over {place.name}")
            outcome.promises.append(promises.cancel(place, server, promises.CANCELS, screen.tick))
    at_last = _server_descriptors(server)
    (outcome.loop,) = counters.snapshot(server.process.pid).loops
    addresses = server.addresses
    server.close()
    outcome.left = before.left(directory, [*own_files, "killed"], pids, addresses, sorted(set(at_last) - set(at_first)))
    outcome.seconds = time.monotonic() - began
    return outcome


def _server_descriptors(server: ServerProcess) -> list[str]:
    with server.act("descriptors") as act:
        return [f"{fd}: {what}" for fd, what in json.loads(act.address).items()]


def _rank(place: Place) -> int:
    return PREFERRED.index(place.name) if place.name in PREFERRED else len(PREFERRED)


def _reliable(able: Sequence[Place]) -> list[Place]:
    return [place for place in sorted(able, key=_rank) if place.traits.promises("reliable")]


def _able_to_tell_death(able: Sequence[Place], whole: bool) -> list[Place]:
    found = [place for place in sorted(able, key=_rank) if place.traits.promises("sees_death") and not place.threaded]
    return found if whole else found[:1]


@click.command(
    short_help="Run one program over every wire; the promises shown.",
    epilog="""\b
Examples:
  anywire demo                          the running Python's standard library sources, 30 seconds
  anywire demo --seconds 8 ~/photos     other files, less time
  anywire demo --wires unix,tcp --json >demo.json
  anywire demo --plot demo.svg

\b
Status: 0 if every digest matched, every promise held and nothing was left behind, else 1.
"""
)
@click.argument("path", required=False, type=click.Path(exists=True, path_type=Path))
@click.option("--seconds", type=click.FloatRange(2, 3600), default=30.0, show_default=True, help="About this long.")
@click.option("--wires", type=Names(names()), help="Only these wires, separated by commas.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@plot_option
def demo(
    path: Path | None, seconds: float, wires: tuple[str, ...] | None, as_json: bool, plot_file: Path | None
) -> None:
    """Run one program over every wire, show what anywire promises, and what is left behind: nothing.

    Two processes. The files below PATH go as messages, each is answered with its digest; multiprocessing.Pipe and
    asyncio streams do the same beside it. anywire's side of all this runs on its own event loop.
    """
    console, notes = Console(), Console(stderr=True)
    try:
        with stoppable():
            turns = ROUNDS * (len(names()) + 2)
            try:
                material = read(path, seconds / 2 / turns, largest_file(wires))
            except NoFiles as error:
                raise click.ClickException(str(error)) from None
            if not as_json:
                console.print("This program runs over each wire. Only the address changes.\n", style="bold")
                console.print(Syntax(program.text(), "python", background_color="default"))
                console.print()
            with ExitStack() as stack:
                try:
                    outcome = _run(material, wires, seconds, notes if as_json else console, stack)
                except ServerFailed as error:
                    raise click.ClickException(str(error)) from None
            if as_json:
                click.echo(json.dumps(report.as_json(outcome), indent=1))
            else:
                report.show(outcome, console)
            if plot_file is not None:
                report.plot(outcome, plot_file)
                notes.print(f"plot: {plot_file}", highlight=False, soft_wrap=True)
    except Stopped as stopped:
        notes.print("Stopped.", style="bold")
        die_of(stopped.number)
    if outcome.problems:
        raise SystemExit(1)
