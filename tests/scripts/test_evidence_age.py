"""scripts/check_evidence.py: a page is as old as the changes to what it speaks of, in a real repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "check_evidence.py"
DAY = 86400


class Repository:
    """A repository whose commits have the dates we give them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "scripts").mkdir()
        (root / "docs" / "evidence").mkdir(parents=True)
        shutil.copy(SCRIPT, root / "scripts")
        (root / "docs" / "evidence" / "index.md").write_text("# Evidence\n")
        self.git("init", "--quiet")
        self.count = 0

    def git(self, *arguments: str, day: int = 0) -> str:
        date = f"{1_700_000_000 + day * DAY} +0000"
        environment = dict(os.environ)
        for role in ("AUTHOR", "COMMITTER"):
            environment |= {f"GIT_{role}_NAME": "a", f"GIT_{role}_EMAIL": "a@b", f"GIT_{role}_DATE": date}
        done = subprocess.run(
            ["git", *arguments], cwd=self.root, env=environment, capture_output=True, text=True, check=True,
        )
        return done.stdout.strip()

    def change(self, name: str, day: int = 0) -> str:
        self.count += 1
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(self.count))
        self.git("add", "-A")
        self.git("commit", "--quiet", "-m", "change", day=day)
        return self.git("rev-parse", "HEAD")

    def page(self, commit: str) -> None:
        facts = {"commit": commit, "sources": ["src"], "max_age_commits": 2, "max_age_days": 10}
        matter = "".join(f"{key}: {json.dumps(value)}\n" for key, value in facts.items())
        (self.root / "docs" / "evidence" / "kills.md").write_text(f"---\n{matter}---\n\n# Kills\n")

    def check(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "scripts/check_evidence.py"], cwd=self.root, capture_output=True, text=True, check=False,
        )


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


def test_no_pages_is_no_problem(repository: Repository) -> None:
    repository.change("src/a")
    assert repository.check().returncode == 0


def test_a_page_stays_fresh_while_only_other_files_change(repository: Repository) -> None:
    repository.page(repository.change("src/a"))
    for day in range(0, 100, 20):
        repository.change("docs/other", day)
    done = repository.check()
    assert (done.returncode, done.stdout) == (0, "")


def test_a_page_is_too_old_after_too_many_changes(repository: Repository) -> None:
    repository.page(repository.change("src/a"))
    repository.change("src/a")
    repository.change("src/b")
    assert repository.check().returncode == 0
    repository.change("src/a")
    done = repository.check()
    assert done.returncode == 1
    assert "docs/evidence/kills.md: 3 commits changed its sources" in done.stdout
    assert "EVIDENCE_ARGS=kills" in done.stdout


def test_a_page_is_too_old_when_one_change_waits_too_long(repository: Repository) -> None:
    repository.page(repository.change("src/a"))
    repository.change("src/a", day=1)
    repository.change("docs/other", day=11)
    assert repository.check().returncode == 0
    repository.change("docs/other", day=12)
    done = repository.check()
    assert done.returncode == 1
    assert "its sources changed 11 days ago" in done.stdout


def unknown_commit(repository: Repository) -> None:
    repository.page("0123456789" * 4)


def no_front_matter(repository: Repository) -> None:
    (repository.root / "docs" / "evidence" / "kills.md").write_text("# Kills\n")


@pytest.mark.parametrize(
    ("spoil", "text"), [(unknown_commit, "not in this history"), (no_front_matter, "no front matter")],
)
def test_what_cannot_be_judged_fails(repository: Repository, spoil: Callable[[Repository], None], text: str) -> None:
    repository.change("src/a")
    spoil(repository)
    done = repository.check()
    assert done.returncode == 1
    assert text in done.stdout
    assert done.stderr == ""
