"""`anywire ipc ls`, `rm` and `watch`: what programs have left in the system, or use, and removing it.

Owns the three commands, the table, the questions. `ipc_objects` finds and removes, `ipc_users` knows who has what open.
On the main thread.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from anywire.cli.ipc_objects import KINDS, Look, Thing, remove
from anywire.cli.parameters import Names
from anywire.cli.signals import Stopped, die_of, stoppable

SHOWN = 3                   # processes in a row of the table
UNTOLD = ("mq", "sysv-mq", "sysv-sem")
"""Kinds that nobody need have open to be of use: messages and counts wait in them."""


def _directories(function: Any) -> Any:
    return click.option(
        "--directory", "-d", "directories", multiple=True, metavar="DIR",
        type=click.Path(exists=True, file_okay=False, path_type=Path), help="Also the FIFOs in DIR; may be repeated.",
    )(function)


def _kinds(function: Any) -> Any:
    return click.option(
        "--kind", "-k", "kinds", type=Names(KINDS), default=",".join(KINDS), metavar="KIND,...",
        help=f"Only these: {', '.join(KINDS)}.",
    )(function)


class Name(click.ParamType):  # type: ignore[type-arg] # generic since click 8.2 only
    """An object's name, completed from what there is."""

    name = "name"

    def shell_complete(self, context: click.Context, parameter: click.Parameter, text: str) -> list[CompletionItem]:
        """Those that can be removed."""
        names = {thing.name for thing in Look(KINDS[:-1]).things}
        return [CompletionItem(name) for name in sorted(names) if name.startswith(text)]


@click.group(
    epilog="""\b
Examples:
  anywire ipc ls                          everything, with those who use it
  anywire ipc ls --kind shm,sem --json
  anywire ipc rm /jobs                    asks first
  anywire ipc rm --orphans                what nobody has open any more
  anywire ipc watch                       what comes, changes and goes
"""
)
def ipc() -> None:
    """The system's message queues, semaphores, shared memory, FIFOs and abstract sockets.

    POSIX and System V objects stay when their programs end, until they are removed or the machine starts again. These
    commands list them with owner, size, what waits in them and who has them open, and remove them.
    """


@ipc.command(
    epilog="""\b
Examples:
  anywire ipc ls
  anywire ipc ls --kind shm,sysv-shm          only shared memory
  anywire ipc ls --directory /run/app         also the FIFOs there
  anywire ipc ls --json | jq '.objects[] | select(.used == false)'
"""
)
@_kinds
@_directories
@click.option("--json", "as_json", is_flag=True, help="One JSON object: objects, notes.")
def ls(kinds: Sequence[str], directories: Sequence[Path], as_json: bool) -> None:
    """List the objects.

    USED says whether some process has it open or mapped: yes, no, or ? where that can't be known: System V queues and
    semaphores are never open, and other users' processes can't be looked at.
    """
    found = Look(kinds, directories)
    if as_json:
        click.echo(json.dumps({"objects": [thing.as_json() for thing in found.things], "notes": found.notes}, indent=1))
        return
    _show(found.things)
    for note in found.notes:
        click.echo(f"anywire: {note}", err=True)


COLUMNS = ("KIND", "NAME", "OWNER", "MODE", "SIZE", "DEPTH", "USED", "PROCESSES", "DETAILS")
NUMBERS = ("SIZE", "DEPTH")


def _show(things: Sequence[Thing]) -> None:
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(_drawn(things))
        return
    # Into a file or a pipe each object is one line, however long.
    rows = [list(COLUMNS), *map(_row, things)] if things else [["Nothing."]]
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if name in NUMBERS else cell.ljust(width)
            for name, cell, width in zip(COLUMNS, row, widths, strict=False)
        ]
        click.echo("  ".join(cells).rstrip())


def _drawn(things: Sequence[Thing]) -> RenderableType:
    if not things:
        return Text("Nothing.")
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, overflow="fold", justify="right" if name in NUMBERS else "left")
    for thing in things:
        table.add_row(*map(Text, _row(thing)))
    return table


def _row(thing: Thing) -> list[str]:
    return [
        thing.kind, thing.name, thing.owner, thing.mode, _number(thing.size), _number(thing.depth),
        {True: "yes", False: "no", None: "?"}[thing.used], _who(thing), thing.details,
    ]


def _number(number: int | None) -> str:
    return "" if number is None else str(number)


def _who(thing: Thing) -> str:
    names = [f"{each['pid']} {each['name']}" for each in thing.processes]
    more = [f"{len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return ", ".join(names[:SHOWN] + more)


@ipc.command(
    epilog="""\b
Examples:
  anywire ipc rm /jobs
  anywire ipc rm --kind sem /jobs             where several kinds have one of this name
  anywire ipc rm shm:65538 msg:3              System V objects, as ls names them
  anywire ipc rm --orphans --kind shm,sem --yes
"""
)
@click.argument("names", nargs=-1, type=Name(), metavar="[NAME]...")
@click.option(
    "--orphans", is_flag=True,
    help="All that no process has open. Queues only when named or by --kind: messages may wait there.",
)
@_kinds
@_directories
@click.option("--yes", "-y", is_flag=True, help="Don't ask.")
@click.pass_context
def rm(
    context: click.Context, names: Sequence[str], orphans: bool, kinds: Sequence[str], directories: Sequence[Path],
    yes: bool,
) -> None:
    """Remove objects, after asking.

    What still has one open goes on using it, but nobody can open it any more; System V queues and semaphores are gone
    for those who wait, too.
    """
    if bool(names) == orphans:
        raise click.UsageError("name what to remove, or --orphans (one of them)")
    asked = context.get_parameter_source("kinds") is not click.core.ParameterSource.DEFAULT
    if orphans and not asked:
        kinds = [kind for kind in kinds if kind not in UNTOLD]
    found = Look(kinds, [*directories, *_parents(names)])
    chosen = _orphans(found) if orphans else [_named(found, name) for name in names]
    if not chosen:
        click.echo("Nothing to remove.")
        return
    if not yes:
        _show(chosen)
        in_use = sum(thing.used is True for thing in chosen)
        text = f"Remove {'it' if len(chosen) == 1 else f'these {len(chosen)}'}"
        click.confirm(f"{text}, {in_use} in use?" if in_use else f"{text}?", abort=True)
        # A question may wait for a long time: nothing is removed that is not what was shown.
        again = {(thing.kind, thing.name): thing for thing in Look(kinds, [*directories, *_parents(names)]).things}
        still = [thing for thing in chosen if _same(thing, again.get((thing.kind, thing.name)), orphans)]
        for thing in chosen:
            if thing not in still:
                click.echo(f"anywire: {thing.name}: has changed meanwhile, and stays", err=True)
    else:
        still = chosen
    failed = len(still) < len(chosen)
    for thing in still:
        try:
            remove(thing)
        except (OSError, ValueError) as error:
            text = f"{thing.name}: {error.strerror}" if isinstance(error, OSError) else str(error)
            click.echo(f"anywire: {text}", err=True)
            failed = True
        else:
            click.echo(f"removed {thing.kind} {thing.name}")
    if failed:
        sys.exit(1)


def _parents(names: Sequence[str]) -> list[Path]:
    """Directories of FIFOs that are named by their paths."""
    return [Path(name).parent for name in names if name.count("/") > 1 and Path(name).is_fifo()]


def _orphans(found: Look) -> list[Thing]:
    return [thing for thing in found.things if thing.used is False]


def _named(found: Look, name: str) -> Thing:
    matching = [thing for thing in found.things if thing.name == name]
    if not matching:
        raise click.UsageError(f"there is no {name!r}; anywire ipc ls shows what there is")
    if len(matching) > 1:
        kinds = ", ".join(thing.kind for thing in matching)
        raise click.UsageError(f"several are named {name!r} ({kinds}); say which with --kind")
    return matching[0]


def _same(before: Thing, now: Thing | None, orphan: bool) -> bool:
    return now is not None and now.identity == before.identity and not (orphan and now.used)


@ipc.command(
    epilog="""\b
Examples:
  anywire ipc watch
  anywire ipc watch --kind mq --every 0.2
  anywire ipc watch | tee log                 not on a terminal: a line for each change
"""
)
@_kinds
@_directories
@click.option(
    "--every", type=click.FloatRange(min=0.05), default=1.0, show_default=True, metavar="SECONDS",
    help="Time between two looks.",
)
def watch(kinds: Sequence[str], directories: Sequence[Path], every: float) -> None:
    """Show the objects live, until Ctrl-C.

    Not on a terminal it prints what there is, a line each that begins with "=", and then a line for each that comes
    (+), changes (~) or goes (-).
    """
    try:
        with stoppable():
            if Console().is_terminal:
                _live(kinds, directories, every)
            else:
                _changes(kinds, directories, every)
    except Stopped as stopped:
        die_of(stopped.number)


def _live(kinds: Sequence[str], directories: Sequence[Path], every: float) -> None:
    with Live(console=Console(highlight=False), auto_refresh=False, screen=True) as live:
        while True:
            found = Look(kinds, directories)
            live.update(Group(_drawn(found.things), *(Text(note, style="dim") for note in found.notes)), refresh=True)
            time.sleep(every)


def _changes(kinds: Sequence[str], directories: Sequence[Path], every: float) -> None:
    before: dict[tuple[str, str], tuple[tuple[int, ...], list[str]]] | None = None
    while True:
        found = Look(kinds, directories)
        now = {(thing.kind, thing.name): (thing.identity, _row(thing)) for thing in found.things}
        if before is None:
            for note in found.notes:
                click.echo(f"anywire: {note}", err=True)
            for _, row in now.values():
                _tell("=", row)
        else:
            for key, (identity, row) in before.items():
                if key not in now or now[key][0] != identity:
                    _tell("-", row)
            for key, (identity, row) in now.items():
                if key not in before or before[key][0] != identity:
                    _tell("+", row)
                elif before[key][1] != row:
                    _tell("~", row)
        sys.stdout.flush()
        before = now
        time.sleep(every)


def _tell(what: str, row: Sequence[str]) -> None:
    words = dict(zip(("owner", "mode", "size", "depth", "used", "by"), row[2:8], strict=True))
    told = "  ".join(f"{name} {value}" for name, value in words.items() if value)
    click.echo(f"{what} {row[0]} {row[1]}  {told}  {row[8]}".rstrip())
