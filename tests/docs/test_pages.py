"""Every program shown in README, the tutorial and the how-to pages runs, and prints what the page says."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from docs_pages import blocks_of, commands_of, expected_of, matches, printed_by, program_of

ROOT = Path(__file__).resolve().parents[2]
DIRECTORIES = [ROOT / "docs/tutorial", ROOT / "docs/how-to"]
PAGES = [ROOT / "README.md", *(page for directory in DIRECTORIES for page in sorted(directory.glob("*.md")))]
LIMIT = 40
"""Seconds for one page: most take less than one."""


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


def run(command: list[str], where: Path) -> tuple[int, str, str]:
    """Run in a process group of its own, so that nothing it started outlives it."""
    # -W error: a channel that a page forgets to close, or a deprecated call, shows on standard error.
    environment = {**os.environ, "PYTHONWARNINGS": "error", "PYTHONUNBUFFERED": "1"}
    if "PYTHONPATH" in environment:  # relative entries mean this directory, not the page's
        environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, environment["PYTHONPATH"].split(os.pathsep)))
    with subprocess.Popen(
        command, cwd=where, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            output, errors = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, errors = process.communicate()
            pytest.fail(f"still running after {LIMIT} s; it printed:\n{output}\n{errors}")
        finally:
            # What still holds the output would have kept communicate() waiting; this is for what held nothing.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output, errors


WITH_PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks_of(page))]
WITH_COMMANDS = [page for page in PAGES if commands_of(blocks_of(page))]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=names(WITH_PYTHON))
def test_programs_run_and_print_what_the_page_shows(page: Path, tmp_path: Path) -> None:
    blocks = blocks_of(page)
    for block in blocks:
        if block.title:
            (tmp_path / block.title).write_text(block.text, encoding="utf-8")
    program = tmp_path / f"{page.stem.replace('-', '_')}_page.py"
    program.write_text(program_of(blocks), encoding="utf-8")
    status, output, errors = run([sys.executable, str(program)], tmp_path)
    assert not errors, errors
    assert status == 0
    printed = printed_by(output)
    for line, expected in expected_of(blocks).items():
        assert matches(expected, printed.get(line, "")), (
            f"{page.name}:{line} shows\n{expected}and printed\n{printed.get(line, '')}"
        )


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=names(WITH_COMMANDS))
def test_commands_run_and_print_what_the_page_shows(page: Path, tmp_path: Path) -> None:
    blocks = blocks_of(page)
    for block in blocks:
        if block.title:
            (tmp_path / block.title).write_text(block.text, encoding="utf-8")
    here = f'anywire() {{ "{sys.executable}" -m anywire "$@"; }}; python() {{ "{sys.executable}" "$@"; }}\n'
    for command in commands_of(blocks):
        status, output, errors = run(["bash", "-c", here + command.command], tmp_path)
        assert (status, errors) == (0, ""), f"{page.name}:{command.line}: {errors}"
        assert matches(command.expected, output), (
            f"{page.name}:{command.line} shows\n{command.expected}and printed\n{output}"
        )


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_blocks_say_what_they_are(page: Path) -> None:
    # A fence without a language, or with one that nobody runs, would be code that nobody has tried.
    known = {"python", "text", "console", "sh", "c", "mermaid", "toml"}
    fences = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("```")]
    assert len(fences) % 2 == 0
    assert {fence.strip("`").split()[0] if fence.strip("`") else "" for fence in fences[::2]} <= known
