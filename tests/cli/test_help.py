"""What a new user meets first: help with examples, completion, and one clear line when an extra is missing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from cli_processes import run

import anywire
from anywire.cli.group import COMMANDS, group


@pytest.mark.parametrize("command", [[], *([name] for name in sorted(COMMANDS))], ids=" ".join)
def test_help_explains_and_has_examples(command: list[str]) -> None:
    done = run(*command, "--help")
    text = done.stdout.decode()
    assert done.returncode == 0, done.stderr
    assert text.startswith("Usage: " + " ".join(["anywire", *command]))
    examples = text.partition("Examples:\n")[2]
    assert examples.count("anywire " + " ".join(command)) >= 2
    assert max(map(len, text.splitlines())) <= 100


def test_every_option_is_explained() -> None:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"anywire {name} {parameter.opts}"


def test_the_version_is_the_package_s() -> None:
    assert run("--version").stdout.decode() == f"anywire, version {anywire.__version__}\n"


def test_an_unknown_command_is_a_usage_error() -> None:
    done = run("dog")
    assert done.returncode == 2
    assert b"dog" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_the_shell(shell: str) -> None:
    done = run("completion", shell)
    assert done.returncode == 0, done.stderr
    assert b"_ANYWIRE_COMPLETE=" + shell.encode() + b"_complete" in done.stdout


def test_completion_knows_commands_and_schemes() -> None:
    """The protocol that the scripts of click use: the words so far, and which of them is completed."""

    def complete(words: str) -> list[str]:
        environment = {**os.environ, "_ANYWIRE_COMPLETE": "bash_complete", "COMP_WORDS": words}
        environment["COMP_CWORD"] = str(len(words.split(" ")) - 1)
        done = run(env=environment)
        return [line.partition(",")[2] for line in done.stdout.decode().splitlines()]

    assert complete("anywire c") == ["cat", "completion"]
    assert "unix:///" in complete("anywire cat u")
    assert "--listen" in complete("anywire cat --l")
    assert complete("anywire demo --wires unix,t") == ["unix,tcp", "unix,tls"]


@pytest.mark.parametrize("missing", [["click"], ["rich"], ["click", "rich"]], ids=" ".join)
def test_without_the_extra_one_line_names_it(missing: list[str], tmp_path: Path) -> None:
    for name in missing:
        (tmp_path / f"{name}.py").write_text("raise ImportError('not installed')\n")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from anywire.cli.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (1, b"")
    wanted = f"anywire: the command line needs {' and '.join(missing)}: pip install 'anywire[cli]'\n"
    assert done.stderr.decode() == wanted


def test_ctrl_c_before_a_command_begins_ends_it_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = run("demo", env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == -signal.SIGINT
    assert done.stderr == b""
