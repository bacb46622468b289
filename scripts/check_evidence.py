"""Fail when a page of docs/evidence/ is older than the code it speaks of by more than its stated age.

Age is counted in changes, not by the calendar alone: a page about code that nobody touched stays true. A page is
too old when more than `max_age_commits` commits changed its sources since its commit, or when the first of those is
more than `max_age_days` before the newest commit. Needs git and the history, nothing else.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DAY = 86400


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def matter(page: Path) -> dict[str, Any]:
    """The front matter that scripts/evidence.py wrote: one JSON value a line."""
    opening, _, rest = page.read_text().partition("---\n")
    block, ending, _ = rest.partition("---\n")
    if opening or not ending:
        raise ValueError("it has no front matter; pages here are written by `make evidence`")
    return {key: json.loads(value) for key, _, value in (line.partition(": ") for line in block.splitlines())}


def verdict(page: Path) -> str:
    """Why a page is too old, or nothing."""
    facts = matter(page)
    commit = facts["commit"]
    known = ["git", "merge-base", "--is-ancestor", commit, "HEAD"]
    if subprocess.run(known, cwd=ROOT, capture_output=True, check=False).returncode:
        return f"its commit {commit[:12]} is not in this history (a shallow clone, or it was never merged)"
    changes = git("log", "--format=%ct", f"{commit}..HEAD", "--", *facts["sources"]).split()
    if len(changes) > facts["max_age_commits"]:
        return f"{len(changes)} commits changed its sources since {commit[:12]}; it allows {facts['max_age_commits']}"
    if changes:
        days = (int(git("log", "-1", "--format=%ct")) - int(changes[-1])) // DAY
        if days > facts["max_age_days"]:
            return f"its sources changed {days} days ago; it allows {facts['max_age_days']}"
    return ""


def main() -> int:
    status = 0
    for page in sorted((ROOT / "docs" / "evidence").glob("*.md")):
        if page.name == "index.md":
            continue
        try:
            problem = verdict(page)
        except (ValueError, KeyError) as error:
            problem = f"unreadable: {error}"
        if problem:
            print(f"{page.relative_to(ROOT)}: {problem}; run `make evidence EVIDENCE_ARGS={page.stem}`")
            status = 1
    return status


if __name__ == "__main__":
    raise SystemExit(main())
