"""The programs in README, tutorial and how-to pages, taken out so that they can be run.

All ```python blocks of a page are one program, run as a file whose line numbers are those of the page: a traceback
points into the page. A block with `title="name.py"` is a file of that name beside it. A ```text block that follows
shows what the block above it printed (`...` stands for anything). In ```console blocks the lines that start with `$ `
are run by bash, and the lines below each are its output.
"""

from __future__ import annotations

import doctest
import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path

_FENCE = re.compile(r"^```(\w+)(?:\s+title=\"([^\"]+)\")?\s*$")
MARK = "\x02block {}\x03"


@dataclass
class Block:
    """One fenced block: its language, the file it names if any, the page's line of its fence, its lines."""

    language: str
    title: str
    line: int
    lines: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks with a language, in order."""
    found: list[Block] = []
    inside: Block | None = None
    skipping = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if inside is not None:
            if line.startswith("```"):
                found.append(inside)
                inside = None
            else:
                inside.lines.append(line)
        elif skipping:
            skipping = not line.startswith("```")
        elif match := _FENCE.match(line):
            inside = Block(match[1], match[2] or "", number)
        else:
            skipping = line.startswith("```")
    assert inside is None, f"{page}: the block of line {inside.line if inside else 0} has no end"
    return found


def program_of(blocks: list[Block]) -> str:
    """The page's program. On each fence's line it tells the runner which block starts."""
    lines: list[str] = []
    for block in blocks:
        if block.language != "python" or block.title:
            continue
        lines += [""] * (block.line - 1 - len(lines))
        mark = MARK.format(block.line)
        lines.append(f"if __name__ == '__main__': print({mark!r}, end='', flush=True)")
        lines += block.lines
    return "\n".join(lines) + "\n"


def expected_of(blocks: list[Block]) -> dict[int, str]:
    """What a block (by its line) must print: the text block right after it, if there is one."""
    return {
        before.line: after.text
        for before, after in itertools.pairwise(blocks)
        if before.language == "python" and after.language == "text"
    }


def printed_by(output: str) -> dict[int, str]:
    """What each block printed, by its line."""
    parts = re.split("\x02block (\\d+)\x03", output)
    return {int(line): text for line, text in zip(parts[1::2], parts[2::2], strict=True)}


def matches(expected: str, got: str) -> bool:
    """Whether the output is as shown; `...` stands for anything."""
    checker = doctest.OutputChecker()
    return checker.check_output(expected, got, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)


@dataclass
class Command:
    """One `$ ` line of a console block, and the output shown below it."""

    line: int
    command: str
    expected: str


def commands_of(blocks: list[Block]) -> list[Command]:
    """The commands of all console blocks. A line that ends in a backslash goes on in the next one."""
    found: list[Command] = []
    for block in blocks:
        if block.language != "console":
            continue
        goes_on = False
        for number, line in enumerate(block.lines, block.line + 1):
            if goes_on:
                found[-1].command += "\n" + line
            elif line.startswith("$ "):
                found.append(Command(number, line[2:], ""))
            else:
                found[-1].expected += line + "\n"
                continue
            goes_on = line.endswith("\\")
    return found
