"""Options that several commands have."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from anywire.cli.loops import LOOPS, is_here

F = TypeVar("F", bound=Callable[..., Any])


class Names(click.ParamType):  # type: ignore[type-arg] # generic since click 8.2 only
    """A comma-separated choice."""

    name = "names"

    def __init__(self, known: Sequence[str]) -> None:
        self.known = known

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> tuple[str, ...]:
        """Split it, and refuse what is not known."""
        if not isinstance(value, str):
            return tuple(value)
        found = tuple(word.strip() for word in value.split(","))
        for word in found:
            if word not in self.known:
                self.fail(f"{word!r} is none of {', '.join(self.known)}")
        return found


    def shell_complete(self, context: click.Context, parameter: click.Parameter, text: str) -> list[CompletionItem]:
        """The names that may come next, after those that are there."""
        before, comma, begun = text.rpartition(",")
        had = before.split(",")
        return [
            CompletionItem(before + comma + name)
            for name in self.known if name.startswith(begun) and name not in had
        ]


class Numbers(click.ParamType):  # type: ignore[type-arg] # generic since click 8.2 only
    """`1,10,100`: whole numbers from 1 to `largest`."""

    name = "numbers"

    def __init__(self, largest: int) -> None:
        self.largest = largest

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> tuple[int, ...]:
        """Split it, and refuse what is out of range."""
        if not isinstance(value, str):
            return tuple(value)
        found = []
        for word in map(str.strip, value.split(",")):
            if not (word.isascii() and word.isdigit() and 1 <= int(word) <= self.largest):
                self.fail(f"{word!r} is not a number from 1 to {self.largest}; write for example 1,100")
            found.append(int(word))
        return tuple(dict.fromkeys(found))


UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


class Sizes(click.ParamType):  # type: ignore[type-arg] # generic since click 8.2 only
    """`64,1k,64k,1m`: sizes in bytes. Parameters: the largest that is allowed, and an example for an error."""

    name = "sizes"

    def __init__(self, largest: str = "64m", example: str = "64,1k,64k,1m") -> None:
        self.largest, self.example = largest, example

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> tuple[int, ...]:
        """Split it, and refuse what is no size."""
        if not isinstance(value, str):
            return tuple(value)
        found = []
        for word in value.split(","):
            size = size_of(word)
            if not 1 <= size <= size_of(self.largest):
                self.fail(f"{word!r} is not a size from 1 to {self.largest}; write for example {self.example}")
            found.append(size)
        return tuple(dict.fromkeys(found))


class Size(Sizes):
    """One of them."""

    name = "size"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        if "," in value:
            self.fail(f"{value!r} is more than one size")
        return super().convert(value, parameter, context)[0]


def size_of(word: str) -> int:
    """`64`, `1k`, `64m`, `1g` in bytes; -1 if it is none of these."""
    number, unit = word.strip().lower(), 1
    if number[-1:] in UNITS:
        number, unit = number[:-1], UNITS[number[-1]]
    return int(number) * unit if number.isascii() and number.isdigit() else -1


def _matplotlib_is_here(context: click.Context, parameter: click.Parameter, file: Path | None) -> Path | None:
    # Found out before the run, not after it.
    if file is not None and importlib.util.find_spec("matplotlib") is None:
        raise click.ClickException("--plot needs matplotlib: pip install 'anywire[plot]'")
    return file


def plot_option(function: F) -> F:
    """`--plot FILE`, the argument `plot_file`."""
    return click.option(
        "--plot", "plot_file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
        callback=_matplotlib_is_here, help="Draw into FILE (.png, .svg, .pdf).",
    )(function)


def _loop_is_here(context: click.Context, parameter: click.Parameter, name: str) -> str:
    # Found out before the run, not by children in it.
    if not is_here(name):
        raise click.ClickException(f"--loop {name} needs {name}: pip install {name}")
    return name


def loop_option(function: F) -> F:
    """`--loop NAME`, the argument `loop`."""
    return click.option(
        "--loop", type=click.Choice(sorted(LOOPS)), default="anywire", show_default=True, callback=_loop_is_here,
        help="Event loop of anywire's asyncio channels; peers have asyncio's.",
    )(function)
