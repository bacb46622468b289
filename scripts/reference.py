"""Fill the generated parts of docs/reference/ from the library itself; `--check` fails when one is stale.

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`. NAME is `methods CLASS`,
`options SCHEME`, `traits`, `errors` or `counters`. Needs the built library on the path: the compiled classes'
docstrings and the wires' options are read from it. What mkdocstrings can read by itself, from Python files, isn't
generated here.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from anywire.contract import counters_page, errors
from anywire.contract.address import Address
from anywire.contract.traits import Traits
from anywire.contract.wire import wire_for

PAGES = Path(__file__).resolve().parent.parent / "docs" / "reference"
PART = re.compile(r"(<!-- generated: ([^>]+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

# Members that other parts of the library need and users don't.
INNER = {"driver", "loop", "detach_state", "send_loan", "when_closed", "over", "endpoint"}
CONSTANTS = {"SCRATCH": "262144"}
C_TYPES = {"Py_ssize_t": "int", "bool": "bool", "bytes": "bytes", "Loan": "Loan", "list": "list", "str": "str"}
# An address of each kind that promises something of its own.
EXAMPLES = {
    "inproc": ("inproc://name",),
    "pipe": ("pipe:?read=3&write=4",),
    "fifo": ("fifo:///run/x", "fifo:///run/x?reply=true", "fifo:///run/x?writers=many"),
    "mq": ("mq:///name", "mq:///name?reply=true"),
    "sysv": ("sysv://0x5eed", "sysv://0x5eed?reply=true"),
    "unix": ("unix:///run/x", "unix:///run/x?type=seqpacket"),
    "shm": ("shm://name",),
    "tcp": ("tcp://host:1",),
    "tls": ("tls://host:1",),
    "udp": ("udp://host:1",),
}


def signature_of(method: Any) -> tuple[str, str]:
    """The signature and the text of a compiled method, whose docstring starts with its Cython signature."""
    first, _, rest = inspect.cleandoc(method.__doc__).partition("\n")
    arguments = re.sub(r"^\w+\.", "", first)
    for ctype, name in C_TYPES.items():
        arguments = re.sub(rf"\b{ctype} (\w+)(=?)", rf"\1: {name} \2 ", arguments)
    for constant, value in CONSTANTS.items():
        arguments = arguments.replace(constant, value)
    arguments = re.sub(r" +([,)])", r"\1", arguments).replace("  ", " ")
    return re.sub(r"\(self(, )?", "(", arguments), rest.strip()


def methods(name: str) -> Iterator[str]:
    """Every public member of a compiled class."""
    module, _, cls_name = name.rpartition(".")
    cls = getattr(importlib.import_module(module), cls_name)
    properties: list[tuple[str, Any]] = []
    functions: list[tuple[str, Any]] = []
    for member in sorted(dir(cls)):
        if member.startswith("_") or member in INNER:
            continue
        value = getattr(cls, member)
        (functions if callable(value) else properties).append((member, value))
    for member, value in properties:
        yield f"- `{member}`: {first_sentence(value.__doc__)}"
    yield "\n## Methods\n"
    for _, value in functions:
        signature, text = signature_of(value)
        yield f"### `{signature}`\n\n{paragraphs(text)}\n"


def paragraphs(text: str) -> str:
    """The docstring's text, with its `Raises` and `Parameters` on lines of their own."""
    text = " ".join(line.strip() or "\n\n" for line in text.splitlines())
    text = re.sub(r"\s*\n\n\s*", "\n\n", text)
    return re.sub(r" (Raises [A-Z]|Parameters: )", r"\n\n\1", text)


def first_sentence(text: str | None) -> str:
    words = " ".join((text or "").split())
    return words.partition(". ")[0] + "." if len(words) > 200 else words


def options(scheme: str) -> Iterator[str]:
    """The options of one wire."""
    wire = wire_for(f"{scheme}:")
    if not wire.options:
        yield "This wire has no options of its own."
        return
    yield "| option | value | default | on which side | meaning |"
    yield "|---|---|---|---|---|"
    for name, option in sorted(wire.options.items()):
        sides = "both" if len(option.sides) == 2 else " and ".join(sorted(option.sides))
        meaning = option.doc.replace("|", "\\|")
        yield f"| `{name}` | {kind_of(option)} | {default_of(option)} | {sides} | {meaning} |"


def kind_of(option: Any) -> str:
    named = {bool: "`true` or `false`", int: "a whole number", float: "seconds, or with a unit: `1m`", str: "text"}
    if option.type in named:
        return named[option.type]
    try:
        option.type(object())
    except ValueError as error:
        return str(error)
    return "an object (keyword only)"


def default_of(option: Any) -> str:
    if option.default is None or option.default == ():
        return "none"
    if isinstance(option.default, bool):
        return f"`{str(option.default).lower()}`"
    if isinstance(option.default, int) and "octal" in getattr(option.type, "__name__", ""):
        return f"`{option.default:04o}`"
    if isinstance(option.default, float):
        return f"`{option.default:g}`"
    return f"`{option.default}`"


def traits(_: str) -> Iterator[str]:
    """What each wire promises."""
    columns = list(Traits.__dataclass_fields__)
    yield f"| wire | {' | '.join(column.replace('_', ' ') for column in columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for scheme, addresses in EXAMPLES.items():
        if f"generated: options {scheme} " not in (PAGES / "wires.md").read_text(encoding="utf-8"):
            continue
        for address in addresses:
            cells = wire_for(address).traits(Address.parse(address)).cells()
            label = scheme if len(addresses) == 1 else f"`{address}`"
            yield f"| {label} | {' | '.join(cells[column] for column in columns)} |"


def error_table(_: str) -> Iterator[str]:
    """Every error, the builtin it is, and its attributes."""
    yield "| error | builtin | attributes | meaning |"
    yield "|---|---|---|---|"
    for cls in vars(errors).values():
        if not (inspect.isclass(cls) and issubclass(cls, errors.AnywireError)) or cls is errors.AnywireError:
            continue
        builtin = next(base.__name__ for base in cls.__mro__ if base.__module__ == "builtins")
        everywhere = {"self", "what", "address", "operation", "advice", "hint"}
        known = set(inspect.signature(cls.__init__).parameters) - everywhere
        attributes = ", ".join(f"`{name}`" for name in sorted(known)) or " "
        meaning = inspect.cleandoc(cls.__doc__ or "").partition("\n")[0]
        yield f"| `{cls.__name__}` | `{builtin}` | {attributes} | {meaning} |"


def counter_table(_: str) -> Iterator[str]:
    """The counters, with the meaning that the page's layout gives them."""
    layout = (PAGES.parent / "design" / "counters.md").read_text(encoding="utf-8").partition("## Loop slot")[0]
    meanings = dict(re.findall(r"^\| \d+ \| \d+ \| `(\w+)` \| (.*?) ?\|$", layout, re.MULTILINE))
    yield "| counter | meaning |"
    yield "|---|---|"
    for name in counters_page.COUNTERS:
        meaning = meanings[name] or "as `bytes_sent`, of messages received"
        yield f"| `{name}` | {meaning} |"


PARTS: dict[str, Callable[[str], Iterator[str]]] = {
    "methods": methods,
    "options": options,
    "traits": traits,
    "errors": error_table,
    "counters": counter_table,
}


def filled(text: str) -> str:
    """A page's text with its generated parts made anew."""

    def part(match: re.Match[str]) -> str:
        kind, _, argument = match[2].partition(" ")
        return f"{match[1]}\n" + "\n".join(PARTS[kind](argument)).strip() + f"\n\n{match[4]}"

    return PART.sub(part, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a page is stale")
    arguments = parser.parse_args()
    stale = []
    for page in sorted(PAGES.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        new = filled(text)
        if new == text:
            continue
        stale.append(page.name)
        if not arguments.check:
            page.write_text(new, encoding="utf-8")
    if arguments.check and stale:
        raise SystemExit(f"reference: stale: {', '.join(stale)}; run scripts/reference.py")
    print(f"reference: {'wrote ' + ', '.join(stale) if stale else 'up to date'}")


if __name__ == "__main__":
    main()
