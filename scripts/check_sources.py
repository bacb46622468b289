"""Check that each source file is in its folder's meson.build and that both versions agree; `--fix` writes the lists.

A file that is missing from a list works from a checkout and is absent from the wheel, which no other test notices.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "anywire"
INSTALLED = {".py", ".pyi", ".pxd", ".typed"}
# Each list starts after its opening line and ends at the first line that is only a bracket.
EXTENSIONS = re.compile(r"(?<=^extensions = \[\n)(.*?)(?=^\]$)", re.MULTILINE | re.DOTALL)
SOURCES = re.compile(r"(?<=files\(\n)(.*?)(?=^\)$)", re.MULTILINE | re.DOTALL)


def lines(names: list[str]) -> str:
    return "".join(f"  '{name}',\n" for name in sorted(names))


def expected(build: Path, text: str) -> str:
    """The text of a meson.build with lists that match its folder."""
    files = [path for path in build.parent.iterdir() if path.is_file()]
    extensions = [path.stem for path in files if path.suffix == ".pyx"]
    if extensions and not EXTENSIONS.search(text):
        raise SystemExit(f"{build}: has .pyx files but no `extensions = [` list; copy it from src/anywire/wires")
    text = EXTENSIONS.sub(lambda _: lines(extensions), text)
    return SOURCES.sub(lambda _: lines([path.name for path in files if path.suffix in INSTALLED]), text)


def main() -> int:
    fix = sys.argv[1:] == ["--fix"]
    problems = []
    for folder in sorted({path.parent for path in PACKAGE.rglob("*.py")}):
        build = folder / "meson.build"
        if not build.exists():
            problems.append(f"{folder.relative_to(ROOT)}: no meson.build; add one and its subdir() line")
            continue
        text = build.read_text()
        home = folder.relative_to(PACKAGE.parent)
        for place in re.findall(r"subdir: '(.*?)'", text):
            if place != str(home) and not place.startswith(f"{home}/"):
                problems.append(f"{build.relative_to(ROOT)}: installs into {place}, which is not {home}")
        if folder != PACKAGE and f"'{folder.name}'" not in (folder.parent / "meson.build").read_text():
            problems.append(f"{build.relative_to(ROOT)}: the meson.build above it doesn't name this folder")
        right = expected(build, text)
        if text != right and fix:
            build.write_text(right)
        elif text != right:
            name = build.relative_to(ROOT)
            problems.append(f"{name}: lists differ from the folder; run scripts/check_sources.py --fix")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for path, pattern in (
        (ROOT / "meson.build", r"^  version: '(.*)',$"),
        (PACKAGE / "__init__.py", r'^__version__(?:: \S+)? = "(.*)"$'),
    ):
        found = re.search(pattern, path.read_text(), re.MULTILINE)
        if found is None or found[1] != declared:
            problems.append(f"{path.relative_to(ROOT)}: version is not {declared}, as in pyproject.toml")
    print("\n".join(problems), end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
