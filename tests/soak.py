"""The long proof, run on request: a thousand kills of real processes each for keys and for sagas, on real stores.

    python -m tests.soak [--kills 1000] [--seed N] [--only keys | sagas] [--ways]

Kills are shared out between SQLite, Redis and PostgreSQL, a third each; the seed is printed and brings the same kills
again, as far as the scheduler lets it. `--ways` has the explorer take all triples of callers as well. The exit code is
1 if anything was not as promised.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from resilient.clock import SystemClock, system_rng
from tests._servers import postgres_server, redis_server
from tests.explorer import KINDS, Broken, Explorer

__all__ = ["main"]

SUITES = {
    "keys": ("tests._kill_child", ("kills", "keys", "in doubt", "effects", "answers", "seconds")),
    "sagas": ("tests._saga_child", ("kills", "sagas", "done", "undone", "effects", "lost", "seconds")),
}


@contextmanager
def _sqlite() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as place:
        yield f"sqlite:///{place}/soak.db"


BACKENDS = {"sqlite": _sqlite, "redis": redis_server, "postgres": postgres_server}


def _kill(child: str, backend: str, kills: int, seed: int) -> dict[str, Any]:
    with BACKENDS[backend]() as url:
        command = [sys.executable, "-m", child, url, "--kills", str(kills), "--seed", str(seed)]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if ran.returncode:
        return {"faults": [f"the supervisor ended with {ran.returncode}"]}
    report: dict[str, Any] = json.loads(ran.stdout)
    return report


def _ways() -> bool:
    """All triples of callers, in all ways."""
    clock, good = SystemClock(), True
    for in_doubt in ("raise", "rerun", "reconcile"):
        began, states = clock.now(), 0
        for kinds in itertools.combinations_with_replacement(KINDS, 3):
            try:
                states += Explorer(kinds, in_doubt, late=False).run()
            except Broken as broken:
                good = False
                print(in_doubt, kinds, broken)
        print(f"all triples, in_doubt={in_doubt!r}: {states:,} states, {clock.now() - began:.0f} s", flush=True)
    return good


def _suite(suite: str, quota: int, seed: int) -> bool:
    """The kills of one suite, shared out between the stores."""
    child, columns = SUITES[suite]
    print("".join(f"{word:>11}" for word in (suite, *columns)), flush=True)
    totals = dict.fromkeys(columns, 0)
    points: dict[str, int] = {}
    good = True
    for number, backend in enumerate(BACKENDS):
        kills = (quota + number) // len(BACKENDS) if number else quota // len(BACKENDS)
        report = _kill(child, backend, kills, seed + number)
        print(f"{backend:>11}" + "".join(f"{report.get(word, '?'):>11}" for word in columns), flush=True)
        for word in columns:
            totals[word] += report.get(word, 0)
        for name, count in report.get("points", {}).items():
            points[name] = points.get(name, 0) + count
        for fault in report["faults"]:
            good = False
            print(fault)
    print(f"{'all':>11}" + "".join(f"{round(totals[word], 1):>11}" for word in columns))
    print("killed after: " + ", ".join(f"{name} {count}" for name, count in sorted(points.items())))
    return good


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Kill real processes, and look.")
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--only", choices=list(SUITES))
    parser.add_argument("--ways", action="store_true")
    options = parser.parse_args()
    seed: int = int(system_rng().random() * 1e9) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    good = True
    for suite in SUITES if options.only is None else [options.only]:
        good = _suite(suite, options.kills, seed) and good
    if options.ways:
        good = _ways() and good
    print("never two effects, no result lost, every key and every saga ended" if good else "PROMISES WERE BROKEN")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
