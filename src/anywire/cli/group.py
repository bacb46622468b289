"""The command group `anywire`, its completion scripts, and how its commands report errors.

Owns: the table of commands, each imported when it is used (`anywire cat` starts without the rest); exit statuses: 0,
1 for what went wrong (one line on standard error), 2 for what was asked wrongly. On the main thread.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click
from click.shell_completion import get_completion_class

import anywire
from anywire.contract.errors import AddressError, AnywireError, UnknownWire

COMMANDS = {
    "bench": "anywire.cli.bench:bench",
    "cat": "anywire.cli.cat:cat",
    "completion": "anywire.cli.group:completion",
    "demo": "anywire.cli.demo.command:demo",
    "ipc": "anywire.cli.ipc:ipc",
}


# The library's errors advise in its own words; at a command line the same things are options.
AS_OPTIONS = (
    ("pass wait=SECONDS", "use --wait SECONDS"),
    ("try again, or pass a larger timeout", "try again, or use a larger --wait"),
    ("raise max_message= on this side", "raise --max-message"),
    ("pass sndbuf=", "use -o sndbuf="),
)


class Failure(click.ClickException):
    """One line on standard error, exit status 1."""

    def show(self, file: Any = None) -> None:
        """Print it as other tools do: the program's name first."""
        click.echo(f"anywire: {self.format_message()}", file=file, err=file is None)


class Commands(click.Group):
    """A group that imports a command when it is used, and turns anywire's errors into exit statuses."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands, sorted."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import one command."""
        target = COMMANDS.get(name)
        if target is None:
            return None
        module, _, attribute = target.partition(":")
        found: click.Command = getattr(importlib.import_module(module), attribute)
        return found

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. An address that can't be right is a usage error."""
        try:
            return super().invoke(ctx)
        except (AddressError, UnknownWire) as error:
            raise click.UsageError(str(error)) from None
        except AnywireError as error:
            raise Failure(_as_options(str(error))) from None
        except BrokenPipeError:
            raise                               # standard output is gone: click ends quietly
        except OSError as error:
            raise Failure(_in_words(error)) from None


def _as_options(text: str) -> str:
    for keyword, option in AS_OPTIONS:
        text = text.replace(keyword, option)
    return text


def _in_words(error: OSError) -> str:
    """Without the number that str() puts first."""
    if not error.strerror:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  anywire demo                                    one program over every wire, in 30 seconds
  anywire cat --listen tcp://127.0.0.1:9000       what comes in, on standard output
  tail -f log | anywire cat tcp://127.0.0.1:9000
  anywire bench --wires unix,tcp
  eval "$(anywire completion bash)"               complete commands with the Tab key
""",
)
@click.version_option(anywire.__version__, prog_name="anywire")
def group() -> None:
    """One connection API over any wire; the address decides."""


@click.command(
    epilog="""\b
Examples:
  eval "$(anywire completion bash)"                                       in ~/.bashrc
  eval "$(anywire completion zsh)"                                        in ~/.zshrc
  anywire completion fish > ~/.config/fish/completions/anywire.fish
"""
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for a SHELL."""
    made = get_completion_class(shell)
    assert made is not None
    script = made(group, {}, "anywire", "_ANYWIRE_COMPLETE")
    # Not source(): it first runs bash to look at its version, which fails where completion is only being packaged.
    click.echo(script.source_template % script.source_vars())


def run() -> None:
    """Run the command line; ends the process."""
    try:
        group(prog_name="anywire")
    except OSError as error:                    # printing --version or --help failed: click does that before `invoke`
        Failure(_in_words(error)).show()
        sys.exit(1)
