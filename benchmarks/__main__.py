"""`python -m benchmarks`: measure, compare, write the tables, and fail when a budget is missed.

Jobs run one after another, each in a process of its own. Where a budget is missed, its job is run again with more
rounds, twice at most, and pooled with what was measured before: a busy machine only ever makes things slower.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.budgets import BUDGETS, Budget
from benchmarks.cases import GROUPS, every_case, select
from benchmarks.durable import BACKENDS
from benchmarks.figures import Figures, Row
from benchmarks.measures import Job, matches
from benchmarks.sagas import GROUPS as SAGAS
from benchmarks.sagas import SPARED

ROOT = Path(__file__).resolve().parent.parent
AGAIN = 2
"""How often a job is repeated whose budget was missed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for; 0 if all is within budget."""
    o = _arguments().parse_args(argv)
    figures = Figures()
    began = time.perf_counter()
    jobs = [job for job in _jobs(o.quick, o.rounds, o.only) if matches(job)]
    for at, job in enumerate(jobs, 1):
        _say(f"[{at:2}/{len(jobs)}] {' '.join(part for part in job.key if part)}")
        figures.add(_run(job))
    budgets = [] if o.no_budgets else [budget for budget in BUDGETS if not o.only or _reached(budget, figures)]
    for again in range(1, 1 + (0 if o.quick else AGAIN)):
        missed = {
            budget.job
            for budget in budgets
            if budget.value(figures) is not None and not budget.kept(figures, strict=o.strict)
        }
        for job in jobs:
            if job.key in missed:
                _say(f"[again {again}] {' '.join(part for part in job.key if part)}")
                figures.add(_run(replace(job, rounds=job.rounds * 2)))
    _say(f"measured in {time.perf_counter() - began:.0f} s\n")
    print(report.terminal(figures.rows()))
    if o.json is not None:
        _write(o.json, report.baseline(figures.rows()))
    if not o.no_write:
        if o.quick or o.only:
            _say("not written: a quick or partial run says too little (--json FILE writes it elsewhere)")
        else:
            _write(ROOT / "benchmarks" / "baseline.json", report.baseline(figures.rows()))
            report.fill(ROOT / "README.md", report.readme(figures.rows()))
            report.fill(ROOT / "docs" / "reference" / "benchmarks.md", report.page(figures.rows(), budgets, figures))
    return _judge(budgets, figures, strict=o.strict)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What guarding a call costs.")
    parser.add_argument("--quick", action="store_true", help="a smoke run of less than a minute; nothing is written")
    parser.add_argument("--only", default="", metavar="REGEX", help="candidates whose suite/mode/group/name matches")
    parser.add_argument("--rounds", type=int, metavar="N", help="samples of each candidate (default 32; quick 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument("--strict", action="store_true", help="bounds in absolute time do not grow on slower machines")
    parser.add_argument("--no-budgets", action="store_true", help="measure only; never fail for a figure")
    parser.add_argument("--no-write", action="store_true", help="leave baseline, README and docs alone")
    return parser


def _jobs(quick: bool, rounds: int | None, only: str) -> Iterator[Job]:
    rounds = rounds or (3 if quick else 32)
    base = Job("", rounds=rounds, milliseconds=0.5 if quick else 5.0, quick=quick, only=only)
    cases = every_case()
    # Whatever a process is given by luck (addresses, hashes), it gives all its candidates alike, but not quite: so the
    # short jobs run in two processes each, with half the rounds.
    for half in range(1 if quick else 2):
        part = replace(base, rounds=max(1, rounds // (1 if quick else 2)))
        for mode in ("sync", "async"):
            for group in GROUPS[1:]:
                if select(cases, mode, group):
                    yield replace(part, suite="calls", mode=mode, group=group)
            yield replace(part, suite="failure", mode=mode)
            yield replace(part, suite="rejection", mode=mode)
        yield replace(part, suite="forms")
        if half == 0:
            yield replace(base, suite="imports", rounds=max(2, rounds // 2))
            yield replace(base, suite="memory", mode="sync", rounds=1)
            yield replace(base, suite="memory", mode="async", rounds=1)
            yield replace(base, suite="threads", rounds=max(1, rounds // 8))
            yield replace(base, suite="tasks", rounds=rounds // 2)
            for mode in ("sync", "async"):
                for group in ("library", *BACKENDS, "group commit"):
                    yield replace(base, suite="durable", mode=mode, group=group, rounds=max(1, rounds // 2))
            yield replace(base, suite="durable", mode="sync", group="powertools", rounds=max(1, rounds // 2))
            for mode, groups in SAGAS.items():
                for group in groups:
                    if not quick or (mode, group) not in SPARED:
                        yield replace(base, suite="sagas", mode=mode, group=group, rounds=max(1, rounds // 2))


def _run(job: Job) -> list[Row]:
    """The rows of a job; a single one with the error if its process died."""
    command = [sys.executable, "-m", "benchmarks.worker", json.dumps(asdict(job))]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    except subprocess.TimeoutExpired:
        done = subprocess.CompletedProcess(command, 1, "", "took longer than 15 minutes")
    if done.returncode == 0:
        rows: list[Row] = json.loads(done.stdout.rpartition("\n")[2])
        return rows
    lines = done.stderr.strip().splitlines() or ["died"]
    _say(f"      failed: {lines[-1]}")
    named = {"suite": job.suite, "mode": job.mode, "group": job.group, "library": "", "name": "the whole job"}
    return [{**named, "error": lines[-1]}]


def _reached(budget: Budget, figures: Figures) -> bool:
    return figures.find(budget.suite, budget.mode, budget.group, budget.name) is not None


def _judge(budgets: Sequence[Budget], figures: Figures, *, strict: bool) -> int:
    missed = 0
    for budget in budgets:
        value = budget.value(figures)
        kept = budget.kept(figures, strict=strict)
        missed += not kept
        found = f"not measured: {budget.why_not(figures)}" if value is None else f"{value:g}"
        print(f"{budget.says:46} {budget.limit(figures, strict=strict):52} {'kept  ' if kept else 'MISSED'}  {found}")
    if missed:
        _say(f"\n{missed} of {len(budgets)} budgets missed")
    return 1 if missed else 0


def _write(path: Path, figures: dict[str, Any]) -> None:
    """As JSON, one candidate a line, so that a diff shows whose figures changed."""
    rows = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in figures["figures"])
    facts = {key: value for key, value in figures.items() if key != "figures"}
    head = json.dumps(facts, indent=1, ensure_ascii=False).rstrip("}\n")
    path.write_text(f'{head},\n "figures": [\n{rows}\n ]\n}}\n', encoding="utf-8")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
