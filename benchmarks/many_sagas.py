"""A million finished sagas in one SQLite file: does a new one stay as cheap? `python -m benchmarks.many_sagas`.

Long, and on request only. Sagas of three steps are journalled by the statements of the store, a tenth in one
transaction; then the cost of a new saga, of a scan for orphans where none are, and of a purged saga is measured
(medians), and the size of the file. The last lines say how the last tenth compares with the first.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.many_keys import Execute, filling, median_us
from benchmarks.raw import Written
from benchmarks.sagas import block, keys, written
from resilient._book import TTL, stored_key
from resilient.sagas import recover
from resilient.stores import Append, Begin, Finish, Purge, SQLiteStore


def _fill(execute: Execute, script: Written, number: int) -> None:
    """Write what so many sagas write, without running them."""
    for key in keys(number):
        stored, owner = stored_key("order", key), f"{key}.1"
        fence = execute(Begin(stored, owner, 30.0, script.entries[0], script.label)).fence
        for at in range(1, len(script.entries)):
            execute(Append(stored, owner, fence, at, script.entries[at], 30.0))
        execute(Finish(stored, owner, fence, script.result, TTL))


def _place(place: Callable[[str], object]) -> None:
    place(keys(1)[0])


def main() -> int:
    """Fill, measure, say."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_sagas", description=__doc__)
    parser.add_argument("--sagas", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--durability", choices=("normal", "full"), default="normal")
    o = parser.parse_args()
    part = max(1, o.sagas // 10)
    script = written("block", "sync")
    rows: list[tuple[float, float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sagas.db"
        store = SQLiteStore(path, durability=o.durability)
        store.prepare()
        place = block(store)
        print(
            f"{'sagas':>12} {'new saga µs':>12} {'no orphans µs':>14} {'purge µs/saga':>14} {'file MB':>9}", flush=True
        )
        for done in range(1, 11):
            with filling(path) as execute:
                _fill(execute, script, part)
            new = median_us(partial(_place, place), min(2_000, part))
            look = median_us(partial(recover, store), 200)
            # The oldest go: few, so that the file keeps growing.
            purge = median_us(partial(store.execute, Purge(0.0, 100)), max(1, min(10, part // 1_000))) / 100
            rows.append((new, look, purge))
            size = path.stat().st_size / 1e6
            print(f"{done * part:>12,} {new:>12.1f} {look:>14.1f} {purge:>14.2f} {size:>9,.0f}", flush=True)
        store.close()
    names = ("new saga", "no orphans", "purge")
    for name, column in zip(names, zip(*rows, strict=True), strict=True):
        print(f"{name}: {min(column):.1f} to {max(column):.1f} µs; last tenth over first: {column[-1] / column[0]:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
