"""Apply the import contracts of pyproject.toml to .pyx and .pxd files, which import-linter doesn't read.

Reads `[tool.importlinter]` there: each `layers` contract (with one container) and each `forbidden` contract. Looks at
what a file imports itself, by `import`, `from ... import`, `cimport` and `from ... cimport`, wherever it stands.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src"
IMPORT = re.compile(r"^\s*(?:from\s+([\w.]+)\s+c?import\s+\(?([\w, ]+)|c?import\s+([\w., ]+))", re.MULTILINE)


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports; `from a import b` counts as a.b, which may be a module."""
    found = set()
    package = path.relative_to(SOURCE).parent.parts
    for match in IMPORT.finditer(path.read_text()):
        origin, names, plain = match.groups()
        if plain:
            found |= {name.split()[0] for name in plain.split(",") if name.strip()}
            continue
        dots = len(origin) - len(origin.lstrip("."))
        if dots:
            origin = ".".join([*package[: len(package) - dots + 1], origin.lstrip(".")]).rstrip(".")
        found |= {f"{origin}.{name.split()[0]}" for name in names.split(",") if name.strip()}
    return found


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def layers(contract: dict[str, Any]) -> list[list[str]]:
    """From the top; each layer is one or more modules: "a", "(optional)", "a : b"."""
    (container,) = contract["containers"]
    return [[f"{container}.{name.strip(' ()')}" for name in re.split("[:|]", layer)] for layer in contract["layers"]]


def forbidden(module: str, contracts: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What a module may not import, each with the name of the contract that says so."""
    pairs = []
    for contract in contracts:
        if contract["type"] == "layers":
            above: list[str] = []
            for layer in layers(contract):
                if any(within(module, name) for name in layer):
                    pairs += [(name, contract["name"]) for name in above]
                above += layer
        elif any(within(module, name) for name in contract["source_modules"]):
            pairs += [(name, contract["name"]) for name in contract["forbidden_modules"]]
    return pairs


def main() -> int:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    broken = 0
    for path in sorted([*SOURCE.rglob("*.pyx"), *SOURCE.rglob("*.pxd")]):
        module = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        used = imports(path)
        for name, reason in forbidden(module, contracts):
            for other in sorted(other for other in used if within(other, name)):
                print(f"{path.relative_to(ROOT)}: imports {other}: {reason}")
                broken += 1
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
