"""Run the slow jobs of evidence/jobs.toml and write a page for each into docs/evidence/.

A page holds what the job printed and, as its front matter, what it is worth: the commit, the date, the machine, the
sources it speaks of and how old it may become; `scripts/check_evidence.py` reads that. Sources with uncommitted changes
are refused, because the page would name a commit that it didn't measure. Called by `make evidence`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "evidence"
# The list of pages on index.md stands between these.
BEGIN, END = "<!-- pages -->\n", "<!-- end of pages -->\n"


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def machine() -> str:
    described = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in described if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{models[0] if models else platform.machine()}, {os.cpu_count()} CPUs, {memory:.0f} GiB, "
        f"Linux {platform.release()}, Python {platform.python_version()}"
    )


def run(command: list[str], limit: float) -> str:
    """Run a job and show its output as it comes. Returns it; a failure ends the program."""
    program = [sys.executable if word == "python" else word for word in command]
    lines = []
    with subprocess.Popen(
        program, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="backslashreplace", env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        start = time.monotonic()
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
            if time.monotonic() - start > limit:
                os.killpg(process.pid, 9)
                raise SystemExit(f"evidence: stopped after {limit:.0f} s: {' '.join(command)}")
    if process.returncode:
        raise SystemExit(f"evidence: exit status {process.returncode}, so no page: {' '.join(command)}")
    return "".join(lines)


def page(name: str, job: dict[str, Any], output: str, seconds: float) -> str:
    """The page of a job. Front matter values are JSON, which YAML also reads."""
    facts = {
        "commit": git("rev-parse", "HEAD"),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "seconds": round(seconds),
        "sources": job["sources"],
        "max_age_commits": job["max_age_commits"],
        "max_age_days": job["max_age_days"],
    }
    matter = "".join(f"{key}: {json.dumps(value)}\n" for key, value in facts.items())
    output = output.strip().replace(str(ROOT), ".")         # a page names no machine's paths
    body = output if job.get("markdown") else f"```text\n{output}\n```"
    if plot := job.get("plot"):
        body += f"\n\n![{job['title']}]({plot})"
    return (
        f"---\n{matter}---\n\n# {job['title']}\n\n{job['about']}\n\n"
        f"Commit `{facts['commit'][:12]}`, {facts['date']}, {facts['seconds']} s. {facts['machine']}.\n\n"
        f"`{' '.join(job['command'])}` (or `make evidence EVIDENCE_ARGS={name}`) printed:\n\n{body}\n"
    )


def index(jobs: dict[str, dict[str, Any]]) -> None:
    """Bring the list on the index page up to date with the pages there are."""
    there = [f"- [{job['title']}]({name}.md)\n" for name, job in jobs.items() if (PAGES / f"{name}.md").exists()]
    path = PAGES / "index.md"
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    listed = "".join(there) or "No job has been run yet.\n"
    path.write_text(f"{before}{BEGIN}{listed}{END}{after}")


def main() -> None:
    jobs = tomllib.loads((ROOT / "evidence" / "jobs.toml").read_text())
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(jobs)} (all)")
    parser.add_argument("--list", action="store_true", help="name the jobs and stop")
    arguments = parser.parse_args()
    if arguments.list:
        for name, job in jobs.items():
            print(f"{name:16} {job['title']} (at most {job['timeout'] // 60} minutes)")
        return
    for name in arguments.names:
        if name not in jobs:
            parser.error(f"no job is called {name!r}; there are {', '.join(jobs)}")
    for name in arguments.names or jobs:
        job = jobs[name]
        if changed := git("status", "--porcelain", "--", *job["sources"]):
            raise SystemExit(f"evidence: {name}: commit these first, the page names the commit it measured:\n{changed}")
        print(f"== {name}: {job['title']}", flush=True)
        start = time.monotonic()
        output = run(job["command"], job["timeout"])
        (PAGES / f"{name}.md").write_text(page(name, job, output, time.monotonic() - start))
        index(jobs)


if __name__ == "__main__":
    main()
