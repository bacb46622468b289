"""Options that several commands have."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

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
